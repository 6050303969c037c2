"""Validation of a solve's inputs before compilation, and of its velocities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan


def as_array(name: str, value: Any) -> Any:
    """Return an array-like as an array of a dtype that JAX computes with.

    NumPy arrays stay NumPy arrays, because inside `jit` JAX would turn them into traced ones, whose
    values cannot be checked.

    Args:
        name: name of the argument, for the message.
        value: a JAX or NumPy array, a number, or nested lists of numbers.

    Raises:
        ValueError: `value` is not numeric.
    """
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
        if not isinstance(value, Tracer) and jnp.issubdtype(array.dtype, jnp.number):
            return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    except (TypeError, ValueError):  # no numbers, or rows of different lengths
        pass
    raise ValueError(f"{name} is a {type(value).__name__}; expected an array of numbers")


def concrete(value: Any) -> np.ndarray | None:
    """Return the values of an array; None if it is traced, or lies on other hosts."""
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    # Not by jax.numpy: inside a trace its results are traced, even those of concrete arrays.
    return np.asarray(value)


def check_finite(name: str, value: Any) -> None:
    """Check that an array whose values are known is finite.

    Raises:
        ValueError: it has NaN or infinities.
    """
    values = concrete(value)
    if values is None:
        return
    count = values.size - np.count_nonzero(np.isfinite(values))
    if count:
        raise ValueError(f"{name} has {count} values that are not finite; expected none")


def is_traced(*inputs: Any) -> bool:
    """Whether an input is traced, or the call is inside a trace."""
    # Inside `jit` and the like, the results of all operations are traced.
    inside_trace = jnp.zeros(())
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((inside_trace, inputs)))


def check_not_traced(*inputs: Any) -> None:
    """Check that steps can be dispatched from Python, for `progress` and `check_finite`.

    Raises:
        ValueError: an input is traced, or the call is inside a trace.
    """
    if is_traced(*inputs):
        raise ValueError(
            "progress or check_finite is set under jit, vmap, grad or another transformation; "
            "expected neither"
        )


def check_inputs(
    plan: Plan,
    grid: Grid,
    budgets: tuple[int, ...],
    noise: Array,
    sigmas: Array,
    first_anchors: Array | None,
    microflow_noise: Array | None,
    random_scores: Array | None,
) -> None:
    """Check the inputs of `jit_solve` against the plan and the grid.

    Of traced arrays only the shapes and dtypes are checked.

    Args:
        plan: the plan.
        grid: rows and columns of tokens.
        budgets: number of anchors of each stage.
        noise, sigmas, first_anchors, microflow_noise, random_scores: as in `jit_solve`.

    Raises:
        ValueError: an array is missing, has the wrong shape, dtype or values, or is not finite.
    """
    n = grid[0] * grid[1]
    if noise.ndim != 3 or noise.shape[1] != n or not noise.size:
        raise ValueError(
            f"noise has shape {list(noise.shape)}; expected [batch, {n}, channels] for a token "
            f"grid of {grid[0]} x {grid[1]}"
        )
    if not jnp.issubdtype(noise.dtype, jnp.floating) or noise.dtype.itemsize < 4:
        raise ValueError(f"noise has dtype {noise.dtype}; expected float32 or float64")
    check_finite("noise", noise)
    if sigmas.shape != (plan.steps + 1,):
        raise ValueError(f"sigmas has shape {list(sigmas.shape)}; expected [{plan.steps + 1}]")
    levels = concrete(sigmas)
    if levels is not None and not (np.diff(levels) < 0).all():
        step = np.flatnonzero(~(np.diff(levels) < 0))[0]
        raise ValueError(
            f"sigmas has {levels[step]} before {levels[step + 1]} in step {step}; expected "
            "strictly decreasing values"
        )
    if microflow_noise is not None:
        if microflow_noise.shape != noise.shape:
            raise ValueError(
                f"microflow_noise has shape {list(microflow_noise.shape)}; expected the shape of "
                f"noise, {list(noise.shape)}"
            )
        check_finite("microflow_noise", microflow_noise)
    if budgets[0] == n:
        return
    if microflow_noise is None and plan.microflow_noise == "fresh" and plan.microflow != "none":
        raise ValueError(
            f"microflow_noise is None; expected shape {list(noise.shape)} for "
            "microflow_noise='fresh'"
        )
    if plan.activation == "random":
        expected = (noise.shape[0], n)
        if random_scores is None or random_scores.shape != expected:
            got = "is None" if random_scores is None else f"has shape {list(random_scores.shape)}"
            raise ValueError(
                f"random_scores {got}; expected shape {list(expected)} for activation='random'"
            )
        check_finite("random_scores", random_scores)
    _check_first_anchors(plan, first_anchors, noise.shape[0], budgets[0], n)


def _check_first_anchors(
    plan: Plan, first_anchors: Array | None, batch: int, budget: int, n: int
) -> None:
    if first_anchors is None:
        raise ValueError(f"first_anchors is None; expected shape {[batch, budget]} for this plan")
    if first_anchors.shape != (batch, budget):
        raise ValueError(
            f"first_anchors has shape {list(first_anchors.shape)}; expected {[batch, budget]} "
            f"(density {plan.densities[0]} of {n} tokens)"
        )
    if not jnp.issubdtype(first_anchors.dtype, jnp.integer):
        raise ValueError(f"first_anchors has dtype {first_anchors.dtype}; expected integers")
    values = concrete(first_anchors)
    if values is None:
        return
    if values.min() < 0 or values.max() >= n:
        raise ValueError(
            f"first_anchors has indices from {values.min()} to {values.max()}; expected 0 to "
            f"{n - 1}"
        )
    if any(len(set(row)) != budget for row in values.tolist()):
        raise ValueError("first_anchors has duplicate indices in a sample; expected none")


def check_logarithmic_sigmas(sigmas: Array) -> None:
    """Check that log((1 - sigma) / sigma) exists where the multistep solver needs it.

    Raises:
        ValueError: a sigma is above 1, or one before the last is not above 0.
    """
    levels = concrete(sigmas)
    if levels is not None and not (levels[0] <= 1 and levels[-2] > 0 and levels[-1] >= 0):
        raise ValueError(
            f"sigmas has values from {levels[0]} to {levels[-2]}, and {levels[-1]} last; expected "
            "values in (0, 1] for solver 'multistep', and 0 at the end at the earliest"
        )


def check_finite_velocity(velocity: Array, step: int, sigma: Array | np.floating) -> None:
    """Check that a velocity is finite.

    Raises:
        FloatingPointError: the velocity is not finite; names the step, its sigma and the samples.
    """
    not_finite = ~jnp.isfinite(velocity).all(axis=(1, 2))
    if bool(not_finite.any()):
        samples = np.flatnonzero(np.asarray(not_finite)).tolist()
        raise FloatingPointError(
            f"the velocity of step {step} (sigma {float(sigma):.4f}) is not finite in samples "
            f"{samples}"
        )
