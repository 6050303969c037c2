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

import jax
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


def calibrate(
    indicator: np.ndarray, output: np.ndarray, evaluations: int, degree: int = 4
) -> tuple[Polynomial, float]:
    """The polynomial of `teacache` and the threshold that gives about `evaluations` of them.

    Args:
        indicator, output: what `changes` returned.
        evaluations: wanted.
        degree: of the polynomial; TeaCache's have 4.
    """
    rescale = Polynomial.fit(indicator, output, degree)
    estimates = rescale(indicator)
    low, high = 0.0, float(np.abs(estimates).sum())
    for _ in range(60):
        threshold = (low + high) / 2
        count, total = 1, 0.0
        for step, estimate in enumerate(estimates):
            total += float(estimate)
            if step == len(estimates) - 1 or total >= threshold:
                count, total = count + 1, 0.0
        low, high = (threshold, high) if count > evaluations else (low, threshold)
    return rescale, high


def jitted(function: Callable[..., Array], *args: object) -> Evaluate:
    """`function(tokens, sigma, *args)` compiled, with `args` filled in."""
    compiled = jax.jit(function)
    return lambda tokens, sigma: compiled(tokens, sigma, *args)
