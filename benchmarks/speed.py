"""Measures the transformer and whole plans: seconds, FLOP/s, compilation time and memory.

    python -m benchmarks.speed                               GPU: flux-dev; CPU: tiny and middle
    python -m benchmarks.speed --out speed.jsonl --minutes 5            rows as JSON lines too
    python -m benchmarks.speed --model middle --size 512 --plans 4x 7x  a few minutes on a CPU
    python -m benchmarks.speed --model flux-dev --plans --profile kernels.txt

Models: "flux-dev" has the size of FLUX.1-dev and random weights, made on the device (24 GB in
bfloat16); "middle" is a small FLUX (6 blocks of width 512), also random; "tiny" is the bundled
checkpoint. One sample, warm medians. Rows come in this order, and each is written as soon as it is
known, so a run that is cut short keeps what it has:

    matmul    the rate of a large matrix product, what the device can reach in this run
    forward   one evaluation of the transformer, at each number of image tokens that a plan uses
    plan      a plan from noise to clean tokens; those of few steps first
    speed-up  a plan against "dense", and the speed-up that its FLOPs allow
    solver    the first stage of a plan with diffrax, against a loop by hand

Fields of these rows (times in seconds):

    seconds          median of all rounds; "lowest" and "highest" are their range
    compile          tracing, lowering and compilation, less what the compilation cache gave; in a
                     plan, the first call less a warm one
    tflop            FLOPs by the formula of benchmarks.quality.flops, attention included
    xla_tflop        FLOPs by XLA's cost analysis, loops counted as often as they run; it has all
                     operations, the formula only matrix products. "agreement" is their quotient
    tflops_per_second, share    tflop over seconds; and that over the rate of the matrix product
    step_seconds, stage_seconds one step of each stage, and all of its steps, in a run that reports
                     every step
    outside          time of the same plan with a linear map of each token in the transformer's
                     place, over that of the plan: the share of lifter, gathers, importance,
                     micro-flow, solver and Python. On a GPU it is an upper bound: there Python runs
                     ahead of the device
    unexplained      the rest: 1 - outside - the evaluations, timed alone
    peak_gb          peak of the device's memory up to this row; on a CPU, of the process's
    speedup, bound   seconds of "dense" over those of the plan; the quotient of their FLOPs
    ratio            seconds with diffrax over seconds by hand, the median of turns
    linear_cost      the same difference with the linear map, where it is not lost in the noise,
                     over the seconds by hand with the transformer
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jitjax
from benchmarks.kernels import kernels
from benchmarks.quality import flops
from benchmarks.solver_loop import stage_pair
from benchmarks.speed_models import CHECKPOINT, MODELS, SIDES, Bench
from benchmarks.timing import (
    device_info,
    matmul_rate,
    measure_in_turns,
    peak_gb,
    timing_of,
)
from jitjax.denoise import plan_for_device
from jitjax.models.attention import IMPLEMENTATIONS
from jitjax.models.quantised import KINDS

PLANS = ("dense", "4x", "7x")
LINEAR_ROUNDS = 20
"""Rounds of what costs milliseconds, at the least."""


class Report:
    """Prints rows and appends them to a file of JSON lines.

    Args:
        path: the file, if any.
        as_json: whether to print JSON, too.
        info: fields of all rows that are not printed as text.
    """

    def __init__(self, path: Path | None, as_json: bool, info: dict[str, Any]):
        self.path, self.as_json, self.info = path, as_json, info

    def __call__(self, row: dict[str, Any], **more: Any) -> None:
        """Write a row; `more` are fields that are not printed as text either."""
        line = json.dumps(row | more | self.info)
        print(line if self.as_json else as_text(row), flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")


def as_text(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""

    def value(x: Any) -> str:
        if isinstance(x, list):
            return ", ".join(map(value, x))
        return f"{x:.4g}" if isinstance(x, float) else str(x)

    fields = dict(row)
    title = " ".join(str(fields.pop(name)) for name in ("row", "plan", "tokens") if name in fields)
    return f"{title:14} " + "  ".join(f"{name} {value(x)}" for name, x in fields.items())


def step_times(plan: jitjax.Plan, call: Callable[..., Any]) -> tuple[list[float], list[float]]:
    """Run a plan and time its steps.

    Args:
        plan: the plan.
        call: runs it, and passes `progress` on.

    Returns:
        Seconds of one step of each stage, the median; and that times the stage's steps. The first
        step of a stage, before which anchors are activated, does not count unless it is the only
        one.
    """
    # Compiled by a first run: steps that end while the next stage is compiled are reported late.
    jax.block_until_ready(call(progress=lambda _: None))
    times = [time.perf_counter()]
    jax.block_until_ready(call(progress=lambda _: times.append(time.perf_counter())))
    steps, start = [], 0
    for end in plan.stage_steps:
        stage = np.diff(times)[start:end]
        steps.append(float(np.median(stage[1:] if len(stage) > 1 else stage)))
        start = end
    counts = np.diff([0, *plan.stage_steps])
    return steps, [step * int(count) for step, count in zip(steps, counts, strict=True)]


class Measurement:
    """The rows of one model at one size.

    Args:
        args: arguments of the command line.
        bench: the model and its inputs.
        matmul_speed: FLOP/s of the large matrix product.
        report: where rows go.
    """

    def __init__(self, args: argparse.Namespace, bench: Bench, matmul_speed: float, report: Report):
        self.args, self.bench, self.report = args, bench, report
        self.matmul_speed = matmul_speed
        self.plans = {name: plan_for_device(jitjax.PLANS[name], args.dtype) for name in args.plans}
        self.slots = {
            name: flops.slots(plan, bench.tokens, bench.text) for name, plan in self.plans.items()
        }
        self.evaluations: dict[int, tuple[float, float]] = {}  # tokens -> seconds, XLA's FLOPs
        self.plan_seconds: dict[str, float] = {}

    def rows(self) -> list[Callable[[], None]]:
        """Return functions that measure and write the rows, in order."""
        counts = {self.bench.tokens, *(count for run in self.slots.values() for count in run)}
        rows = [partial(self.forward, count) for count in sorted(counts, reverse=True)]
        sparse = [name for name, slots in self.slots.items() if slots[0] < self.bench.tokens]
        by_steps = sorted(self.plans, key=lambda name: len(self.slots[name]))
        rows += [partial(self.plan, name) for name in by_steps]
        if "dense" in self.plans:
            rows += [partial(self.speedup, name) for name in by_steps if name != "dense"]
        return rows + [partial(self.solver, name) for name in sparse[:1]]

    def _speed(self, operations: float, seconds: float) -> dict[str, float]:
        speed = operations / seconds
        return {"tflops_per_second": speed / 1e12, "share": speed / self.matmul_speed}

    def _flops(self, operations: float, by_xla: float) -> dict[str, float]:
        return {
            "tflop": operations / 1e12,
            "xla_tflop": by_xla / 1e12,
            "agreement": by_xla / operations,
        }

    def forward(self, count: int) -> None:
        """Measure one evaluation with `count` image tokens."""
        call, compile_seconds = self.bench.forward(count)
        assert bool(jnp.isfinite(call()).all()), "the velocity is not finite"
        seconds = measure_in_turns([call], self.args.rounds, self.args.row_seconds)
        timing = timing_of(seconds)
        by_xla = self.bench.forward_flops(count)
        operations = flops.forward(self.bench.config, count, self.bench.text)
        self.evaluations[count] = timing.median, by_xla
        row = {"row": "forward", "tokens": count, **timing.row(), "compile": compile_seconds}
        row |= self._flops(operations, by_xla) | self._speed(operations, timing.median)
        self.report(row | {"peak_gb": peak_gb()}, rounds=len(seconds), load=os.getloadavg()[0])

    def plan(self, name: str) -> None:
        """Measure a plan, in turns with the same plan without a transformer."""
        plan, slots = self.plans[name], self.slots[name]
        call, linear = self.bench.plan(plan), self.bench.linear_plan(plan)
        start = time.perf_counter()
        tokens = jax.block_until_ready(call())
        first_seconds = time.perf_counter() - start
        assert bool(jnp.isfinite(tokens).all()), f"{name}: the result is not finite"
        jax.block_until_ready(linear())
        # Several of the short ones follow each long one, which leaves caches full of its own data.
        turns = [call, *[linear] * 3]
        rounds = max(3, self.args.rounds // 2)
        seconds = measure_in_turns(turns, rounds, self.args.row_seconds)
        timing = timing_of(seconds[:, 0])
        outside = float(np.median(seconds[:, 1:])) / timing.median
        self.plan_seconds[name] = timing.median
        evaluations, by_xla = (sum(self.evaluations[s][i] for s in slots) for i in (0, 1))
        operations = flops.run(self.bench.config, slots, self.bench.text)
        row = {"row": "plan", "plan": name, **timing.row()}
        row |= {"compile": max(0.0, first_seconds - timing.median)}
        row |= self._flops(operations, by_xla) | self._speed(operations, timing.median)
        if len(plan.stage_steps) == 1:
            row |= {"step_seconds": [timing.median / plan.steps], "stage_seconds": [timing.median]}
        else:
            steps, stages = step_times(plan, call)
            row |= {"step_seconds": steps, "stage_seconds": stages}
        row |= {"outside": outside, "unexplained": 1 - outside - evaluations / timing.median}
        self.report(row | {"peak_gb": peak_gb()}, rounds=len(seconds), load=os.getloadavg()[0])

    def speedup(self, name: str) -> None:
        """Compare a plan with "dense"."""
        speedup = self.plan_seconds["dense"] / self.plan_seconds[name]
        dense, this = (
            flops.run(self.bench.config, self.slots[n], self.bench.text) for n in ("dense", name)
        )
        row = {"row": "speed-up", "plan": name, "speedup": speedup, "bound": dense / this}
        self.report(row | {"share_of_bound": speedup * this / dense})

    def solver(self, name: str) -> None:
        """Compare the solver with a loop by hand, on the first stage of a plan."""
        pair, linear = (stage_pair(self.bench, self.plans[name], linear=x) for x in (False, True))
        seconds = measure_in_turns(pair, self.args.rounds, self.args.row_seconds)
        ratios = seconds[:, 0] / seconds[:, 1]
        quick = measure_in_turns(linear, max(LINEAR_ROUNDS, self.args.rounds))
        by_hand = float(np.median(seconds[:, 1]))
        cost = float(np.median(quick[:, 0] - quick[:, 1]))
        row = {"row": "solver", "plan": name, "seconds": float(np.median(seconds[:, 0]))}
        row |= {"by_hand": by_hand, "ratio": float(np.median(ratios))}
        row |= {"lowest": float(ratios.min()), "highest": float(ratios.max())}
        row |= {"linear_cost": cost / by_hand}
        self.report(row, rounds=len(seconds), load=os.getloadavg()[0])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--json", action="store_true", help="print JSON lines instead of text")
    p.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    p.add_argument("--model", nargs="+", choices=list(MODELS), help="(default: by platform)")
    p.add_argument("--size", type=int, nargs="+",
                   help="sides in pixels (default: 1024; 512 and 1024 for tiny)")  # fmt: skip
    p.add_argument("--text", type=int, help="text tokens (default: 512; 48 for tiny)")
    p.add_argument("--dtype", help="of the weights (default: bfloat16; float32 on a CPU)")
    p.add_argument("--quantise", choices=KINDS, help="quantise the weights (default: they are not)")
    p.add_argument("--attention", default="auto", choices=IMPLEMENTATIONS)
    p.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(jitjax.PLANS),
                   metavar="PLAN", help="(default: dense 4x 7x) none: only the transformer"
                   )  # fmt: skip
    p.add_argument("--rounds", type=int, default=5, help="timed calls per row (default: 5)")
    p.add_argument("--matmul", type=int, help="side of the matrices (default: 8192; CPU: 2048)")
    p.add_argument("--minutes", type=float, default=60, help="start no row later (default: 60)")
    p.add_argument("--row-seconds", type=float, default=300,
                   help="fewer rounds if a row would take longer, at least one (default: 300)"
                   )  # fmt: skip
    p.add_argument("--profile", type=Path, help="append a profile of one dense evaluation")
    return p


def main() -> None:
    """Print a row per measurement."""
    args = make_parser().parse_args()
    start, on_cpu = time.perf_counter(), jax.default_backend() == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    models = args.model or ([CHECKPOINT, "middle"] if on_cpu else ["flux-dev"])
    info = {"dtype": args.dtype, "attention": args.attention, **device_info()}
    if args.quantise:
        info["quantise"] = args.quantise
    size = args.matmul or (2048 if on_cpu else 8192)
    matmul_speed = matmul_rate(args.dtype, size, calls=1 if on_cpu else 20)
    report = Report(args.out, args.json, info)
    if not args.json:
        print(", ".join(f"{name} {value}" for name, value in info.items()))
    report({"row": "matmul", "side": size, "tflops_per_second": matmul_speed / 1e12})
    for model in models:
        for side in args.size or SIDES[model]:
            if not args.json:
                print(f"{model} at {side} px")
            bench = Bench(model, side, args.text, args.dtype, args.attention, args.quantise)
            report = Report(args.out, args.json, {"model": model, "size": side, **info})
            for write_row in Measurement(args, bench, matmul_speed, report).rows():
                if time.perf_counter() - start > 60 * args.minutes:
                    return
                write_row()
            if args.profile:
                table = f"{model} at {side} px: {kernels(bench.forward(bench.tokens)[0])}"
                with args.profile.open("a") as file:
                    file.write(table + "\n")
                if not args.json:
                    print(table, flush=True)


if __name__ == "__main__":
    main()
