"""The transition between two stages: activate new anchors and move them to their target state.

    last velocity u --> scores --> new anchors Q
    y - sigma u = clean prediction x0 --> lifted --> noised = target y* of the new anchors
    micro-flow: Q y --> y*

Source: paper, importance-guided activation (ITA) and deterministic micro-flow (DMF).
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
    old_budget: int,
    budget: int,
    y: Float[Array, "b n d"],
    u: Float[Array, "b n d"],
    previous_sigma: Array,
    sigma: Array,
    lifter: Lifter,
    noise: Float[Array, "b n d"],
    random_scores: Float[Array, "b n"] | None,
    history: Float[Array, "b n d"] | None = None,
    *,
    record: bool = False,
) -> tuple[
    Float[Array, "b n d"], Int[Array, "b k"], Float[Array, "b n d"] | None, Transition | None
]:
    """Activate new anchors and run their micro-flow.

    Args:
        plan: the plan.
        old_budget: number of anchors of the stage that ends.
        budget: number of anchors of the next stage.
        y: state at `sigma`.
        u: velocity of the last step.
        previous_sigma: sigma at the start of the last step, where the micro-flow starts.
        sigma: sigma at the end of the last step, where the micro-flow ends.
        lifter: lifter of the stage that ends.
        noise: noise of the new anchors' targets.
        random_scores: scores of new anchors for `activation="random"`; otherwise unused.
        history: clean predictions that a multistep solver keeps; None for other solvers.
        record: whether to return a `Transition`.

    Returns:
        The state after the transition; the token indices of the next stage's anchors; the history,
        in which new anchors have the lifted clean prediction that their target is made from; and
        the `Transition` (None unless `record`).
    """
    b, n, _ = y.shape
    anchors, grid = lifter.anchors, lifter.grid
    if plan.activation == "importance":
        # The choice of anchors is piecewise constant in the state, so its gradient is zero.
        scores = jax.lax.stop_gradient(local_variance(u, grid))
    elif plan.activation == "grid":
        scores = fixed_grid_scores(b, grid)
    else:
        assert random_scores is not None
        scores = random_scores
    index, new_index = activate(anchors, scores, old_budget, budget)
    new = AnchorSet.padded(new_index, new_index.shape[1], n)
    clean = y - sigma * u  # Tweedie
    lifted = lifter.lift_clean(anchors.gather(clean))
    target = new.gather((1 - sigma) * lifted + sigma * noise)
    after = new.scatter(y, microflow(plan, new.gather(y), target, previous_sigma, sigma))
    transition_record = Transition(scores, lifted, new_index, target, y, after) if record else None
    if history is not None:
        history = new.scatter(history, new.gather(lifted))
    return after, index, history, transition_record


def microflow(
    plan: Plan,
    y: Float[Array, "b k d"],
    target: Float[Array, "b k d"],
    start: Array,
    end: Array,
) -> Float[Array, "b k d"]:
    """Move new tokens towards their target by the plan's micro-flow.

    "hit" reaches the target at sigma `end` (paper, DMF). The last Euler step covers the whole
    remaining gap, so the target is exact to rounding for any number of steps. "blend" integrates
    the same ODE with a target sigma that is `relax` times as far from `start`, so any number of
    Euler steps covers 1 / relax of the gap (the authors' program). "none" returns `y`.

    Args:
        plan: the plan.
        y: states of the new tokens.
        target: target states of the new tokens.
        start: sigma at which the micro-flow starts.
        end: sigma at which it ends, below `start`.
    """
    if plan.microflow == "none":
        return y
    factor = plan.relax if plan.microflow == "blend" else 1.0
    args = MicroflowArgs(target, target_sigma=start + factor * (end - start))
    sigmas = jnp.linspace(start, end, plan.microflow_steps + 1)
    moved, _, _ = integrate(microflow_ode, Euler(), y, sigmas, args)
    return moved
