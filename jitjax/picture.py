"""A picture that the command line is asked for: a prompt, and all that decides what it shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jitjax.sampler.plan import Plan

LARGEST_COUNT = 100_000
SEEDS = 2**64


@dataclass(frozen=True)
class Picture:
    """A picture to make.

    Attributes:
        prompt: what it shows.
        seed: 0 to 2**64 - 1.
        width, height: size in pixels.
        plan_name, plan: the plan's name, and the plan with the changes that were asked for.
        guidance: guidance scale.
        checkpoint: the checkpoint as it was named.
        quantise: what its weights are quantised to when they are loaded; None for as stored.
        image: file of the picture to start from; None for noise.
        strength: the strength of image to image; None without `image`.
        mask: file of the mask of what is new in `image`; None for all of it.
        control: file of the control picture, if any.
        reference: file of the reference picture, if any.
        negative: the negative prompt; None for no true guidance.
        true_guidance: its scale; None without it.
    """

    prompt: str
    seed: int
    width: int
    height: int
    plan_name: str
    plan: Plan
    guidance: float
    checkpoint: str
    quantise: str | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    control: str | None = None
    reference: str | None = None
    negative: str | None = None
    true_guidance: float | None = None

    @property
    def settings(self) -> dict[str, object]:
        """All but the prompt, as stored in the PNG file."""
        settings: dict[str, object] = {
            "plan": self.plan_name,
            "steps": self.plan.steps,
            "solver": self.plan.solver,
            "microflow": self.plan.microflow,
            "seed": self.seed,
            "guidance": self.guidance,
            "width": self.width,
            "height": self.height,
            "checkpoint": self.checkpoint,
        }
        if self.quantise is not None:
            settings["quantise"] = self.quantise
        if self.image is not None:
            settings |= {"image": self.image, "strength": self.strength}
        for name in ("mask", "control", "reference"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.negative is not None:
            settings |= {"negative": self.negative, "true_guidance": self.true_guidance}
        return settings


def seed_keys(seeds: Sequence[int]) -> jax.Array:
    """Return the keys of seeds of 64 bits, [len(seeds)].

    Args:
        seeds: 0 to 2**64 - 1. Each gives another key; below 2**32, that of `jax.random.key(seed)`
            with JAX's default settings, whatever the settings are.
    """
    words = np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
    return jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")


def consecutive_seeds(first: int, count: int, *, name: str = "--seed") -> range:
    """Return `count` seeds from `first` on; raise `ValueError` if they are not possible."""
    if not 1 <= count <= LARGEST_COUNT:
        raise ValueError(f"--count is {count}; expected 1 to {LARGEST_COUNT}")
    if not 0 <= first < SEEDS:
        raise ValueError(f"{name} is {first}; expected 0 to 2**64 - 1")
    if first + count > SEEDS:
        raise ValueError(f"{name} is {first} and --count {count}; expected seeds below 2**64")
    return range(first, first + count)


def parse_size(text: str, *, name: str = "--size") -> tuple[int, int]:
    """Return width and height in pixels from one side or WIDTHxHEIGHT."""
    match = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text, re.ASCII)
    if not match:
        raise ValueError(f"{name} is {text!r}; expected one side or WIDTHxHEIGHT, such as 512x384")
    return int(match[1]), int(match[2] or match[1])
