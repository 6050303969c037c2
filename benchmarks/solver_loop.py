"""The first stage of a plan twice: by diffrax's solver as `jit_solve` runs it, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jitjax
from benchmarks.speed_models import Bench, linear_velocity
from benchmarks.timing import compile_for
from jitjax.models.devices import compiler_options
from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.grid import positions
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.solvers import Euler, integrate
from jitjax.sampler.terms import SagArgs, Velocity, sag_ode

Call = Callable[[], jax.Array]


def stage_pair(bench: Bench, plan: jitjax.Plan, linear: bool = False) -> tuple[Call, Call]:
    """Compile the first stage of a plan that starts with few anchors.

    Args:
        bench: the transformer and its inputs.
        plan: the plan.
        linear: whether `linear_velocity` takes the place of the transformer.

    Returns:
        Two calls that return the last state, the one with diffrax and the one without.
    """
    velocity: Velocity = linear_velocity if linear else bench.velocity
    args = bench.linear_args if linear else bench.args
    anchors = bench.first_anchors(plan)
    if anchors is None:
        raise ValueError(f"{plan} starts with all tokens; expected fewer")
    budget, slots = anchors.shape[1], plan.slots(anchors.shape[1], bench.text)
    lifter = Lifter.build(
        AnchorSet.padded(anchors, slots, bench.tokens), bench.grid, budget, plan.lift
    )
    sigmas = bench.sigmas(plan)[: plan.stage_steps[0] + 1]

    def by_diffrax(y: jax.Array, sigmas: jax.Array, sag_args: SagArgs) -> jax.Array:
        return integrate(sag_ode(velocity, bench.grid, budget), Euler(), y, sigmas, sag_args)[0]

    def by_hand(y: jax.Array, sigmas: jax.Array, sag_args: SagArgs) -> jax.Array:
        lifter, args = sag_args
        assert lifter is not None
        anchors = lifter.anchors
        token_positions = positions(anchors.index, bench.grid)
        valid = anchors.valid if slots > budget else None

        def step(y: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            start, end = interval
            u = velocity(anchors.gather(y), token_positions, start, valid, args)
            return y + (end - start) * lifter(u), None

        return lax.scan(step, y, (sigmas[:-1], sigmas[1:]))[0]

    inputs: tuple[Any, ...] = (bench.noise, sigmas, SagArgs(lifter, args))
    diffrax_call, _ = compile_for(by_diffrax, *inputs, options=compiler_options())
    hand_call, _ = compile_for(by_hand, *inputs, options=compiler_options())
    error = float(jnp.abs(diffrax_call() - hand_call()).max())
    assert error < 1e-2, f"the loops differ by {error}"
    return diffrax_call, hand_call
