"""The staged solve, for any velocity function: SAG-ODE, micro-flow, SAG-ODE, ...

    noise --> [ SAG-ODE on few anchors ] --> transition --> [ SAG-ODE on more ] --> ... --> tokens

Nothing here knows FLUX: `jitjax.denoise` is this with FLUX plugged in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import diffrax
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.checks import check_finite_velocity, check_inputs
from jitjax.sampler.grid import Grid
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.plan import Plan
from jitjax.sampler.solvers import Euler, evaluations_per_step, integrate, remembering
from jitjax.sampler.terms import SagArgs, Velocity, sag_ode
from jitjax.sampler.trace import Recorder, Trace
from jitjax.sampler.transition import transition


@dataclass(frozen=True)
class _Stage:
    """What is static about a stage: one compiled program for each."""

    velocity: Velocity
    grid: Grid
    budget: int
    solver: diffrax.AbstractSolver

    @property
    def term(self) -> diffrax.ODETerm:
        return sag_ode(self.velocity, self.grid, self.budget)


@overload
def jit_solve(*args: Any, trace: Literal[False] = False, **more: Any) -> Array: ...
@overload
def jit_solve(*args: Any, trace: Literal[True], **more: Any) -> tuple[Array, Trace]: ...
def jit_solve(
    velocity: Velocity,
    noise: Float[Array, "b n d"],
    sigmas: Float[Array, " levels"],
    *,
    plan: Plan,
    grid: Grid,
    first_anchors: Int[Array, "b k"] | None = None,
    microflow_noise: Float[Array, "b n d"] | None = None,
    random_scores: Float[Array, "b n"] | None = None,
    args: Any = None,
    solver: diffrax.AbstractSolver | None = None,
    text_tokens: int = 0,
    progress: Callable[[int], Any] | None = None,
    check_finite: bool = False,
    trace: bool = False,
) -> Float[Array, "b n d"] | tuple[Float[Array, "b n d"], Trace]:
    """Integrate from noise to clean tokens, on few tokens first (paper, algorithm 1).

    Args:
        velocity: see `jitjax.sampler.terms.Velocity`; hashable, best defined once, since each new
            function is compiled anew. With Euler evaluated exactly `plan.steps` times.
        noise: state at `sigmas[0]`, float32 (or float64) tokens in row-major order.
        sigmas: the falling noise levels that the steps run between.
        plan: steps, stages, anchors, micro-flow.
        grid: rows and columns; rows * columns = n.
        first_anchors: the first stage's anchors; not needed by a plan of one stage.
        microflow_noise: noise of the new tokens' targets; needed where the plan says "fresh", else
            by default the initial noise.
        random_scores: by which `activation="random"` chooses new anchors; else not used.
        args: anything `velocity` needs, such as parameters: gradients flow to it.
        solver: a diffrax solver; Euler by default.
        text_tokens: tokens that the network adds to the anchors, for `plan.pad_to`.
        progress: called with 1 after every step. The steps are then run one by one from Python
            and the function cannot be traced; without it, it can.
        check_finite: raise at the first step whose velocity is not finite; runs step by step
            as with `progress`.
        trace: also return what the run did.

    Returns:
        tokens at `sigmas[-1]`, in the noise's dtype; with `trace`, the tokens and a `Trace`.

    Raises:
        ValueError: arrays that are not finite, whose shapes do not fit the plan and the grid, or
            first anchors that are not distinct tokens of the grid. Before anything is compiled;
            values that are being traced cannot be looked at.
        FloatingPointError: a velocity is not finite (with `check_finite`).
    """
    n = grid[0] * grid[1]
    budgets = plan.budgets(n, text_tokens)
    check_inputs(plan, grid, budgets, noise, sigmas, first_anchors, microflow_noise, random_scores)
    if (progress or check_finite) and isinstance(noise, Tracer):
        raise ValueError("progress and check_finite need values; expected none of them under jit")
    solver = remembering(solver or Euler())
    microflow_noise = noise if microflow_noise is None else microflow_noise
    y, index, start = noise, first_anchors, 0
    record = Recorder() if trace else None
    for stage, (budget, end) in enumerate(zip(budgets, plan.stage_steps, strict=True)):
        lifter = None
        if budget < n:
            lifter = _prepare(index, plan.slots(budget, text_tokens), grid, plan.lift)
        run = _Stage(velocity, grid, budget, solver)
        y, u, every = _drive(
            run, y, sigmas[start : end + 1], SagArgs(lifter, args), progress, check_finite, start,
            trace,
        )  # fmt: skip
        if record:
            record.stage(every, index if lifter else None, y - sigmas[end] * u, lifter)
        happened = None
        if lifter is not None and end < plan.steps and budgets[stage + 1] > budget:
            last = sigmas[end - 1], sigmas[end]
            y, index, happened = transition(
                plan, budget, budgets[stage + 1], y, u, *last, lifter, microflow_noise,
                random_scores, record=trace,
            )  # fmt: skip
        if record and end < plan.steps:
            record.transitions.append(happened)
        start = end
    return (y, record.trace(evaluations_per_step(solver))) if record else y


def _drive(
    stage: _Stage,
    y: Array,
    sigmas: Array,
    sag: SagArgs,
    progress: Callable[[int], Any] | None,
    check_finite: bool,
    first_step: int,
    every_step: bool,
) -> tuple[Array, Array, Array | None]:
    """Run one stage, at once or step by step: its last state, last velocity and all states."""
    if progress is None and not check_finite:
        y, states, state = _solve(stage, every_step, y, sigmas, sag, None)
        return y, state[-1], states
    # Made apart from the first step, so that all steps of a stage are one compiled program.
    state = _first_state(stage, y, sigmas[:2], sag)
    states = []
    for i in range(sigmas.shape[0] - 1):
        y, one, state = _solve(stage, every_step, y, sigmas[i : i + 2], sag, state)
        states.append(one)
        if check_finite:
            check_finite_velocity(state[-1], first_step + i, sigmas[i])
        y.block_until_ready()
        if progress:
            progress(1)
    return y, state[-1], jnp.concatenate(states) if every_step else None


@partial(jax.jit, static_argnums=(0, 1))
def _solve(
    stage: _Stage, every_step: bool, y: Array, sigmas: Array, sag: SagArgs, state: Any
) -> tuple[Array, Array | None, Any]:
    return integrate(stage.term, stage.solver, y, sigmas, sag, state, every_step=every_step)


@partial(jax.jit, static_argnums=0)
def _first_state(stage: _Stage, y: Array, sigmas: Array, sag: SagArgs) -> Any:
    return stage.solver.init(stage.term, sigmas[0], sigmas[1], y, sag)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _prepare(index: Int[Array, "b k"], slots: int, grid: Grid, lift: str) -> Lifter:
    anchors = AnchorSet.padded(index, slots, grid[0] * grid[1])
    return Lifter.build(anchors, grid, index.shape[1], lift)
