"""Six kinds of prompts, GenEval's in miniature, each with what the checker must find.

Things come from the combinations of attributes that training never drew, and the prompt names these
attributes, so that little else fits it: shape, colour and size (that they are plain goes without
saying), and the background. A prompt's scene, caption and noise seeds derive from (split, category,
its number) alone: more prompts begin with the same ones, and what is tuned on "dev" has not seen
"test".
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
"""Attributes that must be right, beside the number of things (and the relation of "position")."""
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Prompt:
    """What to draw and how to judge it.

    Attributes:
        text: the prompt.
        scene: what it asks for; of what it does not name, such as places, one example.
        category: a key of `CATEGORIES`.
        seeds: of the noise, one per picture.
    """

    text: str
    scene: Scene
    category: str
    seeds: tuple[int, ...]


def prompt(category: str, number: int, split: str = "test", seeds: int = 3) -> Prompt:
    """Prompt `number` of a category, with `seeds` noise seeds."""
    if category not in CATEGORIES:
        raise ValueError(f"category is {category!r}; expected one of {tuple(CATEGORIES)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    rng = np.random.default_rng((zlib.crc32(f"{split}/{category}".encode()), number))
    noise = tuple(int(seed) for seed in rng.integers(2**31, size=16)[:seeds])
    if category in ("single", "colour"):
        scene = _scene(rng)
    elif category == "counting":
        scene = _scene(rng, things=2 + number % 3, same=True)
    else:
        scene = _scene(rng, CATEGORIES[category], things=2)
    if category != "position":
        scene = replace(scene, relation="")
    text = caption(scene, rng, size=True, texture=False, background=True, relation=True)
    return Prompt(text, scene, category, noise)


def _scene(rng: np.random.Generator, differing: tuple[str, ...] = (), **options) -> Scene:
    """Unseen things, all plain; no two are alike in any of `differing`."""
    while True:
        scene = random_scene(rng, unseen=True, **options)
        plain = all(thing.texture == "plain" for thing in scene.things)
        kinds = (len({getattr(thing, name) for thing in scene.things}) for name in differing)
        if plain and all(count == len(scene.things) for count in kinds):
            return scene


def prompts(per_category: int, split: str = "test", seeds: int = 3) -> list[Prompt]:
    """`per_category` prompts of each category, the categories taking turns."""
    return [
        prompt(category, number, split, seeds)
        for number in range(per_category)
        for category in CATEGORIES
    ]
