"""Judges samplers on a Gaussian field, whose exact flow and distribution are known.

    python -m benchmarks.gaussian
    python -m benchmarks.gaussian --exponents 3 --pictures 16 --out gaussian.jsonl

`jitjax.jit_solve` runs with the ideal velocity of the field on any set of tokens as its network,
and with the identity as its noise. That gives the sampler's linear map, and so the distribution of
its pictures without drawing one. Rows of the table are plans; its columns:

    tokens       evaluations of all tokens that would cost the same: 50 for 50 dense steps
    wasserstein  squared Wasserstein distance of the pictures' distribution to the field's, over the
                 field's variance; 0 is perfect, and lower is better
    spectral     the part of it that the spectrum alone shows
    variance     variance of the pictures over the field's; below 1 they are too flat
    low ... high power over the field's at 0 to 2, 3 to 6, and above 6 waves per picture;
                 a low "high" means blurred pictures
    distance     root mean square distance to the converged picture of the same noise, in standard
                 deviations of the field

A linear map needs anchors that do not depend on the picture, so new ones are those of the fixed
grid. With --pictures P, plans with the presets' activation by importance are added: from P pictures
of 16 channels each, compared with the fixed grid's pictures of the same noise, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Before NumPy is imported: on a busy machine its threads wait for each other, 50 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

import jitjax
from benchmarks.gaussian_field import Field, LinearMap, Scores, ideal_velocity, score_pictures
from jitjax.sampler.anchors import first_anchors
from jitjax.sampler.schedule import Shift, plan_sigmas

FLUX_SHIFT = Shift(False, 0.5, 1.15, 256, 4096, shift=math.exp(1.15))
"""FLUX.1-dev's schedule at 1024 x 1024 pixels (mu = 1.15), for a grid of any size."""

CHANNELS = 16
"""Independent fields per picture where anchors are chosen by importance."""

SOLVERS = ("euler", "multistep")
"""Values of `Plan.solver` that every plan is judged with."""

jitted_first_anchors = jax.jit(
    first_anchors, static_argnums=(1, 2), static_argnames=("layout", "fill")
)
"""`first_anchors` as one program, instead of one for each of its operations."""

BANDS = {"low": (0, 2), "mid": (3, 6), "high": (7, None)}
"""First and last frequency of each band, in whole waves per picture."""


