"""The two differential equations of the method, as diffrax terms.

SAG-ODE, one per stage:              d y / d sigma = Pi_k u(S_k^T y, sigma)
Micro-flow, for new tokens alone:    d y / d sigma = (y* - y) / (T - sigma)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jitjax.sampler.grid import Grid, positions
from jitjax.sampler.lifter import Lifter

Velocity = Callable[..., Array]
"""`(tokens [b, m, d], positions [b, m, 3], sigma [], valid [b, m] or None, args) ->
velocities [b, m, d]`: any transformer. `valid` is None when no slot is padding."""


class SagArgs(NamedTuple):
    """Run-time arguments of the SAG-ODE. `lifter` is None when all tokens run."""

    lifter: Lifter | None
    velocity_args: Any


def sag_ode(velocity: Velocity, grid: Grid, budget: int) -> diffrax.ODETerm:
    """The spatially approximated generative ODE of one stage, on [b, N, d] states.

    Args:
        velocity: the network.
        grid: rows and columns of tokens.
        budget: number of anchors; padded slots beyond it are masked.
    """
    n = grid[0] * grid[1]
    # diffrax traces a term three times over; under `jit` the network is traced once.
    velocity = jax.jit(velocity)

    def vector_field(sigma: Any, y: Float[Array, "b n d"], args: SagArgs) -> Array:
        if args.lifter is None:
            everywhere = jnp.broadcast_to(positions(jnp.arange(n), grid), (y.shape[0], n, 3))
            return velocity(y, everywhere, sigma, None, args.velocity_args).astype(y.dtype)
        anchors = args.lifter.anchors
        valid = anchors.valid if anchors.index.shape[1] > budget else None
        places = positions(anchors.index, grid)
        u = velocity(anchors.gather(y), places, sigma, valid, args.velocity_args)
        return args.lifter(u.astype(y.dtype))

    return diffrax.ODETerm(vector_field)


class MicroflowArgs(NamedTuple):
    """The micro-flow's target y* and the sigma T at which it is reached."""

    target: Float[Array, "b k d"]
    horizon: Array


def _towards_target(sigma: Any, y: Array, args: MicroflowArgs) -> Array:
    return (args.target - y) / (args.horizon - sigma)


microflow_ode = diffrax.ODETerm(_towards_target)
"""The deterministic micro-flow of new tokens, on [b, k, d] states (paper, DMF)."""
