"""The velocity's mean squared error on scenes that the training never drew, per noise level.

And in how many scenes of two things the model tells, from noise alone, which of them stands where:
whether the picture that it expects is nearer to the scene than to the one with both exchanged.

    python -m training.validate --flow /var/tmp/jitjax-train/flow.pt

Averaged weights, pictures of 512 px, every scene with one caption and one noise that are the same
for all checkpoints. Told guidance 1, which the distillation no longer teaches (2 to 4): compare the
errors of models before it. Much of the error at high sigma is what the noise leaves open, which no
model can know: compare checkpoints, not levels.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from training.common import RUNS, autocast
from training.export import trained
from training.flow import COUNT
from training.latents import Latents
from training.model import TinyFlux, pack, positions
from training.scenes import Scene, caption, random_scene

SIDE, BATCH = 512, 8


@torch.no_grad()
def velocity(model: TinyFlux, x: torch.Tensor, texts: list[str], sigma: float) -> torch.Tensor:
    """Of whole pictures at one noise level, float32 like `x`: [batch, tokens, 64]."""
    grid = SIDE // 16
    level, told = torch.full((len(x),), sigma), torch.ones(len(x))
    ids = positions(grid, grid).repeat(len(x), 1, 1)
    with autocast():
        return model(x, level, told, *model.encode(texts), ids).float()


def errors(
    model: TinyFlux, x0: torch.Tensor, texts: list[str], sigma: float, seed: int
) -> list[float]:
    """Mean squared error of each picture's velocity; `x0` [batch, tokens, 64], noise by `seed`."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    u = velocity(model, torch.lerp(x0, noise, sigma), texts, sigma)
    return (u - (noise - x0)).square().mean((1, 2)).tolist()


def exchanged(scene: Scene) -> Scene:
    """The scene with each of its two things in the other's place."""
    a, b = scene.things
    return replace(scene, things=(replace(b, x=a.x, y=a.y), replace(a, x=b.x, y=b.y)))


def tell_apart(model: TinyFlux, latents: Latents, count: int, seed: int) -> int:
    """In how many of `count` unseen scenes of two things each is expected in its own place."""
    right = 0
    for at in range(0, count, BATCH):
        rng = np.random.default_rng((seed, at))
        scenes = [random_scene(rng, 2, unseen=True) for _ in range(BATCH)]
        texts = [caption(scene, rng) for scene in scenes]
        own = pack(latents.encode(scenes).float())
        other = pack(latents.encode([exchanged(scene) for scene in scenes]).float())
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed + at))
        expected = noise - velocity(model, noise, texts, 1.0)
        near, far = ((expected - x0).square().sum((1, 2)) for x0 in (own, other))
        right += int((near < far).sum())
    return right


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
    told = tell_apart(model, latents, args.scenes, args.seed)
    print(f"which of two things stands where, from noise alone: {told} of {args.scenes}")


if __name__ == "__main__":
    main()
