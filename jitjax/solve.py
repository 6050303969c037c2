"""The staged solve, for any velocity function: SAG-ODE, micro-flow, SAG-ODE, ...

    noise --> [ SAG-ODE on few anchors ] --> transition --> [ SAG-ODE on more ] --> ... --> tokens
                                                 |
              last velocity u --> importance --> new anchors
                              --> clean prediction x0 --> lifted --> noised = target of new tokens

Nothing here knows FLUX: `jitjax.denoise` is this with FLUX plugged in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jitjax.anchors import AnchorSet, activate, local_variance
from jitjax.config import Plan
from jitjax.latents import Grid
from jitjax.lifter import Lifter
from jitjax.solvers import Euler, integrate, remembering
from jitjax.terms import MicroflowArgs, SagArgs, Velocity, microflow_ode, sag_ode


def jit_solve(
    velocity: Velocity,
    noise: Float[Array, "b n d"],
    sigmas: Float[Array, " levels"],
    *,
    plan: Plan,
    grid: Grid,
    first_anchors: Int[Array, "b k"] | None = None,
    microflow_noise: Float[Array, "b n d"] | None = None,
    args: Any = None,
    solver: diffrax.AbstractSolver | None = None,
    text_tokens: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Float[Array, "b n d"]:
    """Integrate from noise to clean tokens, on few tokens first (paper, algorithm 1).

    Args:
        velocity: see `jitjax.terms.Velocity`; hashable, best defined once, since each new
            function is compiled anew. Evaluated exactly `plan.steps` times.
        noise: state at `sigmas[0]`, float32 (or float64) tokens in row-major order.
        sigmas: the noise levels that the steps run between.
        plan: steps, stages, micro-flow.
        grid: rows and columns; rows * columns = n.
        first_anchors: the first stage's anchors; not needed by a plan of one stage.
        microflow_noise: noise of the new tokens' targets; by default the initial noise.
        args: anything `velocity` needs, such as parameters: gradients flow to it.
        solver: a diffrax solver; Euler by default.
        text_tokens: tokens that the network adds to the anchors, for `plan.pad_to`.
        progress: called with 1 after every step. The steps are then run one by one from Python
            and the function cannot be traced; without it, it can.

    Returns:
        tokens at `sigmas[-1]`, in the noise's dtype.

    Raises:
        ValueError: arrays whose shapes do not fit the plan and the grid, or first anchors that
            are not distinct tokens of the grid.
    """
    n = grid[0] * grid[1]
    budgets = plan.budgets(n)
    _check(noise, sigmas, plan, grid, first_anchors, microflow_noise)
    solver = remembering(solver or Euler())
    microflow_noise = noise if microflow_noise is None else microflow_noise
    y, index, start = noise, first_anchors, 0
    for stage, (budget, end) in enumerate(zip(budgets, plan.stage_steps, strict=True)):
        known = None
        if budget < n:
            slots = -(-(budget + text_tokens) // plan.pad_to) * plan.pad_to - text_tokens
            known = _prepare(index, slots, grid)
        anchors, lifter = known or (None, None)
        sag = SagArgs(anchors, lifter, args)
        static = (velocity, grid, budget, solver)
        y, u = _drive(static, y, sigmas[start : end + 1], sag, progress)
        if known is not None and end < plan.steps:
            last = sigmas[end - 1], sigmas[end]
            y, index = _transition(
                plan, grid, budget, budgets[stage + 1], y, u, *last, *known, microflow_noise
            )
        start = end
    return y


def _drive(
    static: tuple[Velocity, Grid, int, diffrax.AbstractSolver],
    y: Array,
    sigmas: Array,
    sag: SagArgs,
    progress: Callable[[int], Any] | None,
) -> tuple[Array, Array]:
    """Run one stage, at once or step by step; return its last state and last velocity."""
    if progress is None:
        y, state = _solve_stage(*static, y, sigmas, sag, None)
        return y, state[-1]
    # Made apart from the first step, so that all steps of a stage are one compiled program.
    state = _first_state(*static, y, sigmas[:2], sag)
    for i in range(sigmas.shape[0] - 1):
        y, state = _solve_stage(*static, y, sigmas[i : i + 2], sag, state)
        y.block_until_ready()
        progress(1)
    return y, state[-1]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solve_stage(
    velocity: Velocity,
    grid: Grid,
    budget: int,
    solver: diffrax.AbstractSolver,
    y: Array,
    sigmas: Array,
    sag: SagArgs,
    state: Any,
) -> tuple[Array, Any]:
    return integrate(sag_ode(velocity, grid, budget), solver, y, sigmas, sag, state)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _first_state(
    velocity: Velocity,
    grid: Grid,
    budget: int,
    solver: diffrax.AbstractSolver,
    y: Array,
    sigmas: Array,
    sag: SagArgs,
) -> Any:
    return solver.init(sag_ode(velocity, grid, budget), sigmas[0], sigmas[1], y, sag)


@partial(jax.jit, static_argnums=(1, 2))
def _prepare(index: Int[Array, "b k"], slots: int, grid: Grid) -> tuple[AnchorSet, Lifter]:
    anchors = AnchorSet.padded(index, slots, grid[0] * grid[1])
    return anchors, Lifter.build(anchors, grid)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _transition(
    plan: Plan,
    grid: Grid,
    known: int,
    budget: int,
    y: Float[Array, "b n d"],
    u: Float[Array, "b n d"],
    before: Array,
    sigma: Array,
    anchors: AnchorSet,
    lifter: Lifter,
    noise: Float[Array, "b n d"],
) -> tuple[Float[Array, "b n d"], Int[Array, "b k"]]:
    """Between two stages, at `sigma`: take up new anchors and move them to their targets.

    Returns the state and the next stage's anchors.
    """
    n = grid[0] * grid[1]
    # Which tokens are taken up is piecewise constant in the state: no gradient passes.
    index, new = activate(anchors, jax.lax.stop_gradient(local_variance(u, grid)), known, budget)
    fresh = AnchorSet.padded(new, new.shape[1], n)
    clean = y - sigma * u  # Tweedie
    lifted = lifter(anchors.gather(clean), grid, known / n)
    target = fresh.gather((1 - sigma) * lifted + sigma * noise)
    moved = microflow(plan, fresh.gather(y), target, before, sigma)
    return fresh.scatter(y, moved), index


def microflow(
    plan: Plan,
    y: Float[Array, "b k d"],
    target: Float[Array, "b k d"],
    start: Array,
    end: Array,
) -> Float[Array, "b k d"]:
    """Move new tokens towards their targets by the plan's micro-flow, from `start` to `end`.

    "hit" lets the flow end at `end`: Euler's step is the whole remaining way, so the target is
    hit to rounding (paper, DMF). "blend" lets the same flow end `relax` times as far away, so
    that one Euler step goes 1 / relax of the way (the authors' program).
    """
    times = plan.relax if plan.microflow == "blend" else 1.0
    horizon = start + times * (end - start)
    moved, _ = integrate(
        microflow_ode, Euler(), y, jnp.stack([start, end]), MicroflowArgs(target, horizon)
    )
    return moved


def _check(
    noise: Array,
    sigmas: Array,
    plan: Plan,
    grid: Grid,
    first_anchors: Array | None,
    microflow_noise: Array | None,
) -> None:
    n = grid[0] * grid[1]
    if noise.ndim != 3 or noise.shape[1] != n:
        raise ValueError(
            f"noise is {list(noise.shape)}; expected [batch, {n}, channels] for a token grid of "
            f"{grid[0]} x {grid[1]}"
        )
    if not jnp.issubdtype(noise.dtype, jnp.floating) or noise.dtype.itemsize < 4:
        raise ValueError(f"noise is {noise.dtype}; expected float32 (or float64)")
    if sigmas.shape != (plan.steps + 1,):
        raise ValueError(f"sigmas is {list(sigmas.shape)}; expected [{plan.steps + 1}]")
    if microflow_noise is not None and microflow_noise.shape != noise.shape:
        raise ValueError(
            f"microflow_noise is {list(microflow_noise.shape)}; expected the shape of noise, "
            f"{list(noise.shape)}"
        )
    budget = plan.budgets(n)[0]
    if budget == n:
        return
    if first_anchors is None:
        raise ValueError(f"first_anchors is None; this plan needs [{noise.shape[0]}, {budget}]")
    if first_anchors.shape != (noise.shape[0], budget):
        raise ValueError(
            f"first_anchors is {list(first_anchors.shape)}; expected "
            f"{[noise.shape[0], budget]} (density {plan.densities[0]} of {n} tokens)"
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
