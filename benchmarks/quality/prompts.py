"""Prompts of the quality benchmark: six categories after GenEval, each with what must be right.

All things have combinations of attributes that were held out from training. A prompt names their
shape, colour and size, and the background; all things are plain, which captions need not say.
A prompt's scene, text and noise seeds depend on its split, category and number only. A longer list
therefore begins with the shorter one, and "dev" and "test" are drawn independently.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from training.scenes import Scene, caption, random_scene

CATEGORIES = {
    "single": ("shape", "size"),
    "colour": ("colour", "shape"),
    "two": ("shape",),
    "counting": ("shape",),
    "position": ("shape",),
    "binding": ("colour", "shape"),
}
"""Attributes that must be right in each category, besides the number of things. The relation must
be right too in "position"."""
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what an image of it must show.

    Attributes:
        text: the prompt's text.
        scene: a scene that fits the text; only attributes in `CATEGORIES` are judged.
        category: a key of `CATEGORIES`.
        seeds: seeds of the noise, one per image.
    """

    text: str
    scene: Scene
    category: str
    seeds: tuple[int, ...]


def prompt(category: str, number: int, split: str = "test", seeds: int = 3) -> Prompt:
    """Return prompt `number` of a category, with `seeds` noise seeds (at most 16).

    Raises:
        ValueError: `category` or `split` is unknown.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category is {category!r}; expected one of {tuple(CATEGORIES)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    rng = np.random.default_rng((zlib.crc32(f"{split}/{category}".encode()), number))
    noise_seeds = tuple(int(seed) for seed in rng.integers(2**31, size=16)[:seeds])
    if category in ("single", "colour"):
        scene = _scene(rng)
    elif category == "counting":
        scene = _scene(rng, things=2 + number % 3, same=True)
    else:
        scene = _scene(rng, CATEGORIES[category], things=2)
    if category != "position":
        scene = replace(scene, relation="")
    text = caption(scene, rng, size=True, texture=False, background=True, relation=True)
    return Prompt(text, scene, category, noise_seeds)


def _scene(rng: np.random.Generator, distinct: tuple[str, ...] = (), **options) -> Scene:
    """Draw a scene of plain, held-out things; no two have equal values in any of `distinct`."""
    while True:
        scene = random_scene(rng, unseen=True, **options)
        all_plain = all(thing.texture == "plain" for thing in scene.things)
        counts = (len({getattr(thing, name) for thing in scene.things}) for name in distinct)
        if all_plain and all(count == len(scene.things) for count in counts):
            return scene


def prompts(per_category: int, split: str = "test", seeds: int = 3) -> list[Prompt]:
    """Return `per_category` prompts of each category, the categories interleaved."""
    return [
        prompt(category, number, split, seeds)
        for number in range(per_category)
        for category in CATEGORIES
    ]
