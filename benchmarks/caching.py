"""Tries what JiT may gain by keeping results of earlier steps, on two judges.

    python -m benchmarks.caching                              the Gaussian judge; two minutes
    python -m benchmarks.caching --checkpoint tiny --prompts 12 --split dev
    python -m benchmarks.caching --checkpoint FOLDER --out rows.jsonl

Three things are tried, beside dense steps of the same solver and about the same cost:

    history   the multistep solver's history, kept over a transition or started anew in each stage
    steps     fewer steps in the sparse stages of `4x` and `7x`, and more in the dense one; with
              "ended at 0.45" the sparse stages also end earlier, at sigma 0.96 to 0.99
    change    dense steps (D) and sparse ones (s) on fixed anchors, which lift the *change* of the
              prediction since the last dense step and add it to that step's prediction

The change is "sparse - sparse" if the anchors' prediction is compared with what the network says
of the anchors alone at the last dense step, which costs one more sparse evaluation per dense one,
or "sparse - dense" if it is compared with what the dense step said of them. With "sparse - kept"
the anchors see the other tokens too, as they were at the dense step (Gaussian judge only).

Columns of the Gaussian judge are those of `benchmarks.gaussian`. On a checkpoint, `PSNR` is to 50
dense steps from the same noise, `against` its difference to the dense plan of the group with a
paired 95 % interval, and `right` counts pictures that fit their prompt. `cost` is in evaluations
of all tokens: by tokens on the Gaussian judge, by operations on a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before NumPy is imported, as in `benchmarks.gaussian`.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import betaincinv

import jitjax
from benchmarks.caching_sampler import CachingPlan, solve, with_steps
from benchmarks.gaussian import jitted_first_anchors, linear_map, token_evaluations
from benchmarks.gaussian_field import Field, LinearMap, ideal_velocity
from benchmarks.quality import flops
from benchmarks.quality.judging import judge_image, similarity
from benchmarks.quality.prompts import SPLITS, prompts
from benchmarks.quality.scores import interval
from jitjax.latents import draw_noise, token_grid
from jitjax.sampler.grid import Grid
from jitjax.sampler.solvers import MeanVelocitySolver, Multistep
from jitjax.velocity import FluxVelocity

REFERENCE = jitjax.Plan(50, schedule="shifted")
"""The plan whose pictures PSNR compares with."""

GUIDANCE = 3.5

TUNED = 1.0, 0.3
"""Parameters of the Beta quantiles of the tuned sigmas, chosen on the Gaussian judge."""

SHARE = 0.45
"""Share of the presets' sparse steps after which the short stages end: at sigma 0.96 to 0.99."""


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        group: evaluations of all tokens that the row's group may cost; its first row is dense.
        tried: "dense", "history", "steps" or "change".
        name: name of the row.
        plan: the plan.
    """

    group: int
    tried: str
    name: str
    plan: jitjax.Plan | CachingPlan


def rows() -> Iterator[Row]:
    """Yield the rows of both judges, the group's dense plan first."""
    stages = {7: [(3, 2, 5), (1, 1, 6)], 11: [(4, 4, 8), (2, 2, 10)]}
    short_stages = {7: (2, 1, 6), 11: (2, 2, 10)}
    changes = {
        7: [
            CachingPlan("DsDsDsDsDD", compare_with="dense"),
            CachingPlan("DsDsDsDsDD", compare_with="kept"),
            CachingPlan("DsDsDsDsDD"),
            CachingPlan("DsDsDsDsDD", prediction="velocity"),
            CachingPlan("DsDsDsDsDD", forecast="linear"),
            CachingPlan("DsDsDsDsDD", density=0.125),
            CachingPlan("DsDsDsDDD"),
        ],
        11: [
            CachingPlan("DsDsDsDsDDDDDD", compare_with="dense"),
            CachingPlan("DsDsDsDsDsDsDD"),
            CachingPlan("DsDsDsDsDDDDD"),
            CachingPlan("DssDssDssDssDDDD"),
        ],
    }
    for group, preset in ((7, "7x"), (11, "4x")):
        for steps in (group, group - 1, group + 1):
            yield Row(group, "dense", f"dense {steps}", jitjax.Plan(steps, solver="multistep"))
        plan = jitjax.PLANS[preset].replace(
            microflow="hit", microflow_noise="initial", solver="multistep"
        )
        anew = plan.replace(solver=MeanVelocitySolver(Multistep()))
        before = tuple(np.diff((0, *plan.stage_steps)).tolist())
        yield Row(group, "history", f"`{preset}` {_joined(before)}, kept", plan)
        yield Row(group, "history", f"`{preset}` {_joined(before)}, started anew", anew)
        for counts in stages[group]:
            yield Row(group, "steps", f"`{preset}` {_joined(counts)}", with_steps(plan, counts))
        counts = short_stages[group]
        yield Row(
            group, "steps", f"`{preset}` {_joined(counts)}, ended at {SHARE}",
            with_steps(plan, counts, SHARE),
        )  # fmt: skip
        dense = jitjax.Plan(group, schedule=tuned_sigmas(group), solver="multistep")
        yield Row(group, "steps", f"dense {group}, tuned sigmas", dense)
        steps = group + 2
        short = plan.replace(
            steps=steps, densities=(1 / 3, 1.0), stage_ends=(3 / steps, 1.0),
            schedule=tuned_sigmas(steps),
        )  # fmt: skip
        name = f"3 steps at a third, {group - 1} dense, tuned sigmas"
        yield Row(group, "steps", name, short)
        for change in changes[group]:
            yield Row(group, "change", _name(change), change)


