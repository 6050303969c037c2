"""Measures the velocity's mean squared error on new scenes, at several noise levels.

    python -m training.validate --flow /var/tmp/jitjax-train/flow.pt

Also counts in how many scenes of two things the model places both correctly from pure noise: its
predicted image must be nearer to the scene than to the scene with the two things swapped.

Uses the averaged weights and images of 512 px. Each scene has one caption and one noise, the same
for all checkpoints. Guidance is 1; distillation teaches guidance 2 to 4 only, so that errors are
comparable between models before distillation. Compare checkpoints, not noise levels: at a high
sigma no model can predict all that the noise hides.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from training.common import RUNS, autocast
from training.export import load_trained
from training.latents import Latents
from training.model import TinyFlux, pack, positions
from training.scenes import Scene, caption, random_scene
from training.steps import IMAGE_COUNT

SIDE, BATCH = 512, 8


@torch.no_grad()
def predict_velocity(
    model: TinyFlux, x: torch.Tensor, texts: list[str], sigma: float
) -> torch.Tensor:
    """Predict the velocity of whole images.

    Args:
        model: transformer and text encoders.
        x: noisy tokens [batch, tokens, 64].
        texts: the captions.
        sigma: the noise level of all images.

    Returns:
        float32 [batch, tokens, 64].
    """
    grid = SIDE // 16
    sigmas, guidance = torch.full((len(x),), sigma), torch.ones(len(x))
    ids = positions(grid, grid).repeat(len(x), 1, 1)
    with autocast():
        return model(x, sigmas, guidance, *model.encode(texts), ids).float()


def velocity_errors(
    model: TinyFlux, x0: torch.Tensor, texts: list[str], sigma: float, seed: int
) -> list[float]:
    """Return the velocity's mean squared error for each image.

    Args:
        model: transformer and text encoders.
        x0: clean tokens [batch, tokens, 64].
        texts: the captions.
        sigma: the noise level.
        seed: seed of the noise.
    """
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    u = predict_velocity(model, torch.lerp(x0, noise, sigma), texts, sigma)
    return (u - (noise - x0)).square().mean((1, 2)).tolist()


def swap_places(scene: Scene) -> Scene:
    """Return the scene with the places of its two things swapped."""
    a, b = scene.things
    return replace(scene, things=(replace(b, x=a.x, y=a.y), replace(a, x=b.x, y=b.y)))


def count_told_apart(model: TinyFlux, latents: Latents, count: int, seed: int) -> int:
    """Count the scenes of two things, out of `count`, whose places the model predicts correctly."""
    correct = 0
    for start in range(0, count, BATCH):
        rng = np.random.default_rng((seed, start))
        scenes = [random_scene(rng, 2, unseen=True) for _ in range(BATCH)]
        texts = [caption(scene, rng) for scene in scenes]
        scene_tokens = pack(latents.encode(scenes).float())
        swapped_tokens = pack(latents.encode([swap_places(scene) for scene in scenes]).float())
        noise = torch.randn(
            scene_tokens.shape, generator=torch.Generator().manual_seed(seed + start)
        )
        predicted = noise - predict_velocity(model, noise, texts, 1.0)
        distance, swapped_distance = (
            (predicted - x0).square().sum((1, 2)) for x0 in (scene_tokens, swapped_tokens)
        )
        correct += int((distance < swapped_distance).sum())
    return correct


def main() -> None:
    """Print the error at each noise level, and the count of scenes with correct places."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flow", type=Path, default=RUNS / "flow.pt")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.7, 0.88, 0.93, 0.96, 0.98])
    parser.add_argument("--scenes", type=int, default=32, help="a multiple of 8 (default: 32)")
    parser.add_argument("--seed", type=int, default=77, help="seed of the scenes; training uses 0")
    args = parser.parse_args()
    if args.scenes < BATCH or args.scenes % BATCH:
        parser.error(f"--scenes is {args.scenes}; expected a multiple of {BATCH}")
    model, step = load_trained(args.flow)
    latents = Latents(SIDE, IMAGE_COUNT[SIDE], args.seed, several=True)
    scenes = [latents.scene(index) for index in range(args.scenes)]
    x0 = pack(latents.encode(scenes).float())
    rng = np.random.default_rng(args.seed)
    texts = [caption(scene, rng) for scene in scenes]
    print(f"{args.flow}, step {step}, {args.scenes} scenes: sigma, error, its standard error")
    for sigma in args.sigmas:
        scene_errors = []
        for start in range(0, args.scenes, BATCH):
            rows = slice(start, start + BATCH)
            scene_errors += velocity_errors(model, x0[rows], texts[rows], sigma, args.seed + start)
        standard_error = np.std(scene_errors) / len(scene_errors) ** 0.5
        print(f"{sigma:5.2f}  {np.mean(scene_errors):.4f}  {standard_error:.4f}")
    told_apart = count_told_apart(model, latents, args.scenes, args.seed)
    print(
        f"scenes of two things with correct places, from pure noise: {told_apart} of {args.scenes}"
    )


if __name__ == "__main__":
    main()
