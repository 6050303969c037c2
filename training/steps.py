"""The kinds of training steps (`--mix` of `training.flow`) and their batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from training.latents import Latents
from training.model import pack, positions
from training.noise_levels import HIGH_SIGMAS, HIGH_SIGMAS_WITHIN, SHIFT
from training.scenes import Scene, caption

BATCH_SIZE = {8: 48, 16: 16, 24: 7, 32: 4}  # images per step, by tokens along a side
IMAGE_COUNT = {128: 12_288, 256: 6_144, 512: 4_096}  # images in the training set, by side in pixels
TEXT_STATES = {8: 24, 16: 24, 24: 24, 32: None}  # T5 states, by tokens along a side; None: all


@dataclass(frozen=True)
class StepKind:
    """The kind of images in a step: "512", "128@4" or "512/16" of `--mix`.

    Attributes:
        side: side of the whole images in pixels.
        stride: distance between the positions of neighbouring tokens.
        window: tokens along a side of the window; 0 for whole images.
    """

    side: int
    stride: int = 1
    window: int = 0

    @property
    def grid(self) -> int:
        """Tokens along a side of the window, or of the whole image."""
        return self.window or self.side // 16

    @property
    def is_within_thing(self) -> bool:
        """Whether the window is no wider than the smallest thing (`scenes.SIZES`)."""
        return 0 < self.window <= 8

    @property
    def candidates(self) -> int:
        """Scenes to draw for each that is used: the ones with the highest `priority` are used."""
        return 3 if self.is_within_thing else 8 if self.window > 16 else 1

    def priority(self, scene: Scene) -> int:
        """Rank a scene for this kind of window.

        Windows within a thing need two different things. Wide windows are for what was wrong most
        often: large things, and rings and crosses.
        """
        if self.is_within_thing:
            return bool(scene.relation)
        large = any(thing.size == "large" for thing in scene.things)
        return large + any(thing.shape in ("ring", "cross") for thing in scene.things)

    def __str__(self) -> str:
        window = f"/{self.window}" if self.window else ""
        return f"{self.side}{window}@{self.stride}"


def parse_mix(text: str) -> tuple[list[StepKind], np.ndarray]:
    """Parse `--mix`, such as "128@4:1,512/16:3".

    Returns:
        Kinds of steps, here [StepKind(128, 4), StepKind(512, 1, 16)], and their probabilities.
    """
    kinds, weights = [], []
    for entry in text.split(","):
        kind, _, weight = entry.partition(":")
        kind, _, stride = kind.partition("@")
        side, _, window = kind.partition("/")
        kinds.append(StepKind(int(side), int(stride or 1), int(window or 0)))
        weights.append(float(weight or 1))
    return kinds, np.array(weights) / sum(weights)


def token_weights(scenes: list[Scene], grid: int, unshifted: torch.Tensor) -> torch.Tensor:
    """Weight the tokens of the loss, so that flat background does not dominate it.

    A small thing covers one token in fourteen. The weight of a token in the box around a thing is
    sqrt(all tokens / tokens in the box); that of the others is 1. Where noise hides the exact place
    of a thing, such weights would bias the velocity towards things. Therefore the box grows with
    the noise level, and from 0.75 all tokens have equal weights.

    Args:
        scenes: the scenes of the batch.
        grid: tokens along a side of the whole image.
        unshifted: the noise levels [batch] before the shift.

    Returns:
        Weights [batch, grid, grid], up to a common factor.
    """
    weights = torch.ones(len(scenes), grid, grid)
    margins = 1 + (15 * (unshifted - 0.4)).clamp(0, 3) * max(grid / 32, 0.5)
    for weight, scene, margin in zip(weights, scenes, margins.tolist(), strict=True):
        for thing in scene.things:
            half_width = thing.radius * grid + margin
            x0, x1, y0, y1 = (
                min(max(round(centre * grid + sign * half_width), 0), grid)
                for centre in (thing.x, thing.y)
                for sign in (-1, 1)
            )
            weight[y0:y1, x0:x1] = grid / ((y1 - y0) * (x1 - x0)) ** 0.5
    confidence = ((0.75 - unshifted) / 0.15).clamp(0, 1)
    weights = torch.lerp(torch.ones(()), weights, confidence[:, None, None])
    return weights


def window_corner(
    scene: Scene, grid: int, window: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Draw the (row, column) of a window's first token.

    On each axis the window contains one of the things, or lies within it.

    Args:
        scene: the scene.
        grid: tokens along a side of the image.
        window: tokens along a side of the window.
        rng: source of randomness.
    """
    thing = scene.things[int(rng.integers(len(scene.things)))]
    half_width = thing.radius * grid
    offsets = []
    for centre in (thing.y * grid, thing.x * grid):
        ends = sorted((centre - half_width, centre + half_width - window))
        first, last = (min(max(round(end), 0), grid - window) for end in ends)
        offsets.append(int(rng.integers(first, last + 1)))
    return offsets[0], offsets[1]