def tuned_sigmas(steps: int) -> tuple[float, ...]:
    """Return the Beta sigmas that suit short sparse stages and dense steps on the Gaussian judge.

    As `beta_sigmas`, but quantiles of Beta(1, 0.3): more steps near 1, and near 0.
    """
    quantiles = betaincinv(*TUNED, np.linspace(1, 0, steps))
    return tuple((1 / steps + (1 - 1 / steps) * quantiles).tolist())


def _joined(counts: tuple[int, ...]) -> str:
    return "+".join(map(str, counts))


def _name(plan: CachingPlan) -> str:
    words = [plan.steps, f"{plan.density:g}", f"sparse - {plan.compare_with}", plan.prediction]
    return ", ".join([*words, *(["forecast"] if plan.forecast == "linear" else [])])


def draw_anchors(plan: CachingPlan, grid: Grid, batch: int, seed: int) -> Int[Array, "b k"]:
    """Draw a plan's anchors: a strided layout, thinned at random; the same for all of a batch."""
    index = jitted_first_anchors(
        jax.random.key(seed), grid, plan.budget(grid[0] * grid[1]), layout="strided"
    )
    return jnp.broadcast_to(index, (batch, *index.shape))


@jax.jit
def field_velocity(
    tokens: Float[Array, "b m d"],
    positions: Int[Array, "b m 3"],
    sigma: Array,
    valid: None,
    args: tuple[Array, Array],
) -> Float[Array, "b m d"]:
    """Compute the ideal velocity of a field, also for tokens of different sigmas.

    Args:
        tokens, positions, valid: as in `ideal_velocity`.
        sigma: one sigma; or all tokens are given in row-major order, and one for each,
            [b, n, 1]. The noises of the tokens are independent, and each has one state only.
        args: `Field.offsets` and `Field.covariance`.
    """
    offsets, covariance = args
    if sigma.ndim == 0:
        return ideal_velocity(tokens, positions, sigma, valid, offsets)
    signal = 1 - sigma
    total = signal * covariance[None] * signal.mT + sigma**2 * jnp.eye(covariance.shape[0])[None]
    clean = covariance[None] @ (signal * jnp.linalg.solve(total, tokens))
    return (tokens - clean) / sigma


