"""Six kinds of prompts, GenEval's in miniature, each with what the checker must find.

Things come from the combinations of attributes that training never drew. A prompt's scene, caption
and noise seeds derive from (split, category, its number) alone: more prompts begin with the same
ones, and what is tuned on "dev" has not seen "test".
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
        scene: what it asks for; of things that it does not name, such as places, one example.
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
        scene = random_scene(rng, unseen=True)
    elif category == "counting":
        scene = random_scene(rng, things=2 + number % 3, same=True, unseen=True)
    else:
        scene = _distinct(rng, CATEGORIES[category])
    if category != "position":
        scene = replace(scene, relation="")
    size = "size" in CATEGORIES[category]
    text = caption(scene, rng, size, texture=False, background=False, relation=True)
    return Prompt(text, scene, category, noise)


def _distinct(rng: np.random.Generator, attributes: tuple[str, ...]) -> Scene:
    """Two things that differ in all of `attributes`."""
    while True:
        scene = random_scene(rng, things=2, unseen=True)
        a, b = scene.things
        if all(getattr(a, name) != getattr(b, name) for name in attributes):
            return scene


def prompts(per_category: int, split: str = "test", seeds: int = 3) -> list[Prompt]:
    """`per_category` prompts of each category, the categories taking turns."""
    return [
        prompt(category, number, split, seeds)
        for number in range(per_category)
        for category in CATEGORIES
    ]
