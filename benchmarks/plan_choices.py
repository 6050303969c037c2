"""The plans that `benchmarks.plan_search` chose, rounded by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jitjax import Plan
from jitjax.sampler.schedule import beta_sigmas


def build_plan(
    steps: Sequence[int], densities: Sequence[float], sigmas: np.ndarray, solver: Any, lift: str
) -> Plan:
    """Build a plan whose target is hit with the initial noise, with anchors on the fixed grid.

    Args:
        steps: number of steps of each stage.
        densities: density of each stage but the last.
        sigmas: sigmas at the start of the steps.
        solver: value of `Plan.solver`.
        lift: value of `Plan.lift`.

    Raises:
        ValueError: there is no such plan.
    """
    count = sum(steps)
    ends = [round_end(done, count) for done in np.cumsum(steps)]
    return Plan(
        count, (*densities, 1.0), tuple(ends), tuple(sigmas.tolist()), activation="grid",
        lift=lift, microflow="hit", microflow_noise="initial", solver=solver,
    )  # fmt: skip


def round_end(done: int, steps: int) -> float:
    """Return the end of a stage after `done` of `steps` steps with as few decimals as possible."""
    for digits in range(1, 8):
        end = math.ceil(done / steps * 10**digits - 1e-6) / 10**digits
        if int(end * steps + 1e-9) == done:
            return end
    raise ValueError(f"done is {done} of {steps} steps; expected fewer than a million")


def dense(steps: int, a: float, b: float) -> Plan:
    """Dense steps of second order with sigmas of Beta(a, b)."""
    return Plan(steps, schedule=tuple(beta_sigmas(steps, a, b).tolist()), solver="multistep")


def sparse(
    steps: Sequence[int], densities: Sequence[float], a: float, b: float, lift: str = "linear"
) -> Plan:
    """Stages of second order with sigmas of Beta(a, b), hit with the initial noise."""
    return build_plan(steps, densities, beta_sigmas(sum(steps), a, b), "multistep", lift)


CHOSEN: dict[float, dict[str, Plan]] = {
    2: {
        "**dense 25, Beta(0.5, 0.2)**": dense(25, 0.5, 0.2),
        "**5 at 0.2 + 24, Beta(0.3, 0.2), narrow**": sparse((5, 24), (0.2,), 0.3, 0.2, "narrow"),
    },
    3: {
        "**dense 16, Beta(0.5, 0.2)**": dense(16, 0.5, 0.2),
        "**3 at 0.2 + 16, Beta(0.3, 0.2), linear**": sparse((3, 16), (0.2,), 0.3, 0.2),
    },
    4: {
        "**dense 12, Beta(0.5, 0.2)**": dense(12, 0.5, 0.2),
        "**5 at 0.25 + 11, Beta(0.4, 0.2), narrow**": sparse((5, 11), (0.25,), 0.4, 0.2, "narrow"),
        "**11 at 0.65 + 5, Beta(0.6, 0.2), linear**": sparse((11, 5), (0.65,), 0.6, 0.2),
    },
    7: {
        "**dense 7, Beta(0.85, 0.25)**": dense(7, 0.85, 0.25),
        "**4 at 0.25 + 6, Beta(0.6, 0.2), linear**": sparse((4, 6), (0.25,), 0.6, 0.2),
        "**7 at 0.6 + 3, Beta(0.7, 0.25), linear**": sparse((7, 3), (0.6,), 0.7, 0.25),
    },
    10: {
        "**dense 5, Beta(2, 0.4)**": dense(5, 2.0, 0.4),
        "**3 at 0.25 + 4, Beta(1, 0.2), linear**": sparse((3, 4), (0.25,), 1.0, 0.2),
        "**8 at 0.35 + 2, Beta(1.2, 0.4), linear**": sparse((8, 2), (0.35,), 1.2, 0.4),
    },
    14: {
        "**dense 3, Beta(1.4, 0.425)**": dense(3, 1.4, 0.425),
        "**2 at 0.25 + 3, Beta(1.5, 0.3), linear**": sparse((2, 3), (0.25,), 1.5, 0.3),
        "**5 at 0.25 + 2, Beta(1.5, 0.5), linear**": sparse((5, 2), (0.25,), 1.5, 0.5),
    },
}
"""Budget -> name in the table -> plan; at least one dense and one sparse plan each."""