def field_map(field: Field, plan: CachingPlan, *, seed: int = 0) -> LinearMap:
    """Compute the map of a `CachingPlan` from noise to a field's pictures.

    Args:
        field: the field.
        plan: the plan.
        seed: seed of the anchors.
    """
    with jax.enable_x64(True):
        pictures = solve(
            field_velocity,
            jnp.eye(field.tokens)[None],
            plan,
            grid=field.grid,
            anchors=draw_anchors(plan, field.grid, 1, seed),
            args=(jnp.asarray(field.offsets), jnp.asarray(field.covariance)),
        )
    return LinearMap(field, np.asarray(pictures)[0])


def judge_on_field(field: Field, seed: int, row: Row) -> dict[str, Any]:
    """Return the row's cost and exact scores on a Gaussian field."""
    if isinstance(row.plan, CachingPlan):
        sampler = field_map(field, row.plan, seed=seed)
        cost = sum(row.plan.slots(field.tokens)) / field.tokens
    else:
        sampler = linear_map(field, row.plan.replace(activation="grid"), seed=seed)
        cost = token_evaluations(row.plan, field.tokens)
    scores = sampler.scores()
    return {
        "cost": cost,
        "wasserstein": scores.wasserstein,
        "variance": scores.variance,
        "distance": scores.distance,
    }