def solve(
    field: Field,
    plan: jitjax.Plan,
    noise: np.ndarray,
    *,
    microflow_noise: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Run `jit_solve` in float64 with the field's ideal velocity.

    Args:
        field: the field.
        plan: the plan; its "shifted" schedule is FLUX's with mu = 1.15.
        noise: initial noise, [b, n, d]; the channels share their anchors, and all of the batch the
            first ones.
        microflow_noise: noise of a micro-flow with "fresh" noise, [b, n, d].
        seed: seed of the first anchors' random fill, and of random activation.

    Returns:
        The pictures, [b, n, d].
    """
    budget = plan.budgets(field.tokens)[0]
    anchors = scores = None
    with jax.enable_x64(True):
        if budget < field.tokens:
            fill, activation = jax.random.split(jax.random.key(seed))
            anchors = jitted_first_anchors(
                fill, field.grid, budget, layout=plan.first, fill=plan.fill
            )
            scores = jax.random.uniform(activation, (field.tokens,))
            anchors, scores = (
                jnp.broadcast_to(x, (noise.shape[0], *x.shape)) for x in (anchors, scores)
            )
        pictures = jitjax.jit_solve(
            ideal_velocity,
            jnp.asarray(noise),
            jnp.asarray(plan_sigmas(plan, field.tokens, FLUX_SHIFT)),
            plan=plan,
            grid=field.grid,
            first_anchors=anchors,
            microflow_noise=None if microflow_noise is None else jnp.asarray(microflow_noise),
            random_scores=scores,
            args=jnp.asarray(field.offsets),
        )
    return np.asarray(pictures)


def has_fresh_noise(plan: jitjax.Plan, tokens: int) -> bool:
    """Whether the pictures depend on the micro-flow's own noise."""
    sparse = plan.budgets(tokens)[0] < tokens
    return sparse and plan.microflow != "none" and plan.microflow_noise == "fresh"


def linear_map(field: Field, plan: jitjax.Plan, *, seed: int = 0) -> LinearMap:
    """Compute the sampler's map from noise to pictures; its `scores()` are exact.

    Args:
        field: the field.
        plan: the plan.
        seed: seed of the anchors.

    Raises:
        ValueError: the plan chooses anchors by the picture, so that it has no linear map.
    """
    n = field.tokens
    if plan.activation == "importance" and plan.budgets(n)[0] < n:
        raise ValueError('Plan.activation is "importance"; expected "grid" or "random"')
    identity = np.eye(n)
    if not has_fresh_noise(plan, n):
        return LinearMap(field, solve(field, plan, identity[None], seed=seed)[0])
    nothing = np.zeros((n, n))
    pictures = solve(
        field,
        plan,
        np.concatenate([identity, nothing], axis=1)[None],
        microflow_noise=np.concatenate([nothing, identity], axis=1)[None],
        seed=seed,
    )[0]
    return LinearMap(field, pictures[:, :n], pictures[:, n:])


def judge_by_pictures(
    field: Field, plan: jitjax.Plan, *, pictures: int, seed: int = 0
) -> tuple[Scores, dict[str, float]]:
    """Score a plan whose anchors depend on the picture, beside the same plan with the fixed grid.

    Args:
        field: the field.
        plan: the plan.
        pictures: number of pictures of 16 channels, at least 2.
        seed: seed of the noises and the anchors.

    Returns:
        What `score_pictures` returns.
    """
    reference = linear_map(field, plan.replace(activation="grid"), seed=seed)
    random = np.random.default_rng(seed)
    shape = (pictures, field.tokens, CHANNELS)
    noise = random.standard_normal(shape)
    fresh = None if reference.fresh is None else random.standard_normal(shape)
    result = solve(field, plan, noise, microflow_noise=fresh, seed=seed)
    return score_pictures(reference, result, noise, fresh)


def plans() -> Iterator[tuple[str, jitjax.Plan]]:
    """Yield the plans of the table with their names."""
    for schedule, steps in (("shifted", (50, 28, 11, 7)), ("beta", (50, 28, 11, 7))):
        name = "FLUX's sigmas" if schedule == "shifted" else "Beta sigmas"
        for count in steps:
            yield f"dense {count}, {name}", jitjax.Plan(count, schedule=schedule)
    variants = {
        "blend + fresh (as released)": {},
        "blend + initial": {"microflow_noise": "initial"},
        "hit": {"microflow": "hit", "microflow_noise": "initial"},
        "no micro-flow": {"microflow": "none"},
        "blend + fresh, no lift": {"lift": "none"},
    }
    for name in ("4x", "7x"):
        for label, changes in variants.items():
            yield f"{name}, {label}", jitjax.PLANS[name].replace(activation="grid", **changes)


def token_evaluations(plan: jitjax.Plan, tokens: int) -> float:
    """Return the number of evaluations of all tokens that evaluate as many tokens as the plan."""
    ends = (0, *plan.stage_steps)
    steps = np.diff(ends)
    return float(steps @ np.array(plan.budgets(tokens)) / tokens)


def make_rows(
    field: Field, solvers: Sequence[str], pictures: int, seed: int
) -> Iterator[dict[str, object]]:
    """Yield the table's rows; those of plans by importance follow the fixed grid's."""
    for name, paper_plan in plans():
        for solver in solvers:
            plan = paper_plan.replace(solver=solver)
            scores = linear_map(field, plan, seed=seed).scores()
            yield _row(field, name, plan, scores, {})
        if not pictures or len(paper_plan.densities) == 1:
            continue
        for solver in solvers:
            plan = paper_plan.replace(solver=solver, activation="importance")
            scores, half_widths = judge_by_pictures(field, plan, pictures=pictures, seed=seed)
            yield _row(field, f"{name}, importance", plan, scores, half_widths)


def _row(
    field: Field, name: str, plan: jitjax.Plan, scores: Scores, half_widths: dict[str, float]
) -> dict[str, object]:
    return {
        "exponent": field.exponent,
        "side": field.side,
        "plan": name,
        "solver": plan.solver,
        "tokens": round(token_evaluations(plan, field.tokens), 2),
        **dataclasses.asdict(scores),
        **band_ratios(field, scores),
        "half_widths": half_widths,
    }


def band_ratios(field: Field, scores: Scores) -> dict[str, float]:
    """Return the power of the pictures over the field's in each of `BANDS`."""
    truth = field.true_spectrum
    power = truth * np.array(scores.spectrum)
    ratios = {}
    for name, (first, last) in BANDS.items():
        band = slice(first, None if last is None else last + 1)
        ratios[name] = float(power[band].sum() / truth[band].sum())
    return ratios


COLUMNS = ("tokens", "wasserstein", "spectral", "variance", *BANDS, "distance")


def format_heading(field: Field) -> str:
    """Format the lines above a field's rows."""
    title = f"{field.side} x {field.side} tokens, spectrum 1/(k^2 + 1)^({field.exponent:g}/2)"
    cells = [f"{'plan':44s}", f"{'solver':9s}", *(f"{name:>6s}" for name in COLUMNS)]
    return f"\n{title}\n\n| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def format_row(row: dict) -> str:
    """Format a row for the terminal and for Markdown."""
    cells = [f"{row['plan']:44s}", f"{row['solver']:9s}"]
    for name in COLUMNS:
        digits = 4 if name in ("wasserstein", "spectral") else 1 if name == "tokens" else 3
        text = f"{row[name]:.{digits}f}"
        if name in row["half_widths"]:
            text += f" ± {row['half_widths'][name]:.{digits}f}"
        cells.append(f"{text:>{max(6, len(name))}s}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table per exponent, and write its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--side", type=int, default=24, help="rows, and columns, of tokens (default: 24)"
    )
    parser.add_argument(
        "--exponents", type=float, nargs="+", default=[2.5, 3, 4], metavar="A",
        help="exponents a of the spectrum (k^2 + 1)^(-a/2), (default: 2.5 3 4)",
    )  # fmt: skip
    parser.add_argument(
        "--solvers",
        nargs="+",
        default=SOLVERS,
        choices=SOLVERS,
        help="solvers of every plan (default: both)",
    )
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="P",
        help="pictures of the plans by importance, 2 or more (default: 0, without these plans)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of anchors and pictures")
    parser.add_argument("--out", type=Path, help="file for the rows, as lines of JSON")
    args = parser.parse_args()
    if args.side < 12:
        parser.error(f"--side is {args.side}; expected at least 12, for the highest band")
    if args.pictures == 1 or args.pictures < 0:
        parser.error(f"--pictures is {args.pictures}; expected 0, or 2 or more")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out is {args.out}; expected a file in a folder that exists")
    try:
        fields = [Field(args.side, exponent) for exponent in args.exponents]
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    rows = []
    for field in fields:
        print(format_heading(field))
        for row in make_rows(field, args.solvers, args.pictures, args.seed):
            print(format_row(row), flush=True)
            rows.append(row)
    if args.out:
        args.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
