"""The velocity's mean squared error on scenes that the training never drew, per noise level.

    python -m training.validate --flow /var/tmp/jitjax-train/flow.pt

Averaged weights, pictures of 512 px, every scene with one caption and one noise that are the same
for all checkpoints. Told guidance 1, where a model before and one after distillation should give
the same velocity. Much of the error at high sigma is what the noise leaves open, which no model can
know: compare checkpoints, not levels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from training.common import RUNS, autocast
from training.export import trained
from training.flow import COUNT
from training.latents import Latents
from training.model import TinyFlux, pack, positions
from training.scenes import caption

SIDE, BATCH = 512, 8


@torch.no_grad()
def errors(
    model: TinyFlux, x0: torch.Tensor, texts: list[str], sigma: float, seed: int
) -> list[float]:
    """Mean squared error of each picture's velocity; `x0` [batch, tokens, 64], noise by `seed`."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    level = torch.full((len(x0),), sigma)
    grid = SIDE // 16
    with autocast():
        u = model(
            torch.lerp(x0, noise, level[:, None, None]),
            level,
            torch.ones(len(x0)),
            *model.encode(texts),
            positions(grid, grid).repeat(len(x0), 1, 1),
        )
    return (u.float() - (noise - x0)).square().mean((1, 2)).tolist()


def main() -> None:
    """Print a line per noise level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flow", type=Path, default=RUNS / "flow.pt")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.7, 0.88, 0.93, 0.96, 0.98])
    parser.add_argument("--scenes", type=int, default=32, help="a multiple of 8 (default: 32)")
    parser.add_argument("--seed", type=int, default=77, help="of the scenes; training's is 0")
    args = parser.parse_args()
    if args.scenes < BATCH or args.scenes % BATCH:
        parser.error(f"--scenes is {args.scenes}; expected a multiple of {BATCH}")
    model, step = trained(args.flow)
    latents = Latents(SIDE, COUNT[SIDE], args.seed, several=True)
    scenes = [latents.scene(index) for index in range(args.scenes)]
    x0 = pack(latents.encode(scenes).float())
    rng = np.random.default_rng(args.seed)
    texts = [caption(scene, rng) for scene in scenes]
    print(f"{args.flow}, step {step}, {args.scenes} scenes: sigma, error, its standard error")
    for sigma in args.sigmas:
        found = []
        for at in range(0, args.scenes, BATCH):
            part = slice(at, at + BATCH)
            found += errors(model, x0[part], texts[part], sigma, args.seed + at)
        print(f"{sigma:5.2f}  {np.mean(found):.4f}  {np.std(found) / len(found) ** 0.5:.4f}")


if __name__ == "__main__":
    main()
