"""Costs, scores and searches of `benchmarks.plan_search`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from benchmarks.gaussian_map import dense_factors, eigenvalues, fast_linear_map  # isort: skip

import numpy as np
from scipy.optimize import differential_evolution, minimize
from scipy.special import expit, logit

from benchmarks.gaussian_field import Field, LinearMap
from benchmarks.plan_choices import build_plan
from benchmarks.quality import flops
from benchmarks.sigma_families import Family
from jitjax import AdamsBashforth2, Plan
from jitjax.config import TransformerConfig

BUDGETS = (2, 3, 4, 7, 10, 14)
"""How many times fewer operations than 50 dense steps."""

TOLERANCE = 1.01
"""A plan may cost this much more than its budget: `7x` as released costs 1.006 of "7 times"."""

EXPONENTS = (2.5, 3.0, 4.0)
"""Exponents of the fields' spectra."""

TOKENS, TEXT = 4096, 512
"""Tokens of FLUX.1-dev at 1024 x 1024 pixels."""

DENSITIES = tuple(round(0.05 * k, 2) for k in range(4, 18))
"""Densities that a search tries: 0.2 to 0.85. Rounder than they need to be, and so are plans."""

LIFTS = ("blur", "narrow", "linear", "nearest")
"""Lifts that a search tries; "none" is the paper's ablation, and worse wherever it was tried."""

SOLVERS: dict[str, Any] = {
    "euler": "euler",
    "multistep": "multistep",
    "adams": AdamsBashforth2(),
}
"""Solvers by the names of this program."""

INVALID = 10.0
"""Logarithm of the score of what is no plan; every plan is far better."""


@lru_cache(maxsize=1024)
def step_cost(density: float) -> float:
    """Return the operations of a step on a share of the image tokens, over a dense step's."""
    config = TransformerConfig()
    here, all_tokens = (flops.forward(config, n, TEXT) for n in (int(TOKENS * density), TOKENS))
    return here / all_tokens


def evaluations(plan: Plan) -> float:
    """Return the operations of a plan, in evaluations of all tokens."""
    steps = np.diff((0, *plan.stage_steps))
    return sum(n * step_cost(d) for n, d in zip(steps, plan.densities, strict=True))


def allowed(budget: float) -> float:
    """Return the evaluations of all tokens that a budget allows."""
    return 50 / budget * TOLERANCE


def wasserstein(sampler: LinearMap) -> float:
    """Compute `sampler.scores().wasserstein`, and nothing else."""
    product = sampler.field.root @ sampler.initial
    overlap = np.sqrt(np.linalg.eigvalsh(product @ product.T).clip(0)).sum()
    total = sampler.field.covariance.trace()
    return float((total + (sampler.initial**2).sum() - 2 * overlap) / total)


def distance(sampler: LinearMap) -> float:
    """Compute `sampler.scores().distance`, and nothing else."""
    apart = ((sampler.initial - sampler.field.root) ** 2).sum()
    return float(np.sqrt(apart / sampler.field.covariance.trace()))


METRICS = {"wasserstein": wasserstein, "distance": distance}
"""What a search can make small."""


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.log(values).mean()))


def judge(fields: Sequence[Field], plan: Plan, metric: str = "wasserstein") -> float:
    """Return the geometric mean of a plan's distance over fields; lower is better.

    Args:
        fields: the fields.
        plan: the plan.
        metric: a name in `METRICS`.
    """
    return geometric_mean([METRICS[metric](fast_linear_map(field, plan)) for field in fields])


def judge_dense(fields: Sequence[Field], sigmas: np.ndarray, solver: Any) -> float:
    """Return the score of dense steps between `sigmas`, the last of which is 0.

    The steps scale the modes of the exact flow, so that both metrics agree: the Wasserstein
    distance is the squared distance to the converged picture.
    """
    scores = []
    for field in fields:
        variance = eigenvalues(field)
        apart = (dense_factors(variance, sigmas, solver) - np.sqrt(variance)) ** 2
        scores.append(apart.sum() / variance.sum())
    return geometric_mean(scores)