class PictureJudge:
    """Judges plans by a checkpoint's pictures.

    Args:
        params: the model's parameters.
        count: number of prompts, a multiple of 6.
        split: "dev" or "test".
        side: side of the pictures in pixels.
        batch: pictures per batch, a divisor of `count`.
        seed: seed of the anchors of a `CachingPlan`.
    """

    def __init__(
        self, params: jitjax.FluxParams, count: int, split: str, side: int, batch: int, seed: int
    ):
        self.params, self.batch, self.seed = params, batch, seed
        self.grid = token_grid(side, side, params.config)
        self.prompts = prompts(count // 6, split, seeds=1)
        self.velocity = jax.jit(FluxVelocity(params.config.transformer))
        self.reference = self.pictures(REFERENCE)
        self.dense: dict[int, np.ndarray] = {}

    def pictures(self, plan: jitjax.Plan | CachingPlan) -> np.ndarray:
        """Sample the pictures of all prompts; those of a prompt start from one noise."""
        batches = []
        for start in range(0, len(self.prompts), self.batch):
            part = self.prompts[start : start + self.batch]
            conditioning = jitjax.encode_prompt(self.params, [prompt.text for prompt in part])
            keys = jnp.stack([jax.random.key(prompt.seeds[0]) for prompt in part])
            keys = jax.vmap(jax.random.split)(keys)
            channels = self.params.config.transformer.out_channels
            noise = draw_noise(keys[:, 0], self.grid, channels)
            if isinstance(plan, CachingPlan):
                tokens = solve(
                    self.velocity,
                    noise,
                    plan,
                    grid=self.grid,
                    anchors=draw_anchors(plan, self.grid, len(part), self.seed),
                    args=(
                        self.params.transformer,
                        conditioning,
                        jnp.full((len(part),), GUIDANCE, jnp.float32),
                    ),
                )
            else:
                tokens = jitjax.denoise(
                    self.params, conditioning, noise, plan=plan, grid=self.grid,
                    guidance=GUIDANCE, key=keys[:, 1],
                )  # fmt: skip
            batches.append(np.asarray(jitjax.decode(self.params, tokens, grid=self.grid)))
        return np.concatenate(batches)

    def cost(self, plan: jitjax.Plan | CachingPlan) -> float:
        """Return the number of evaluations of all tokens that take as many operations."""
        config, text = self.params.config.transformer, self.params.config.text_length
        n = self.grid[0] * self.grid[1]
        slots = plan.slots(n) if isinstance(plan, CachingPlan) else flops.slots(plan, n, text)
        return flops.run(config, slots, text) / flops.forward(config, n, text)

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the row's cost and scores."""
        pictures = self.pictures(row.plan)
        pairs = zip(pictures, self.reference, strict=True)
        psnr = np.array([similarity(*pair)["psnr"] for pair in pairs])
        dense = self.dense.setdefault(row.group, psnr)
        verdicts = [
            judge_image(*pair)["right"] for pair in zip(pictures, self.prompts, strict=True)
        ]
        return {
            "cost": self.cost(row.plan),
            "psnr": float(psnr.mean()),
            "against": [float((psnr - dense).mean()), *interval(psnr - dense)],
            "right": sum(verdicts),
            "of": len(verdicts),
            "psnrs": psnr.tolist(),
        }


def format_row(row: dict[str, Any]) -> str:
    """Format a row for Markdown."""
    cells = [str(row["group"]), row["tried"], row["name"], f"{row['cost']:.2f}"]
    if "psnr" in row:
        mean, low, high = row["against"]
        against = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        cells += [f"{row['psnr']:.1f}", against, f"{row['right']} of {row['of']}"]
    else:
        digits = {"wasserstein": 4, "variance": 3, "distance": 3}
        cells += [f"{row[name]:.{n}f}" for name, n in digits.items()]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table, and write its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="name or folder; without it, the Gaussian judge")
    parser.add_argument(
        "--exponents", type=float, nargs="+", default=[3], metavar="A",
        help="exponents of the Gaussian field's spectrum (default: 3)",
    )  # fmt: skip
    parser.add_argument("--field-side", type=int, default=24, help="tokens per side (default: 24)")
    parser.add_argument(
        "--prompts", type=int, default=12, help="prompts, a multiple of 6 (default: 12)"
    )
    parser.add_argument("--split", default="dev", choices=SPLITS, help="of prompts (default: dev)")
    parser.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--batch", type=int, default=4, help="pictures per batch (default: 4)")
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[7, 11], choices=[7, 11],
        help="costs in evaluations of all tokens (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--tried", nargs="+", default=["history", "steps", "change"],
        choices=["history", "steps", "change"], help="what is tried (default: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of anchors")
    parser.add_argument("--out", type=Path, help="file for the rows, as lines of JSON")
    args = parser.parse_args()
    if args.prompts < 6 or args.prompts % 6:
        parser.error(f"--prompts is {args.prompts}; expected a multiple of 6")
    if args.prompts % args.batch:
        parser.error(f"--batch is {args.batch}; expected a divisor of {args.prompts} prompts")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out is {args.out}; expected a file in a folder that exists")
    judges: dict[str, Callable[[Row], dict[str, Any]]] = {}
    start = time.perf_counter()
    if args.checkpoint:
        judges[f"{args.checkpoint}, {args.prompts} prompts of {args.split}"] = PictureJudge(
            jitjax.load(args.checkpoint),
            args.prompts, args.split, args.side, args.batch, args.seed,
        )  # fmt: skip
        columns = ("cost", "PSNR", "against", "right")
    else:
        for exponent in args.exponents:
            field = Field(args.field_side, exponent)
            judges[f"Gaussian field, a = {exponent:g}"] = partial(judge_on_field, field, args.seed)
        columns = ("cost", "wasserstein", "variance", "distance")
    lines = []
    for title, judge in judges.items():
        print(f"\n{title}\n\n| {' | '.join(('group', 'tried', 'plan', *columns))} |")
        print(f"|{'---|' * (3 + len(columns))}")
        for row in rows():
            if row.group not in args.groups or row.tried not in ("dense", *args.tried):
                continue
            if args.checkpoint and getattr(row.plan, "compare_with", "") == "kept":
                continue  # the transformer takes one sigma per picture
            facts = {"judge": title, "group": row.group, "tried": row.tried, "name": row.name}
            facts |= judge(row)
            print(format_row(facts), flush=True)
            lines.append(f"{json.dumps(facts)}\n")
            if args.out:
                args.out.write_text("".join(lines))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
