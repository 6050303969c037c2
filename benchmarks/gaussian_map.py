"""The sampler's linear map on a Gaussian field, fast enough for a search over plans.

`benchmarks.gaussian.linear_map` runs `jit_solve`. Here the same map is computed with NumPy: in the
eigenbasis of the covariance of a stage's anchors, the ideal velocity is one factor per mode, so
that a step costs no product of matrices, and a stage costs a few. Nothing is compiled, and a new
plan takes milliseconds instead of seconds. `tests/benchmarks/test_plan_search.py` holds the two
together.

Restrictions: new anchors on the fixed grid, noise "initial", no padding; solvers "euler",
"multistep" and `AdamsBashforth2`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from benchmarks.gaussian import FLUX_SHIFT, jitted_first_anchors  # isort: skip  (before NumPy: it sets BLAS's threads)

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks.gaussian_field import Field, LinearMap
from jitjax import AdamsBashforth2, Plan
from jitjax.sampler.anchors import AnchorSet, fixed_grid_scores
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.schedule import plan_sigmas
from jitjax.sampler.solvers import MOST_EXTRAPOLATION

Rate = Callable[[Any, float], Any]
"""The velocity as a linear function of a state: `(state, sigma) -> velocity`."""


@lru_cache(maxsize=4096)
def _anchors(
    side: int, budgets: tuple[int, ...], first: str, fill: str, seed: int
) -> tuple[np.ndarray, ...]:
    """Return the token indices of each stage's anchors; of all tokens in order for a dense one."""
    n = side**2
    key, _ = jax.random.split(jax.random.key(seed))
    index = np.asarray(jitted_first_anchors(key, (side, side), budgets[0], layout=first, fill=fill))
    scores = np.array(fixed_grid_scores(1, (side, side))[0])
    stages = []
    for budget in budgets:
        scores[index] = -np.inf
        best = np.argsort(-scores, kind="stable")  # not by JAX, which would compile every budget
        index = np.append(index, best[: budget - len(index)])
        stages.append(np.arange(n) if budget == n else index)
    return tuple(stages)


@lru_cache(maxsize=512)
def _lift(
    side: int, budgets: tuple[int, ...], first: str, fill: str, seed: int, kind: str
) -> np.ndarray:
    """Return the lifter of the last of these stages as a matrix [n, anchors]."""
    n, index = side**2, _anchors(side, budgets, first, fill, seed)[-1]
    with jax.enable_x64(True):
        # As many slots as tokens, so that all numbers of anchors share their compiled operations.
        slots = np.pad(index, (0, n - len(index)), constant_values=n).astype(np.int32)
        anchors = AnchorSet(jnp.asarray(slots)[None], jnp.asarray(slots < n)[None])
        lifter = Lifter.build(anchors, (side, side), len(index), kind)
        return np.asarray(lifter.lift_clean(jnp.eye(n)[None])[0])[:, : len(index)]