def draw_batch(
    latents: Latents,
    kind: StepKind,
    seed: tuple[int, ...],
    batch: int,
    position: int,
    dropout: float,
):
    """Return the batch of a step.

    Args:
        latents: the training set.
        kind: the kind of step.
        seed: seed of all random choices.
        batch: batch size.
        position: position in the stream of images.
        dropout: probability of an empty caption.

    Returns:
        x0 and noise [batch, tokens, 64], sigma and guidance [batch], captions, loss weights
        [batch, tokens, 1], and ids [batch, tokens, 3].
    """
    rng = np.random.default_rng(seed)
    full_grid, grid = kind.side // 16, kind.grid
    if kind.candidates > 1:
        start = int(rng.integers(latents.count))
        z, scenes = latents.batch(start, kind.candidates * batch)
        selected = sorted(range(len(scenes)), key=lambda i: -kind.priority(scenes[i]))[:batch]
        z, scenes = z[selected], [scenes[i] for i in selected]
    else:
        z, scenes = latents.batch(position, batch)
    corners = [(0, 0)] * batch
    if kind.window:
        corners = [window_corner(scene, full_grid, grid, rng) for scene in scenes]
        z = torch.stack(
            [
                latent[:, 2 * r : 2 * (r + grid), 2 * c : 2 * (c + grid)]
                for latent, (r, c) in zip(z, corners, strict=True)
            ]
        )
    ids = positions(grid, grid, kind.stride).repeat(batch, 1, 1)
    ids[..., 1:] += kind.stride * torch.tensor(corners)[:, None]
    texts = [caption(scene, rng) if rng.uniform() >= dropout else "" for scene in scenes]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    x0 = pack(z)
    noise = torch.randn(x0.shape, generator=generator)
    # Stratified over the batch, for less variance than independent draws.
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    # Outlines are decided at sigma 0.85 to 0.98 at 512 px, which is 0.4 to 0.85 before the shift.
    # Captions are learned at noise that hides the image's content: hence a share of high sigmas.
    high_share, high_start = HIGH_SIGMAS_WITHIN if kind.is_within_thing else HIGH_SIGMAS
    low_part = (uniform / (1 - high_share)).clamp(1e-4, 1 - 1e-4)
    sigma = torch.sigmoid(0.4 + 0.9 * torch.special.ndtri(low_part))
    sigma = torch.where(
        uniform < 1 - high_share, sigma, 1 - (1 - high_start) * (1 - uniform) / high_share
    )
    sigma = sigma[torch.randperm(batch, generator=generator)]
    weight = token_weights(scenes, full_grid, sigma)
    weight = torch.stack(
        [full[r : r + grid, c : c + grid] for full, (r, c) in zip(weight, corners, strict=True)]
    )
    weight = (weight / weight.mean()).flatten(1)[..., None]
    shift = SHIFT[kind.side]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    guidance = 2 + 2 * torch.rand(batch, generator=generator)  # around FLUX's usual 3.5
    return x0, noise, sigma, guidance, texts, weight, ids
