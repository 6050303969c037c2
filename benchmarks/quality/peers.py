"""Samplers to compare with: TeaCache and a Taylor forecast, which skip evaluations of the network.

Both work with any velocity function `evaluate(tokens, sigma) -> velocities`, take Euler steps along
decreasing sigmas, and return the number of evaluations.

    teacache   evaluates again once the network's input has changed enough, and reuses the last
               velocity until then (Liu et al., TeaCache, CVPR 2025)
    taylor     evaluates at fixed steps, and extrapolates the velocity between them by finite
               differences (Liu et al., TaylorSeer, ICCV 2025; there inside the blocks, here at
               the output)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial

Evaluate = Callable[[Array, Array], Array]
WARM_UP_STEPS = 2
"""First steps that `taylor` always evaluates, since a forecast needs earlier velocities."""


def evaluated_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """Choose the steps at which `taylor` evaluates: `WARM_UP_STEPS` first, then evenly spaced.

    Args:
        steps: number of steps.
        evaluations: number of evaluations, more than `WARM_UP_STEPS` and at most `steps`.

    Raises:
        ValueError: `evaluations` is out of range.
    """
    if not WARM_UP_STEPS < evaluations <= steps:
        raise ValueError(f"evaluations is {evaluations}; expected {WARM_UP_STEPS + 1} to {steps}")
    spaced = np.linspace(WARM_UP_STEPS - 1, steps, evaluations - WARM_UP_STEPS + 2)[1:-1]
    return (*range(WARM_UP_STEPS), *(int(step) for step in np.ceil(spaced)))


def taylor(
    evaluate: Evaluate,
    noise: Float[Array, "b n d"],
    sigmas: Float[Array, " levels"],
    evaluated: Sequence[int],
    order: int = 2,
) -> tuple[Float[Array, "b n d"], int]:
    """Sample with a Taylor forecast of the velocity between evaluations.

    The i-th derivative is the difference of the (i-1)-th derivative at the last two evaluations,
    divided by the number of steps between them. The forecast is the Taylor sum of the derivatives.

    Args:
        evaluate: the velocity function.
        noise: the state at `sigmas[0]`.
        sigmas: decreasing noise levels.
        evaluated: the steps to evaluate at, from 0; step 0 is among them.
        order: highest derivative; 0 reuses the last velocity.

    Returns:
        Clean tokens, and the number of evaluations.
    """
    y, derivatives, last_step = noise, [], 0
    for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        if step in evaluated:
            updated = [evaluate(y, sigma)]
            for previous in derivatives[:order]:
                updated.append((updated[-1] - previous) / (step - last_step))
            derivatives, last_step = updated, step
        elapsed = step - last_step
        u = sum(term * (elapsed**i / math.factorial(i)) for i, term in enumerate(derivatives))
        y = y + u * (next_sigma - sigma)
    return y, len(evaluated)


def relative_change(current: Array, previous: Array) -> Array:
    """Return the mean absolute change divided by the mean absolute previous value."""
    return jnp.abs(current - previous).mean() / jnp.abs(previous).mean()


def teacache(
    evaluate: Evaluate,
    indicate: Evaluate,
    noise: Float[Array, "b n d"],
    sigmas: Float[Array, " levels"],
    rescale: Polynomial,
    threshold: float,
) -> tuple[Float[Array, "b n d"], int]:
    """Sample with TeaCache's rule. The first and the last step always evaluate.

    Args:
        evaluate: the velocity function.
        indicate: the indicator, a cheap function of the same arguments whose relative change
            predicts that of the velocity.
        noise: the state at `sigmas[0]`.
        sigmas: decreasing noise levels.
        rescale: estimates the relative change of the velocity from that of the indicator; from
            `calibrate`.
        threshold: evaluate again when the estimated changes since the last evaluation add up to
            this or more.

    Returns:
        Clean tokens, and the number of evaluations.
    """
    y, u, previous = noise, jnp.zeros_like(noise), None
    total, evaluations = 0.0, 0
    for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        current = indicate(y, sigma)
        if previous is not None:
            total += float(rescale(float(relative_change(current, previous))))
        if step in (0, len(sigmas) - 2) or total >= threshold:
            u, total, evaluations = evaluate(y, sigma), 0.0, evaluations + 1
        y, previous = y + u * (next_sigma - sigma), current
    return y, evaluations


def relative_changes(
    evaluate: Evaluate, indicate: Evaluate, noise: Array, sigmas: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the changes between consecutive steps of the full solve, for `calibrate`.

    Returns:
        Relative changes [steps - 1] of the indicator, and of the velocity.
    """
    y, previous, rows = noise, None, []
    for sigma, next_sigma in itertools.pairwise(sigmas):
        current = indicate(y, sigma), evaluate(y, sigma)
        if previous is not None:
            rows.append(
                [float(relative_change(a, b)) for a, b in zip(current, previous, strict=True)]
            )
        y, previous = y + current[1] * (next_sigma - sigma), current
    indicator, output = np.array(rows).T
    return indicator, output


def calibrate(indicator: np.ndarray, output: np.ndarray, degree: int = 4) -> Polynomial:
    """Fit `teacache`'s polynomial to the result of `relative_changes`.

    The default degree is that of TeaCache's own polynomials.
    """
    return Polynomial.fit(indicator, output, degree)


def find_threshold(count: Callable[[float], int], target: int, upper: float) -> float:
    """Find the threshold whose number of evaluations is nearest to `target`, by bisection.

    Args:
        count: returns the number of evaluations for a threshold; it falls with the threshold.
        target: the number of evaluations to reach.
        upper: upper end of the search; the lower end is 0.
    """
    low, high, counts = 0.0, upper, {}
    for _ in range(12):
        threshold = (low + high) / 2
        counts[threshold] = evaluations = count(threshold)
        if evaluations == target:
            break
        low, high = (threshold, high) if evaluations > target else (low, threshold)
    return min(counts, key=lambda threshold: abs(counts[threshold] - target))
