"""Finds the best plan for a number of operations, on the Gaussian judge (`benchmarks.gaussian`).

    python -m benchmarks.plan_search table           the chosen plans beside the paper's; 2 minutes
    python -m benchmarks.plan_search families        sigma schedules of dense steps; a minute
    python -m benchmarks.plan_search scale           the chosen plans on coarse and fine grids
    python -m benchmarks.plan_search search --budgets 7 --side 12        a search; a minute each
    python -m benchmarks.plan_search table families scale --markdown docs/plans.md

A budget B is B times fewer operations than 50 dense steps: of FLUX.1-dev at 1024 pixels, 4096 image
and 512 text tokens, by `benchmarks.quality.flops`. A plan may exceed it by 1 %, as `7x` does.
"evaluations" in the tables are operations, in evaluations of all tokens.

The score of a plan is the geometric mean, over fields with the exponents 2.5, 3 and 4, of the
squared Wasserstein distance of its pictures' distribution to the field's, over its variance. So a
plan is not fitted to one spectrum. `distance` is to the converged picture of the same noise.

A search has the schedule's two parameters, the steps and the density of each sparse stage, and the
lift as its variables, for SciPy's differential evolution; the last stage gets all steps that the
budget has left. What it finds was rounded by hand to `CHOSEN` in `benchmarks/plan_choices.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gaussian_map import fast_linear_map  # isort: skip

import numpy as np

from benchmarks.gaussian import band_ratios, linear_map
from benchmarks.gaussian_field import Field, Scores
from benchmarks.plan_choices import CHOSEN
from benchmarks.plan_scores import (
    BUDGETS,
    EXPONENTS,
    METRICS,
    SOLVERS,
    allowed,
    evaluations,
    geometric_mean,
    judge,
    judge_dense,
    search_dense,
    search_free,
    search_jit,
)
from benchmarks.sigma_families import FAMILIES
from jitjax import PLANS, Plan
from jitjax.sampler.schedule import BETA_A, BETA_B


def scores(field: Field, plan: Plan) -> Scores:
    """Score a plan, by the fast map where it has one."""
    is_fast = len(plan.densities) == 1 or plan.microflow_noise != "fresh"
    return (fast_linear_map if is_fast else linear_map)(field, plan).scores()


def judged_plans(budget: float) -> Iterator[tuple[str, Plan]]:
    """Yield the names and plans of a budget's table."""
    steps = int(allowed(budget))
    yield f"dense {steps}, FLUX's sigmas, Euler", Plan(steps, schedule="shifted")
    yield f"dense {steps}, the program's Beta, Euler", Plan(steps)
    yield f"dense {steps}, the program's Beta", Plan(steps, solver="multistep")
    yield from CHOSEN[budget].items()
    paper = PLANS.get(f"{budget:g}x")
    if paper:
        grid = paper.replace(activation="grid")
        hit = grid.replace(microflow="hit", microflow_noise="initial")
        yield f"`{budget:g}x` as released", grid
        yield f"`{budget:g}x`, hit + initial", hit
        yield f"`{budget:g}x`, hit + initial, multistep", hit.replace(solver="multistep")


def table_lines(fields: Sequence[Field], budgets: Sequence[float]) -> Iterator[str]:
    """Yield the Markdown lines of the tables of chosen plans, one table per budget."""
    exponents = [f"a = {field.exponent:g}" for field in fields]
    for budget in budgets:
        yield f"\n{budget:g} times fewer operations, {50 / budget:.2f} evaluations:\n"
        heading = ["plan", "evaluations", *exponents, "mean", "high", "distance"]
        yield from _heading(heading)
        for name, plan in judged_plans(budget):
            judged = [scores(field, plan) for field in fields]
            parts = [x.wasserstein for x in judged]
            high = [band_ratios(field, x)["high"] for field, x in zip(fields, judged, strict=True)]
            cells = [
                name,
                f"{evaluations(plan):.2f}",
                *(f"{x:.5f}" for x in parts),
                f"**{geometric_mean(parts):.5f}**",
                f"{geometric_mean(high):.2f}",
                f"{geometric_mean([x.distance for x in judged]):.3f}",
            ]
            yield f"| {' | '.join(cells)} |"


def family_lines(fields: Sequence[Field], steps: Sequence[int], solver: str) -> Iterator[str]:
    """Yield the Markdown lines of the comparison of schedules for dense steps."""
    method = SOLVERS[solver]
    yield f"\nDense steps, {solver}; the score, and the best parameters of each family:\n"
    names = [f"{name} ({', '.join(family.parameters)})" for name, family in FAMILIES.items()]
    yield from _heading(
        ["steps", "the program's Beta", "Beta(0.5, 0.2)", *names, "all sigmas free"]
    )
    for count in steps:
        cells = [str(count)]
        for parameters in ((BETA_A, BETA_B), (0.5, 0.2)):
            sigmas = np.append(FAMILIES["beta"].sigmas(count, *parameters), 0)
            cells.append(f"{judge_dense(fields, sigmas, method):.2g}")
        best = (math.inf, np.empty(0))
        for family in FAMILIES.values():
            score, found = search_dense(fields, count, family, method)
            cells.append(f"{score:.2g} ({found[0]:.2f}, {found[1]:.2f})")
            best = min(best, (score, family.sigmas(count, *found)), key=lambda pair: pair[0])
        cells.append(f"{search_free(fields, count, method, best[1])[0]:.2g}")
        yield f"| {' | '.join(cells)} |"


