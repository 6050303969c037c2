"""Checks of the arrays that a solve is given, before anything is compiled."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan


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
    """Raise `ValueError` for arrays that do not fit the plan and the grid, or are not finite.

    Values that are being traced cannot be looked at; their shapes can.
    """
    n = grid[0] * grid[1]
    if noise.ndim != 3 or noise.shape[1] != n:
        raise ValueError(
            f"noise is {list(noise.shape)}; expected [batch, {n}, channels] for a token grid of "
            f"{grid[0]} x {grid[1]}"
        )
    if not jnp.issubdtype(noise.dtype, jnp.floating) or noise.dtype.itemsize < 4:
        raise ValueError(f"noise is {noise.dtype}; expected float32 (or float64)")
    _check_finite("noise", noise)
    if sigmas.shape != (plan.steps + 1,):
        raise ValueError(f"sigmas is {list(sigmas.shape)}; expected [{plan.steps + 1}]")
    if not isinstance(sigmas, Tracer) and not (np.diff(np.asarray(sigmas)) < 0).all():
        raise ValueError(f"sigmas is {sigmas}; expected falling values, none repeated")
    if microflow_noise is not None:
        if microflow_noise.shape != noise.shape:
            raise ValueError(
                f"microflow_noise is {list(microflow_noise.shape)}; expected the shape of noise, "
                f"{list(noise.shape)}"
            )
        _check_finite("microflow_noise", microflow_noise)
    if budgets[0] == n:
        return
    if microflow_noise is None and plan.microflow_noise == "fresh" and plan.microflow != "none":
        raise ValueError(
            f"microflow_noise is None; expected {list(noise.shape)} for a plan whose micro-flow's "
            "noise is fresh"
        )
    if plan.activation == "random":
        expected = (noise.shape[0], n)
        if random_scores is None or random_scores.shape != expected:
            got = None if random_scores is None else list(random_scores.shape)
            raise ValueError(
                f"random_scores is {got}; expected {list(expected)} for activation='random'"
            )
    _check_first_anchors(plan, first_anchors, noise.shape[0], budgets[0], n)


def _check_finite(name: str, values: Array) -> None:
    if isinstance(values, Tracer):
        return
    bad = int((~jnp.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} values that are not finite; expected none")


def _check_first_anchors(
    plan: Plan, first_anchors: Array | None, batch: int, budget: int, n: int
) -> None:
    if first_anchors is None:
        raise ValueError(f"first_anchors is None; this plan needs [{batch}, {budget}]")
    if first_anchors.shape != (batch, budget):
        raise ValueError(
            f"first_anchors is {list(first_anchors.shape)}; expected {[batch, budget]} "
            f"(density {plan.densities[0]} of {n} tokens)"
        )
    if not jnp.issubdtype(first_anchors.dtype, jnp.integer):
        raise ValueError(f"first_anchors is {first_anchors.dtype}; expected whole numbers")
    if isinstance(first_anchors, Tracer):
        return
    values = np.asarray(first_anchors)
    if values.min() < 0 or values.max() >= n:
        raise ValueError(
            f"first_anchors runs from {values.min()} to {values.max()}; expected 0 to {n - 1}"
        )
    if any(len(set(row)) != budget for row in values.tolist()):
        raise ValueError("first_anchors names a token more than once in a sample")


def check_finite_velocity(velocity: Array, step: int, sigma: Array) -> None:
    """Raise `FloatingPointError` that says at which step, and for which samples, it is not."""
    bad = ~jnp.isfinite(velocity).all(axis=(1, 2))
    if bool(bad.any()):
        samples = np.flatnonzero(np.asarray(bad)).tolist()
        raise FloatingPointError(
            f"the velocity of step {step} (sigma {float(sigma):.4f}) is not finite in samples "
            f"{samples}"
        )
