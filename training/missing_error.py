"""Measures a model's velocity when tokens are missing, on scenes that training has not seen.

    python -m training.scene_data --seed 77 --count 64 --out SCENES
    python -m training.missing_error --scenes SCENES --checkpoint tiny OTHER

For every noise level: the error of the velocity from all tokens, against `noise - x0` (guidance
1, as in `training.validate`); and that of the velocity from a subset, against the velocity from
all tokens at the tokens given (guidance 3.5, over the variance of the latter). The second has a
part that no model can avoid: a subset says less than all tokens do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jitjax
from jitjax.sampler.grid import positions
from jitjax.velocity import FluxVelocity
from training.missing_tokens import DENSITIES, GRID, TOKENS, draw_subset, load_scenes

GUIDANCE = 3.5


def errors(params: jitjax.FluxParams, folder: Path, sigma: float, batch: int = 8) -> np.ndarray:
    """Measure one checkpoint at one noise level.

    Args:
        params: parameters of the pipeline.
        folder: scenes by `training.scene_data`.
        sigma: the noise level.
        batch: pictures per evaluation.

    Returns:
        The error from all tokens, and from the subsets of each of `DENSITIES`: [scenes, 1 + 3].
    """
    scenes = load_scenes(folder, params)
    evaluate = jax.jit(FluxVelocity(params.config.transformer))
    everywhere = positions(jnp.arange(TOKENS), GRID)
    results = []
    for start in range(0, len(scenes.tokens), batch):
        rows = slice(start, start + batch)
        x0 = scenes.tokens[rows].astype(jnp.float32)
        noise_key, subset_key = jax.random.split(jax.random.fold_in(jax.random.key(0), start))
        noise = jax.random.normal(noise_key, x0.shape)
        x = (1 - sigma) * x0 + sigma * noise
        captions = scenes.captions[rows, 0]
        conditioning = jitjax.Conditioning(
            scenes.text[captions].astype(jnp.float32), scenes.pooled[captions]
        )

        def velocity(x, places, guidance, conditioning=conditioning):
            guidance = jnp.full(len(x), guidance)
            args = (params.transformer, conditioning, guidance)
            return evaluate(x, places, jnp.asarray(sigma), None, args)

        places = jnp.broadcast_to(everywhere, (len(x), TOKENS, 3))
        plain = velocity(x, places, 1.0)
        columns = [np.asarray(jnp.mean((plain - (noise - x0)) ** 2, (1, 2)))]
        whole = velocity(x, places, GUIDANCE)
        for density in DENSITIES:
            chosen = draw_subset(subset_key, whole, round(density * TOKENS))
            given, wanted = (jnp.take_along_axis(y, chosen[:, :, None], axis=1) for y in (x, whole))
            u = velocity(given, positions(chosen, GRID), GUIDANCE)
            variance = jnp.var(wanted, axis=(1, 2))
            columns.append(np.asarray(jnp.mean((u - wanted) ** 2, (1, 2)) / variance))
        results.append(np.stack(columns, axis=1))
    return np.concatenate(results)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--checkpoint", nargs="+", default=["tiny"])
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.7, 0.88, 0.93, 0.96, 0.98, 1])
    args = parser.parse_args()
    shares = " | ".join(f"{density:.0%} of the tokens" for density in DENSITIES)
    print(f"| checkpoint | sigma | all tokens | {shares} |\n|---|---|---|{'---|' * len(DENSITIES)}")
    for checkpoint in args.checkpoint:
        params = jitjax.load(checkpoint)
        for sigma in args.sigmas:
            figures = errors(params, args.scenes, sigma)
            cells = " | ".join(f"{x:.4f}" for x in figures.mean(0))
            print(f"| {Path(checkpoint).name} | {sigma:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
