"""Between two stages: take up new anchors and move them to a state fit for the network.

    last velocity u --> scores --> new anchors Q
    y - sigma u = clean prediction x0 --> lifted --> noised = target y* of the new anchors
    micro-flow: Q y --> y*

Source: paper, importance-guided activation and deterministic micro-flow (DMF).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jitjax.sampler.anchors import AnchorSet, activate, fixed_grid_scores, local_variance
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.plan import Plan
from jitjax.sampler.solvers import Euler, integrate
from jitjax.sampler.terms import MicroflowArgs, microflow_ode
from jitjax.sampler.trace import Transition


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="record")
def transition(
    plan: Plan,
    known: int,
    budget: int,
    y: Float[Array, "b n d"],
    u: Float[Array, "b n d"],
    before: Array,
    sigma: Array,
    lifter: Lifter,
    noise: Float[Array, "b n d"],
    random_scores: Float[Array, "b n"] | None,
    *,
    record: bool = False,
) -> tuple[Float[Array, "b n d"], Int[Array, "b k"], Transition | None]:
    """Take up `budget - known` new anchors at `sigma`, after a step from sigma `before`.

    Returns:
        the state, the next stage's anchors, and, with `record`, what happened.
    """
    b, n, _ = y.shape
    anchors, grid = lifter.anchors, lifter.grid
    if plan.activation == "importance":
        # Which tokens are taken up is piecewise constant in the state: no gradient passes.
        scores = jax.lax.stop_gradient(local_variance(u, grid))
    elif plan.activation == "grid":
        scores = fixed_grid_scores(b, grid)
    else:
        assert random_scores is not None
        scores = random_scores
    index, new = activate(anchors, scores, known, budget)
    fresh = AnchorSet.padded(new, new.shape[1], n)
    clean = y - sigma * u  # Tweedie
    lifted = lifter.of_clean(anchors.gather(clean))
    target = fresh.gather((1 - sigma) * lifted + sigma * noise)
    after = fresh.scatter(y, microflow(plan, fresh.gather(y), target, before, sigma))
    happened = Transition(scores, lifted, new, target, y, after) if record else None
    return after, index, happened


def microflow(
    plan: Plan,
    y: Float[Array, "b k d"],
    target: Float[Array, "b k d"],
    start: Array,
    end: Array,
) -> Float[Array, "b k d"]:
    """Move new tokens towards their targets by the plan's micro-flow, from `start` to `end`.

    "hit" lets the flow end at `end`: the last of Euler's steps is the whole remaining way, so
    the target is hit to rounding (paper, DMF). "blend" lets the same flow end `relax` times as
    far away: any number of Euler steps then goes 1 / relax of the way (the authors' program).
    """
    if plan.microflow == "none":
        return y
    times = plan.relax if plan.microflow == "blend" else 1.0
    horizon = start + times * (end - start)
    sigmas = jnp.linspace(start, end, plan.microflow_steps + 1)
    moved, _, _ = integrate(microflow_ode, Euler(), y, sigmas, MicroflowArgs(target, horizon))
    return moved
