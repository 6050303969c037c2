"""Measures how often images of a single object are right, for several plans.

    python -m benchmarks.single_object                       the plans dense, 4x and 7x
    python -m benchmarks.single_object --plans 4x 4x:microflow=blend

Prompts name colour, shape and size of a combination that was held out from training. An image is
right when `benchmarks.checker` detects one object with all three. All plans use the same prompts
and keys. Intervals are 95 % Wilson score intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

import jitjax
from benchmarks.checker import check
from benchmarks.quality.methods import parse_plan
from jitjax.sampler.plan import Plan
from training.scenes import Scene, evaluation_prompts


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of the share `right / n`; `z` is the normal quantile."""
    p, scale = right / n, 1 + z**2 / n
    middle = (p + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def sample_images(
    params: jitjax.FluxParams,
    prompts: list[tuple[str, Scene, int]],
    plan: Plan,
    side: int,
    batch: int,
    bar: tqdm,
) -> np.ndarray:
    """Sample an image for each prompt, in batches of one size.

    Args:
        params: parameters of the pipeline.
        prompts: (prompt, scene, seed) for each image; the image's key is made from the seed.
        plan: the plan to sample with.
        side: side of the images in pixels.
        batch: images per batch.
        bar: progress bar, updated by the number of images.

    Returns:
        float32 [len(prompts), side, side, 3] in [0, 1].
    """
    batches = []
    for start in range(0, len(prompts), batch):
        # Fill up the last batch: another batch size would compile again.
        batch_prompts = (prompts[start : start + batch] * batch)[:batch]
        keys = jnp.stack([jax.random.key(seed) for _, _, seed in batch_prompts])
        texts = [text for text, _, _ in batch_prompts]
        images = jitjax.sample(params, texts, key=keys, height=side, width=side, plan=plan)
        batches.append(np.asarray(images)[: len(prompts) - start])
        bar.update(len(batches[-1]))
    return np.concatenate(batches)


def main() -> None:
    """Print a table row per plan; optionally write the results and a contact sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", nargs="+", default=["dense", "4x", "7x"])
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--count", type=int, default=120, help="prompts (default: 120)")
    parser.add_argument("--skip", type=int, default=0, help="skip the first prompts (default: 0)")
    parser.add_argument("--seed", type=int, default=2026, help="for the prompts (default: 2026)")
    parser.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--sheet", type=Path, help="PNG with a row of eight images per plan")
    args = parser.parse_args()
    try:
        plans = {text: parse_plan(text) for text in args.plans}
    except ValueError as error:
        parser.error(str(error))
    params = jitjax.load(args.checkpoint)
    prompts = evaluation_prompts(args.skip + args.count, args.seed)[args.skip :]
    rows, sheet_rows = {}, []
    print("| plan | right | 95 % | colour | shape | size | one object | s per image |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, plan in plans.items():
        start = time.perf_counter()
        with tqdm(total=len(prompts), desc=name, unit="image") as bar:
            images = sample_images(params, prompts, plan, args.side, args.batch, bar)
        seconds = (time.perf_counter() - start) / len(prompts)
        results = [
            check(image, scene) for image, (_, scene, _) in zip(images, prompts, strict=True)
        ]
        columns = ("right", "colour", "shape", "size", "count")
        shares = {c: float(np.mean([r[c] for r in results])) for c in columns}
        low, high = wilson_interval(sum(r["right"] for r in results), len(results))
        rows[name] = shares | {"low": low, "high": high, "seconds": seconds}
        rows[name]["pictures"] = [r["right"] for r in results]  # for paired comparisons
        other_shares = " | ".join(f"{shares[column]:.0%}" for column in columns[1:])
        print(
            f"| {name} | {shares['right']:.1%} | {low:.0%} to {high:.0%} | {other_shares} "
            f"| {seconds:.2f} |",
            flush=True,
        )
        stride = max(1, args.side // 128)
        sheet_rows.append(np.concatenate(list(images[:8, ::stride, ::stride]), axis=1))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.sheet:
        Image.fromarray((np.concatenate(sheet_rows) * 255).round().astype(np.uint8)).save(
            args.sheet
        )


if __name__ == "__main__":
    main()
