"""The two differential equations of the method as diffrax terms.

SAG-ODE, one per stage:              d y / d sigma = Pi_k u(S_k^T y, sigma)
Micro-flow, for new tokens only:     d y / d sigma = (y* - y) / (T - sigma)
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
velocities [b, m, d]`: any network. `valid` is False in padded slots, and None if there are none;
the velocities of valid tokens must not depend on padded slots. Positions are (0, row, column),
int32; `sigma` is in (0, 1]. The velocity is noise - x0, the derivative with respect to sigma of
y = (1 - sigma) x0 + sigma noise. `args` is passed through by `jit_solve`."""


class SagArgs(NamedTuple):
    """Run-time arguments of the SAG-ODE.

    Attributes:
        lifter: the stage's lifter; None if the network runs on all tokens.
        velocity_args: the last argument of the velocity function.
    """

    lifter: Lifter | None
    velocity_args: Any


def sag_ode(velocity: Velocity, grid: Grid, budget: int) -> diffrax.ODETerm:
    """Build the spatially approximated generative ODE of one stage (paper, SAG-ODE).

    Args:
        velocity: the velocity function.
        grid: rows and columns of tokens.
        budget: number of anchors; the slots beyond it are padded and masked.

    Returns:
        A term over states [b, N, d] with `SagArgs` as its arguments. For a gradient, it keeps its
        arguments and evaluates the network again.
    """
    n = grid[0] * grid[1]
    # Solvers trace a term several times; `jit` makes them trace the network once.
    # In a function of its own, because a velocity that holds traced arrays is not hashable.
    traced_once = jax.jit(lambda *inputs: velocity(*inputs))

    @jax.checkpoint
    def vector_field(sigma: Any, y: Float[Array, "b n d"], args: SagArgs) -> Array:
        if args.lifter is None:
            all_positions = jnp.broadcast_to(positions(jnp.arange(n), grid), (y.shape[0], n, 3))
            return traced_once(y, all_positions, sigma, None, args.velocity_args).astype(y.dtype)
        anchors = args.lifter.anchors
        valid = anchors.valid if anchors.index.shape[1] > budget else None
        anchor_positions = positions(anchors.index, grid)
        u = traced_once(anchors.gather(y), anchor_positions, sigma, valid, args.velocity_args)
        return args.lifter(u.astype(y.dtype))

    return diffrax.ODETerm(vector_field)


class MicroflowArgs(NamedTuple):
    """Run-time arguments of the micro-flow.

    Attributes:
        target: the target state y* of the new tokens.
        target_sigma: the sigma T at which they reach it.
    """

    target: Float[Array, "b k d"]
    target_sigma: Array


def _microflow_velocity(sigma: Any, y: Array, args: MicroflowArgs) -> Array:
    return (args.target - y) / (args.target_sigma - sigma)


microflow_ode = diffrax.ODETerm(_microflow_velocity)
"""The deterministic micro-flow of new tokens (paper, DMF): a term over states [b, k, d]."""