def search_dense(
    fields: Sequence[Field], steps: int, family: Family, solver: Any
) -> tuple[float, np.ndarray]:
    """Find the schedule of a family that is best for dense steps; return score and parameters."""

    def objective(parameters: np.ndarray) -> float:
        sigmas = np.append(family.sigmas(steps, *parameters), 0)
        if not (np.isfinite(sigmas).all() and (np.diff(sigmas) < -1e-7).all()):
            return INVALID
        return math.log(judge_dense(fields, sigmas, solver))

    found = differential_evolution(objective, family.bounds, popsize=10, maxiter=40, rng=0)
    return math.exp(found.fun), found.x


def search_free(
    fields: Sequence[Field], steps: int, solver: Any, start: np.ndarray
) -> tuple[float, np.ndarray]:
    """Find the best sigmas of dense steps, each of them free, near `start`: a family's bound."""

    def unpack(values: np.ndarray) -> np.ndarray:
        inner = expit(np.cumsum(np.append(values[:1], -np.exp(values[1:]))))
        return np.concatenate([[1], inner, [0]])

    def objective(values: np.ndarray) -> float:
        sigmas = unpack(values)
        if not (np.diff(sigmas) < -1e-7).all():
            return INVALID
        return math.log(judge_dense(fields, sigmas, solver))

    inner = logit(start[1:])
    first = np.append(inner[:1], np.log(-np.diff(inner)))
    found = minimize(objective, first, method="L-BFGS-B", options={"maxiter": 200})
    return math.exp(found.fun), unpack(found.x)[:-1]


def search_jit(
    fields: Sequence[Field],
    budget: float,
    family: Family,
    solver: Any,
    stages: int,
    *,
    metric: str = "wasserstein",
    iterations: int = 25,
    population: int = 8,
    seed: int = 0,
) -> tuple[float, Plan, np.ndarray]:
    """Find the best plan with sparse stages.

    Args:
        fields: the fields.
        budget: the budget.
        family: family of schedules.
        solver: value of `Plan.solver`.
        stages: number of stages, at least 2.
        metric: a name in `METRICS`.
        iterations: generations of the differential evolution.
        population: its members per variable.
        seed: its seed.

    Returns:
        The score, the plan, and the schedule's parameters.
    """
    sparse = stages - 1
    most_steps = max(2, int(allowed(budget) / step_cost(DENSITIES[0]) / 2))

    def unpack(x: np.ndarray) -> Plan | None:
        numbers = np.rint(x[2:]).astype(int)
        steps = numbers[:sparse].tolist()
        densities = [DENSITIES[k] for k in numbers[sparse : 2 * sparse]]
        spent = sum(n * step_cost(d) for n, d in zip(steps, densities, strict=True))
        last = int(allowed(budget) - spent + 1e-9) if spent < allowed(budget) else 0
        if last < 1 or any(a >= b for a, b in itertools.pairwise(densities)):
            return None
        sigmas = family.sigmas(sum(steps) + last, x[0], x[1])
        try:
            return build_plan([*steps, last], densities, sigmas, solver, LIFTS[numbers[-1]])
        except ValueError:  # sigmas that do not fall
            return None

    def objective(x: np.ndarray) -> float:
        plan = unpack(x)
        try:
            return INVALID if plan is None else math.log(judge(fields, plan, metric))
        except ValueError:  # sigmas that do not fall in float32
            return INVALID

    bounds = [
        *family.bounds,
        *[(1, most_steps)] * sparse,
        *[(0, len(DENSITIES) - 1)] * sparse,
        (0, len(LIFTS) - 1),
    ]
    found = differential_evolution(
        objective,
        bounds,
        integrality=[False] * 2 + [True] * (len(bounds) - 2),
        maxiter=iterations,
        popsize=population,
        polish=False,
        rng=seed,
    )
    plan = unpack(found.x)
    if plan is None:
        raise ValueError(f"found no plan for the budget {budget}; expected more iterations")
    return math.exp(found.fun), plan, found.x[:2]
