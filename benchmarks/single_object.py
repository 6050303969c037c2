"""How many pictures of one object come out right, per plan.

    python -m benchmarks.single_object                       the three named plans
    python -m benchmarks.single_object --plans 4x 4x:microflow=blend

Prompts are unseen in training and name colour, shape and size; a picture is right when the exact
checker (`benchmarks.checker`) finds one object with all three. All plans get the same prompts and
the same keys. The 95 % intervals are Wilson's.
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


def interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `right` in `n`."""
    p, scale = right / n, 1 + z**2 / n
    middle = (p + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def pictures(
    params: jitjax.FluxParams,
    prompts: list[tuple[str, Scene, int]],
    plan: Plan,
    side: int,
    batch: int,
    bar: tqdm,
) -> np.ndarray:
    """Pictures [n, side, side, 3] of the prompts, each from the key of its own seed."""
    made = []
    for start in range(0, len(prompts), batch):
        # The last batch is filled up, so that all are one compiled program.
        part = (prompts[start : start + batch] * batch)[:batch]
        keys = jnp.stack([jax.random.key(seed) for _, _, seed in part])
        texts = [text for text, _, _ in part]
        images = jitjax.sample(params, texts, key=keys, height=side, width=side, plan=plan)
        made.append(np.asarray(images)[: len(prompts) - start])
        bar.update(len(made[-1]))
    return np.concatenate(made)


def main() -> None:
    """Print a row per plan; optionally write the figures and a contact sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", nargs="+", default=["dense", "4x", "7x"])
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--count", type=int, default=120, help="prompts (default: 120)")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first ones")
    parser.add_argument("--seed", type=int, default=2026, help="of the prompts (default: 2026)")
    parser.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--sheet", type=Path, help="PNG: a row of eight pictures for each plan")
    args = parser.parse_args()
    try:
        plans = {text: parse_plan(text) for text in args.plans}
    except ValueError as error:
        parser.error(str(error))
    params = jitjax.load(args.checkpoint)
    prompts = evaluation_prompts(args.skip + args.count, args.seed)[args.skip :]
    rows, sheet = {}, []
    print("| plan | right | 95 % | colour | shape | size | one object | s per picture |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, plan in plans.items():
        start = time.perf_counter()
        with tqdm(total=len(prompts), desc=name, unit="picture") as bar:
            images = pictures(params, prompts, plan, args.side, args.batch, bar)
        seconds = (time.perf_counter() - start) / len(prompts)
        results = [
            check(image, scene) for image, (_, scene, _) in zip(images, prompts, strict=True)
        ]
        parts = ("right", "colour", "shape", "size", "count")
        share = {part: float(np.mean([r[part] for r in results])) for part in parts}
        low, high = interval(sum(r["right"] for r in results), len(results))
        rows[name] = share | {"low": low, "high": high, "seconds": seconds}
        rows[name]["pictures"] = [r["right"] for r in results]  # for paired comparisons
        others = " | ".join(f"{share[part]:.0%}" for part in parts[1:])
        print(
            f"| {name} | {share['right']:.1%} | {low:.0%} to {high:.0%} | {others} "
            f"| {seconds:.2f} |",
            flush=True,
        )
        step = max(1, args.side // 128)
        sheet.append(np.concatenate(list(images[:8, ::step, ::step]), axis=1))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.sheet:
        Image.fromarray((np.concatenate(sheet) * 255).round().astype(np.uint8)).save(args.sheet)


if __name__ == "__main__":
    main()
