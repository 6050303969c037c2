"""Samples benchmark prompts with the averaged weights; writes a contact sheet, prints the score.

    python -m training.preview --n 24 --side 256 --steps 25 --guidance 1 3

Prompts are those of the quality benchmark's development split, of all six categories. Without
`--distilled`, guidance takes two forward passes per step; with it, guidance is an input of the
model.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.checker import check
from benchmarks.quality.prompts import CATEGORIES, prompts
from training.common import RUNS
from training.export import load_trained
from training.model import TinyFlux, load_autoencoder, positions, unpack


def shifted_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """Return FLUX.1-dev's shifted sigmas for a number of image tokens: [steps + 1], 1 to 0."""
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    sigmas = torch.linspace(1, 1 / steps, steps)
    return torch.cat([math.exp(mu) * sigmas / (1 + (math.exp(mu) - 1) * sigmas), torch.zeros(1)])


@torch.no_grad()
def sample(
    model: TinyFlux, vae, texts, seeds, side, steps, guidance, distilled, stride=1
) -> np.ndarray:
    """Sample images by Euler steps.

    Args:
        model: transformer and text encoders.
        vae: the autoencoder.
        texts: the prompts.
        seeds: seeds of the noise, one per prompt.
        side: side of the images in pixels.
        steps: number of steps.
        guidance: guidance scale.
        distilled: whether guidance is an input of the model, or takes a second forward pass.
        stride: distance between the positions of neighbouring tokens.

    Returns:
        float32 [batch, side, side, 3] in [0, 1].
    """
    grid = side // 16
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(grid * grid, 64, generator=g) for g in generators])
    sigmas, ids = shifted_sigmas(steps, grid * grid), positions(grid, grid, stride)
    embedded_guidance = torch.full((len(texts),), guidance if distilled else 2.0)
    conditionings = [model.encode(texts)]
    if guidance != 1 and not distilled:
        conditionings.append(model.encode([""] * len(texts)))
    for sigma, next_sigma in pairwise(sigmas):
        velocities = [
            model(x, sigma.expand(len(texts)), embedded_guidance, *c, ids) for c in conditionings
        ]
        u = velocities[0]
        if len(velocities) == 2:
            u = velocities[1] + guidance * (u - velocities[1])
        x = x + (next_sigma - sigma) * u.float()
    z = unpack(x, grid, grid) / vae.config.scaling_factor + vae.config.shift_factor
    y = torch.cat([vae.decoder(part) for part in z.split(4)])
    return ((y + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=RUNS / "flow.pt")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--stride", type=int, default=1, help="position stride, as in training")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--distilled", action="store_true")
    parser.add_argument("--out", type=Path, default=RUNS / "preview.png")
    args = parser.parse_args()

    model, step = load_trained(args.flow)
    vae = load_autoencoder()
    preview_prompts = prompts(math.ceil(args.n / len(CATEGORIES)), "dev", seeds=1)[: args.n]
    rows = []
    for guidance in args.guidance:
        start = time.monotonic()
        images = []
        for first in range(0, args.n, args.batch):
            batch_prompts = preview_prompts[first : first + args.batch]
            images.append(
                sample(
                    model,
                    vae,
                    [prompt.text for prompt in batch_prompts],
                    [prompt.seeds[0] for prompt in batch_prompts],
                    args.side,
                    args.steps,
                    guidance,
                    args.distilled,
                    args.stride,
                )
            )
        images = np.concatenate(images)
        checks = [
            check(image, prompt.scene, CATEGORIES[prompt.category])
            for image, prompt in zip(images, preview_prompts, strict=True)
        ]
        right_by_category = {
            name: [
                r["right"]
                for r, p in zip(checks, preview_prompts, strict=True)
                if p.category == name
            ]
            for name in CATEGORIES
        }
        print(
            f"step {step}, {args.side} px, {args.steps} steps, guidance {guidance}: "
            + " ".join(
                f"{name} {sum(results)}/{len(results)}"
                for name, results in right_by_category.items()
            )
            + f"  ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        for prompt, result in list(zip(preview_prompts, checks, strict=True))[:12]:
            print("   ", prompt.text, "|", " ".join(k for k, v in result.items() if not v))
        thumbnails = images[: len(images) // 6 * 6, :: args.side // 128, :: args.side // 128]
        rows += [
            np.concatenate(thumbnails[i : i + 6], axis=1) for i in range(0, len(thumbnails), 6)
        ]
    sheet = (np.concatenate(rows) * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(args.out)


if __name__ == "__main__":
    main()