@lru_cache(maxsize=512)
def _eigen(
    field: Field, budgets: tuple[int, ...], first: str, fill: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues and eigenvectors of the covariance of the last stage's anchors."""
    if budgets[-1] == field.tokens:
        return _all_modes(field)
    index = _anchors(field.side, budgets, first, fill, seed)[-1]
    return np.linalg.eigh(field.covariance[np.ix_(index, index)])


@lru_cache(maxsize=16)
def _all_modes(field: Field) -> tuple[np.ndarray, np.ndarray]:
    return np.linalg.eigh(field.covariance)


def eigenvalues(field: Field) -> np.ndarray:
    """Return the eigenvalues of a field's covariance, ascending; none is negative."""
    return _all_modes(field)[0].clip(0)


def mode_velocity(variance: np.ndarray, sigma: float) -> np.ndarray:
    """Return the ideal velocity per unit of state in modes of the given variances."""
    return (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2)


def run_solver(
    solver: Any, rate: Rate, y: Any, sigmas: np.ndarray, history: tuple[Any, float] | None
) -> tuple[Any, Any, tuple[Any, float] | None]:
    """Integrate a linear flow with one of the solvers of `jitjax.sampler.solvers`.

    Args:
        solver: "euler", "multistep" or `AdamsBashforth2()`.
        rate: the velocity.
        y: state at `sigmas[0]`.
        sigmas: sigmas at the step boundaries.
        history: "multistep" keeps the clean prediction of the step before, and its sigma;
            `AdamsBashforth2` the velocity of the step before, and its length.

    Returns:
        The state, the last step's velocity, and the history.
    """
    velocity = y
    for sigma, end in itertools.pairwise(sigmas):
        velocity = rate(y, sigma)
        if solver == "multistep":
            clean = predicted = y - sigma * velocity
            if history and history[1] < 1 and end > 0:
                half_ratio = (_log_snr(end) - _log_snr(sigma)) / 2
                half_ratio /= _log_snr(sigma) - _log_snr(history[1])
                predicted = clean + min(half_ratio, MOST_EXTRAPOLATION) * (clean - history[0])
            history = clean, sigma
            velocity = (y - predicted) / sigma
        elif solver != "euler":
            current, step = velocity, end - sigma
            if history:
                velocity = current + step / history[1] / 2 * (current - history[0])
            history = current, step
        y = y + (end - sigma) * velocity
    return y, velocity, history


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def dense_factors(
    variance: Float[np.ndarray, " modes"], sigmas: Float[np.ndarray, " levels"], solver: Any
) -> Float[np.ndarray, " modes"]:
    """Return what dense steps make of noise 1 in modes of the given variances.

    The exact flow makes the square root of the variance of it.
    """

    def rate(y: np.ndarray, sigma: float) -> np.ndarray:
        return mode_velocity(variance, sigma) * y

    return run_solver(solver, rate, np.ones_like(variance), sigmas, None)[0]


def _check(plan: Plan, tokens: int) -> None:
    if plan.budgets(tokens)[0] == tokens:
        return
    for name, allowed in (
        ("activation", ("grid",)),
        ("microflow_noise", ("initial",)),
        ("spare", ("padding",)),
    ):
        value = getattr(plan, name)
        if value not in allowed and not (name == "microflow_noise" and plan.microflow == "none"):
            raise ValueError(f"Plan.{name} is {value!r}; expected {allowed[0]!r}")


def fast_linear_map(field: Field, plan: Plan, *, seed: int = 0) -> LinearMap:
    """Compute the sampler's map from noise to pictures, as `benchmarks.gaussian.linear_map`.

    Args:
        field: the field.
        plan: the plan.
        seed: seed of the anchors.

    Raises:
        ValueError: the plan is none that this module knows.
    """
    n = field.tokens
    _check(plan, n)
    if not (plan.solver in ("euler", "multistep") or isinstance(plan.solver, AdamsBashforth2)):
        raise ValueError(f"Plan.solver is {plan.solver!r}; expected one of this module's")
    sigmas = plan_sigmas(plan, n, FLUX_SHIFT).astype(float)
    budgets, noise = plan.budgets(n), np.eye(n)
    layout = plan.first, plan.fill, seed
    y, kept, start = noise, None, 0
    for k, end in enumerate(plan.stage_steps):
        upto = budgets[: k + 1]
        index = _anchors(field.side, upto, *layout)[-1]
        values, vectors = _eigen(field, upto, *layout)
        lift = None
        if len(index) < n:
            lift = _lift(field.side, upto, *layout, plan.lift)
        y, u, kept = _run_stage(
            plan, y, kept, sigmas[start : end + 1], index, values, vectors, lift
        )
        if lift is not None and end < plan.steps:
            new = np.setdiff1d(_anchors(field.side, budgets[: k + 2], *layout)[-1], index)
            sigma = sigmas[end]
            lifted = lift[new] @ (y[index] - sigma * u[index])
            target = (1 - sigma) * lifted + sigma * noise[new]
            share = {"hit": 1.0, "blend": 1 / plan.relax, "none": 0.0}[plan.microflow]
            y[new] += share * (target - y[new])
            if plan.solver == "multistep" and kept:
                kept[0][new] = lifted
        if plan.solver != "multistep":
            kept = None  # the others start anew in every stage
        start = end
    return LinearMap(field, y)


def _run_stage(
    plan: Plan,
    y: Float[np.ndarray, "n n"],
    kept: tuple[Float[np.ndarray, "n n"], float] | None,
    sigmas: np.ndarray,
    index: Int[np.ndarray, " m"],
    values: Float[np.ndarray, " m"],
    vectors: Float[np.ndarray, "m m"],
    lift: Float[np.ndarray, "n m"] | None,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, float] | None]:
    """Run a stage; return the state, the last velocity, and what "multistep" keeps.

    During a stage, every state is a linear function of the first state and the history: on anchors
    one factor of each per mode; on other tokens one factor of each for their own values, and one
    per mode for what is lifted to them.
    """
    n, m = len(y), len(index)
    other = np.setdiff1d(np.arange(n), index)
    factor = np.zeros((2 * m + 1, 2))  # anchors' modes, lifted modes, own values; of (y, history)
    factor[:m, 0] = factor[2 * m, 0] = 1
    history = None
    if kept:
        history = factor[:, ::-1].copy(), kept[1]

    def rate(state: np.ndarray, sigma: float) -> np.ndarray:
        on_anchors = mode_velocity(values, sigma)[:, None] * state[:m]
        lifted = np.zeros_like(on_anchors) if plan.lift == "none" else on_anchors
        return np.concatenate([on_anchors, lifted, np.zeros((1, 2))])

    final, velocity, history = run_solver(plan.solver, rate, factor, sigmas, history)
    inputs = [y, kept[0]] if kept else [y]
    modes = [vectors.T @ x[index] for x in inputs]
    lifted_modes = None if lift is None else lift[other] @ vectors

    def expand(factors: np.ndarray) -> np.ndarray:
        result = np.empty((n, n))
        columns = range(len(inputs))
        result[index] = vectors @ sum(factors[:m, i, None] * modes[i] for i in columns)
        if lifted_modes is not None:
            lifted = sum(factors[m : 2 * m, i, None] * modes[i] for i in columns)
            own = sum(factors[2 * m, i] * inputs[i][other] for i in columns)
            result[other] = lifted_modes @ lifted + own
        return result

    is_last = sigmas[-1] == 0
    y = expand(final)
    u = y if is_last else expand(velocity)
    if history and not is_last:
        return y, u, (expand(history[0]), history[1])
    return y, u, None