def scale_lines(sides: Sequence[int], budgets: Sequence[float]) -> Iterator[str]:
    """Yield the Markdown lines of the chosen plans' scores on grids of several sizes.

    A finer grid of the same picture has a period of three times its side, as in the tables; a
    larger window of the same tokens has the period 72 of the 24 x 24 grid.
    """
    grids = [(side, 3 * side) for side in sides]
    grids += [(side, 72) for side in sides if side != 24]
    yield "\nMeans over the exponents, on other grids of the same picture and of the same tokens:\n"
    names = [f"{n} x {n}, same {'tokens' if period != 3 * n else 'picture'}" for n, period in grids]
    yield from _heading(["budget", "plan", *names])
    for budget in budgets:
        steps = int(allowed(budget))
        program = {f"dense {steps}, the program's Beta": Plan(steps, solver="multistep")}
        for name, plan in {**program, **CHOSEN[budget]}.items():
            cells = [f"{budget:g}", name]
            for side, period in grids:
                fields = [Field(side, exponent, period) for exponent in EXPONENTS]
                cells.append(f"{judge(fields, plan):.5f}")
            yield f"| {' | '.join(cells)} |"


def search_lines(
    fields: Sequence[Field],
    budgets: Sequence[float],
    families: Sequence[str],
    solvers: Sequence[str],
    stages: Sequence[int],
    metric: str,
) -> Iterator[str]:
    """Yield the Markdown lines of what searches find; dense steps have one stage."""
    yield "\nFound by search:\n"
    yield from _heading(
        [
            "budget",
            "solver",
            "family",
            "parameters",
            "steps",
            "densities",
            "lift",
            "evaluations",
            metric,
        ]
    )
    for budget, count, solver, name in itertools.product(budgets, stages, solvers, families):
        if count == 1:
            steps = int(allowed(budget))
            score, found = search_dense(fields, steps, FAMILIES[name], SOLVERS[solver])
            plan = Plan(steps, schedule=tuple(FAMILIES[name].sigmas(steps, *found).tolist()))
        else:
            score, plan, found = search_jit(
                fields, budget, FAMILIES[name], SOLVERS[solver], count, metric=metric
            )
        parts = np.diff((0, *plan.stage_steps)).tolist()
        cells = [
            f"{budget:g}", solver, name, f"{found[0]:.3f}, {found[1]:.3f}",
            " + ".join(map(str, parts)), ", ".join(f"{d:g}" for d in plan.densities),
            plan.lift if count > 1 else "", f"{evaluations(plan):.2f}", f"{score:.5f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _heading(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def write_between_markers(path: Path, part: str, lines: Sequence[str]) -> None:
    """Replace the lines between the markers of a part in a Markdown file.

    Raises:
        ValueError: the file lacks the markers.
    """
    text = path.read_text()
    start, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        raise ValueError(
            f"{path} lacks a part for {part}; expected the lines {start!r} and {end!r}"
        )
    before, after = text[: text.index(start)], text[text.index(end) :]
    path.write_text(f"{before}{start}\n" + "\n".join([*lines, "", after]).lstrip())


def main() -> None:
    """Print the parts that are asked for, and write them to a Markdown file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="+", choices=("table", "families", "scale", "search"), metavar="PART",
        help="table, families, scale or search",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=BUDGETS, metavar="B",
        help=f"how many times fewer operations; of {BUDGETS} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--side", type=int, default=24, help="rows, and columns, of tokens (default: 24)"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", default=(12, 24, 32), metavar="N",
        help="the same for scale (default: 12 24 32)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, nargs="+", default=(5, 7, 12, 16, 25, 50), metavar="N",
        help="numbers of dense steps for families (default: 5 7 12 16 25 50)",
    )  # fmt: skip
    parser.add_argument(
        "--solvers", nargs="+", choices=SOLVERS, default=["multistep"],
        help="solvers of a search, the first one also of families (default: multistep)",
    )  # fmt: skip
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=["beta"],
        help="schedules of a search (default: beta)",
    )  # fmt: skip
    parser.add_argument(
        "--stages", type=int, nargs="+", default=(1, 2), metavar="N",
        help="numbers of stages of a search; 1 is dense (default: 1 2)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", choices=METRICS, default="wasserstein",
        help="what a search makes small (default: wasserstein)",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, help="file with markers for the parts")
    args = parser.parse_args()
    for name, values, lowest in (
        ("--side", [args.side, *args.sides], 12),
        ("--steps", args.steps, 3),
        ("--stages", args.stages, 1),
    ):
        if min(values) < lowest:
            parser.error(f"{name} is {min(values)}; expected at least {lowest}")
    unknown = set(args.budgets) - set(CHOSEN)
    if unknown and set(args.parts) != {"search"}:
        parser.error(f"--budgets has {sorted(unknown)}; expected some of {sorted(CHOSEN)}")
    if min(args.budgets) < 1:
        parser.error(f"--budgets has {min(args.budgets)}; expected at least 1")
    fields = [Field(args.side, exponent) for exponent in EXPONENTS]
    for part in args.parts:
        start, lines = time.perf_counter(), []
        yielded = {
            "table": lambda: table_lines(fields, args.budgets),
            "families": lambda: family_lines(fields, args.steps, args.solvers[0]),
            "scale": lambda: scale_lines(args.sides, args.budgets),
            "search": lambda: search_lines(
                fields, args.budgets, args.families, args.solvers, args.stages, args.metric
            ),
        }[part]()
        for line in yielded:
            print(line, flush=True)
            lines.append(line)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
        if args.markdown:
            try:
                write_between_markers(args.markdown, part, lines)
            except (OSError, ValueError) as error:
                parser.error(str(error))


if __name__ == "__main__":
    main()
