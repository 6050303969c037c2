"""Two peers that skip evaluations in time instead of tokens in space, over any velocity function.

Each takes `evaluate(tokens, sigma) -> velocities`, the noise and the falling sigmas, steps by
Euler, and says how often it evaluated.

    teacache   evaluate again when the network's input has changed enough since the last time; else
               take the last velocity once more (Liu et al., TeaCache, CVPR 2025)
    taylor     evaluate at given steps; between them forecast the velocity from its differences
               (Liu et al., TaylorSeer, ICCV 2025; there inside the blocks, here at the output)
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
WARM = 2
"""Steps at the beginning that Taylor always evaluates, for there is nothing to forecast from."""


def evaluated_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """The `evaluations` steps of `steps` at which Taylor evaluates: the first few, then evenly."""
    if not WARM < evaluations <= steps:
        raise ValueError(f"evaluations is {evaluations}; expected {WARM + 1} to {steps}")
    even = np.linspace(WARM - 1, steps, evaluations - WARM + 2)[1:-1]
    return (*range(WARM), *(int(step) for step in np.ceil(even)))


def taylor(
    evaluate: Evaluate,
    noise: Float[Array, "b n d"],
    sigmas: Float[Array, " levels"],
    evaluated: Sequence[int],
    order: int = 2,
) -> tuple[Float[Array, "b n d"], int]:
    """Clean tokens and the number of evaluations.

    The i-th derivative is the difference of the (i-1)-th at the last two evaluations over the steps
    between them; k steps later the velocity is their Taylor sum.
    """
    y, terms, last = noise, [], 0
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        if step in evaluated:
            new = [evaluate(y, sigma)]
            for before in terms[:order]:
                new.append((new[-1] - before) / (step - last))
            terms, last = new, step
        k = step - last
        u = sum(term * (k**i / math.factorial(i)) for i, term in enumerate(terms))
        y = y + u * (after - sigma)
    return y, len(evaluated)


def relative_change(now: Array, before: Array) -> Array:
    """Mean absolute change over mean absolute value, over all samples and tokens."""
    return jnp.abs(now - before).mean() / jnp.abs(before).mean()


def teacache(
    evaluate: Evaluate,
    indicate: Evaluate,
    noise: Float[Array, "b n d"],
    sigmas: Float[Array, " levels"],
    rescale: Polynomial,
    threshold: float,
) -> tuple[Float[Array, "b n d"], int]:
    """Clean tokens and the number of evaluations.

    Args:
        evaluate: the network.
        indicate: what is cheap to compute and changes as the network's output does.
        noise: the state at `sigmas[0]`.
        sigmas: falling noise levels.
        rescale: from the change of the indicator to that of the output, see `calibrate`.
        threshold: evaluate again when the estimated changes since the last time exceed this.
    """
    y, u, before = noise, jnp.zeros_like(noise), None
    total, evaluations = 0.0, 0
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        now = indicate(y, sigma)
        if before is not None:
            total += float(rescale(float(relative_change(now, before))))
        if step in (0, len(sigmas) - 2) or total >= threshold:
            u, total, evaluations = evaluate(y, sigma), 0.0, evaluations + 1
        y, before = y + u * (after - sigma), now
    return y, evaluations


def changes(
    evaluate: Evaluate, indicate: Evaluate, noise: Array, sigmas: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Relative changes [steps - 1] of indicator and output along the full solve."""
    y, before, found = noise, None, []
    for sigma, after in itertools.pairwise(sigmas):
        now = indicate(y, sigma), evaluate(y, sigma)
        if before is not None:
            found.append([float(relative_change(a, b)) for a, b in zip(now, before, strict=True)])
        y, before = y + now[1] * (after - sigma), now
    indicator, output = np.array(found).T
    return indicator, output


def calibrate(indicator: np.ndarray, output: np.ndarray, degree: int = 4) -> Polynomial:
    """The polynomial of `teacache`, from what `changes` returned; TeaCache's have degree 4."""
    return Polynomial.fit(indicator, output, degree)


def find_threshold(count: Callable[[float], int], wanted: int, highest: float) -> float:
    """The threshold at which `count` evaluations are nearest to `wanted`, by bisection."""
    low, high, tried = 0.0, highest, {}
    for _ in range(12):
        threshold = (low + high) / 2
        tried[threshold] = got = count(threshold)
        if got == wanted:
            break
        low, high = (threshold, high) if got > wanted else (low, threshold)
    return min(tried, key=lambda threshold: abs(tried[threshold] - wanted))
