"""The staged solve for any velocity function: SAG-ODE, transition, SAG-ODE, ...

    noise --> [ SAG-ODE on few anchors ] --> transition --> [ SAG-ODE on more ] --> ... --> tokens

Source: paper, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, overload

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.checks import (
    as_array,
    check_finite_velocity,
    check_inputs,
    check_logarithmic_sigmas,
    check_not_traced,
    concrete,
    is_traced,
)
from jitjax.sampler.grid import Grid, as_grid
from jitjax.sampler.known import Known, check_known, check_known_anchors, known_lifter
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.meshes import with_auto_axes
from jitjax.sampler.plan import Plan, get_plan
from jitjax.sampler.progress import StepReports
from jitjax.sampler.solvers import (
    Multistep,
    evaluations_per_step,
    integrate,
    named_solver,
    with_last_velocity,
)
from jitjax.sampler.static import Static, split_arrays
from jitjax.sampler.terms import SagArgs, Velocity, sag_ode
from jitjax.sampler.trace import Recorder, Trace
from jitjax.sampler.transition import transition

VELOCITIES_KEPT = 8
"""Velocity functions whose compiled programs are kept; those of the others are freed."""


@dataclass(frozen=True)
class _Stage:
    """The static settings of a stage; each distinct value is compiled once.

    Attributes:
        solver: without its arrays, which are arguments of the compiled program.
    """

    solver: Static
    grid: Grid
    budget: int

    def build(
        self, velocity: Static, arrays: _Arrays
    ) -> tuple[diffrax.ODETerm, diffrax.AbstractSolver]:
        """Return the term and the solver of the stage."""
        term = sag_ode(velocity.join(arrays.velocity), self.grid, self.budget)
        return term, self.solver.join(arrays.solver)


class _Arrays(NamedTuple):
    """The arrays of the velocity function and of the solver; most have none."""

    velocity: list[Array]
    solver: list[Array]


@overload
def jit_solve(*args: Any, trace: Literal[False] = False, **kwargs: Any) -> Array: ...
@overload
def jit_solve(*args: Any, trace: Literal[True], **kwargs: Any) -> tuple[Array, Trace]: ...
@overload
def jit_solve(*args: Any, trace: bool, **kwargs: Any) -> Array | tuple[Array, Trace]: ...
@with_auto_axes("noise")
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
    known: Known | None = None,
    args: Any = None,
    solver: str | diffrax.AbstractSolver | None = None,
    text_tokens: int = 0,
    compiler_options: Mapping[str, bool | int | str] | None = None,
    progress: Callable[[int], Any] | StepReports | None = None,
    check_finite: bool = False,
    trace: bool = False,
) -> Float[Array, "b n d"] | tuple[Float[Array, "b n d"], Trace]:
    """Integrate from noise to clean tokens, on few anchors first (paper, algorithm 1).

    The function is pure and composes with all of JAX's transformations (reverse and forward mode
    of any order, `vmap`, `shard_map`, ...), unless `progress` or `check_finite` is set. For a
    gradient, only the state before each step is kept and each step is computed again.

    Arrays may be sharded over any mesh, with or without `jax.set_mesh`. The solve runs over auto
    axes; if the mesh has explicit ones, the result is sharded over the batch as `noise` is.

    Args:
        velocity: the velocity function, see `jitjax.sampler.terms.Velocity`: a hashable function,
            or a pytree such as an equinox module, whose arrays are differentiable arguments. Each
            new function (a lambda made in a loop) is compiled again, so define it once; the
            programs of the last `VELOCITIES_KEPT` functions are kept. With Euler's method it is
            evaluated exactly `plan.steps` times.
        noise: tokens at `sigmas[0]` in row-major order, float32 or float64.
        sigmas: strictly decreasing sigmas at the step boundaries, [plan.steps + 1], in [0, 1].
        plan: the settings of the run, or a name in `PLANS`.
        grid: rows and columns of tokens; rows * columns = n.
        first_anchors: token indices of the first stage's anchors, distinct and from 0 to n - 1, as
            many as `plan.budgets(n, text_tokens)[0]`; not needed if the first stage is dense.
        microflow_noise: noise of the new anchors' targets. Required if the first stage is sparse
            and the plan has a micro-flow with "fresh" noise; otherwise the default is `noise`.
        random_scores: scores by which `activation="random"` chooses new anchors; otherwise unused.
        known: for inpainting, what is known of the state at every sigma; it is imposed on `noise`
            and after every step. Then the run is one stage: the network sees `first_anchors` in
            every step (any number of them, with all tokens of the mask; n in unused slots, which
            are last), or all tokens if that is None, and other tokens have velocity 0.
        args: pytree passed to `velocity`, such as its parameters; differentiable.
        solver: a name or a diffrax solver, as in `Plan.solver`, which is the default. An
            implicit one needs a root finder with tolerances, and gives NaN where that does not
            converge.
        text_tokens: number of text tokens that the network runs on with the anchors, 0 or more, for
            `plan.pad_to`.
        compiler_options: options of XLA for the programs of the stages, as `jax.jit` takes them.
            They are ignored under a transformation: there they belong to the outermost `jax.jit`.
        progress: callback, called with 1 for every finished step. Each step is then dispatched
            from Python, a few ahead of the last finished one. If it is a `StepReports`, the caller
            finishes it.
        check_finite: whether to check the velocity of every step. Each step is then dispatched
            from Python.
        trace: whether to return a `Trace` too.

    Returns:
        Tokens at `sigmas[-1]` in the dtype of `noise`; with `trace`, a tuple of the tokens and
        the `Trace`.

    Raises:
        ValueError: the velocity is no hashable function or pytree, the solver does not fit, an
            array is missing, not finite, or does not fit the plan and the grid, or the
            first anchors are not distinct tokens of the grid; or `progress` or `check_finite` is
            set under a transformation. Raised before compilation; values of traced arrays
            are not checked.
        FloatingPointError: a velocity is not finite (only with `check_finite`).

    Examples:
        The velocity of the straight flow to one known picture, which any plan has to find:

        >>> def velocity(tokens, positions, sigma, valid, picture):
        ...     return (tokens - picture[positions[..., 1] * 4 + positions[..., 2]]) / sigma
        >>> plan = jitjax.Plan(2)  # two dense Euler steps
        >>> noise, picture = jax.random.normal(jax.random.key(0), (1, 16, 3)), jnp.ones((16, 3))
        >>> sigmas = jnp.array([1.0, 0.5, 0.0])
        >>> tokens = jitjax.jit_solve(velocity, noise, sigmas, plan=plan, grid=(4, 4), args=picture)
        >>> bool(jnp.allclose(tokens, picture[None]))
        True
    """
    plan, grid = get_plan(plan), as_grid(grid)
    n = grid[0] * grid[1]
    if known is not None:
        plan = plan.replace(densities=(1.0,), stage_ends=(1.0,))
    budgets = plan.budgets(n, text_tokens)
    noise, sigmas = as_array("noise", noise), as_array("sigmas", sigmas)
    if not callable(velocity):
        raise ValueError(f"velocity is a {type(velocity).__name__}; expected a function")
    check_inputs(plan, grid, budgets, noise, sigmas, first_anchors, microflow_noise, random_scores)
    if known is not None:
        known = check_known(known, noise.shape)
        if first_anchors is not None:
            check_known_anchors(first_anchors, known)
            used = concrete(first_anchors)
            # Unused slots are masked, unless there are none, which is only known of known values.
            # So masks that need as many slots share a program.
            count = first_anchors.shape[1]
            full = used is not None and used.max() < n and plan.slots(count, text_tokens) == count
            budgets = (count if full else 0,)
    solver = with_last_velocity(named_solver(plan.solver if solver is None else solver))
    # diffrax's wrappers are instances of what they wrap, but their state is another.
    keeps_history = isinstance(solver, Multistep) and not isinstance(
        solver, diffrax.AbstractWrappedSolver
    )
    if keeps_history:
        check_logarithmic_sigmas(sigmas)
    velocity_arrays, static_velocity = split_arrays("velocity", velocity)
    solver_arrays, static_solver = split_arrays("solver", solver)
    arrays = _Arrays(velocity_arrays, solver_arrays)
    stepwise = progress is not None or check_finite
    inputs = (noise, sigmas, first_anchors, microflow_noise, random_scores, known, args, arrays)
    if stepwise:
        check_not_traced(*inputs)
    options = tuple(sorted((compiler_options or {}).items()))
    if options and is_traced(*inputs):
        options = ()
    known_sigmas = concrete(sigmas)  # a slice of a NumPy array needs no program
    levels: Any = (sigmas if known_sigmas is None else known_sigmas).astype(noise.dtype)
    microflow_noise = noise if microflow_noise is None else microflow_noise
    y, index, start, solver_state = noise, first_anchors, 0, None
    if known is not None:
        known = jax.tree.map(lambda array: jnp.asarray(array, noise.dtype), known)
        y = _impose(known, y, levels[0])
    recorder = Recorder(y, jnp.asarray(levels)) if trace else None
    reports = progress if isinstance(progress, StepReports) else StepReports(progress)
    for k, (budget, end) in enumerate(zip(budgets, plan.stage_steps, strict=True)):
        lifter = None
        if known is not None:
            if index is not None:
                lifter = known_lifter(index, plan.slots(index.shape[1], text_tokens), grid)
        elif budget < n:
            lifter = _build_lifter(index, plan.slots(budget, text_tokens), grid, plan.lift)
        stage = _Stage(static_solver, grid, budget)
        y, solver_state, states = _run_stage(
            _programs(static_velocity, options), stage, arrays, y, levels[start : end + 1],
            SagArgs(lifter, args), known, solver_state, reports if stepwise else None, check_finite,
            start, trace,
        )  # fmt: skip
        u = solver_state[-1]
        solver_state = solver_state if keeps_history else None
        if recorder:
            recorder.add_stage(states, index if lifter else None, y - levels[end] * u, lifter)
        transition_record = None
        if lifter is not None and end < plan.steps and budgets[k + 1] > budget:
            last_step = jnp.asarray(levels[end - 1]), jnp.asarray(levels[end])
            y, index, history, transition_record = transition(
                plan, budget, budgets[k + 1], y, u, *last_step, lifter, microflow_noise,
                random_scores, solver_state[0] if solver_state else None, record=trace,
            )  # fmt: skip
            if solver_state:
                solver_state = (history, *solver_state[1:])
        if recorder and end < plan.steps:
            recorder.transitions.append(transition_record)
        start = end
    if reports is not progress:
        reports.finish()
    return (y, recorder.to_trace(evaluations_per_step(solver))) if recorder else y


def _run_stage(
    programs: _Programs,
    stage: _Stage,
    arrays: _Arrays,
    y: Array,
    sigmas: Array | np.ndarray,
    sag_args: SagArgs,
    known: Known | None,
    solver_state: Any,
    reports: StepReports | None,
    check_finite: bool,
    first_step: int,
    every_step: bool,
) -> tuple[Array, Any, Array | None]:
    """Run one stage: in one call, or step by step if there are `reports`.

    Returns:
        The last state, the solver's state, and the states after every step (None unless
        `every_step`).
    """
    if reports is None:
        y, states, solver_state = programs.integrate(
            stage, every_step, arrays, y, sigmas, sag_args, known, solver_state
        )
        return y, solver_state, states
    # Initialised outside the first step, so that all steps of a stage share one compiled program.
    if solver_state is None:
        y, solver_state = programs.init(stage, arrays, y, sigmas[:2], sag_args)
    check_not_traced(y, solver_state)  # the velocity may hold traced values
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (y, solver_state))
    states = []
    for i in range(sigmas.shape[0] - 1):
        y, step_states, solver_state = programs.integrate(
            stage, every_step, arrays, y, sigmas[i : i + 2], sag_args, known, solver_state
        )
        check_not_traced(y)
        # XLA may shard the result in another way, for which the next step would be compiled again.
        y, solver_state = jax.tree.map(_place, (y, solver_state), shardings)
        states.append(step_states)
        if check_finite:
            check_finite_velocity(solver_state[-1], first_step + i, sigmas[i])
        reports.add(y)
    return y, solver_state, jnp.concatenate(states) if every_step else None


def _place(array: Array, sharding: jax.sharding.Sharding) -> Array:
    # `device_put` would also commit the array, for which the next step would be compiled again.
    return array if array.sharding == sharding else jax.device_put(array, sharding)


class _Programs(NamedTuple):
    """The compiled functions of a stage.

    Attributes:
        integrate: the steps between the given sigmas.
        init: the state and the solver's state before the first step.
    """

    integrate: Callable[..., tuple[Array, Array | None, Any]]
    init: Callable[..., tuple[Array, Any]]


@lru_cache(maxsize=VELOCITIES_KEPT)
def _programs(velocity: Static, options: tuple[tuple[str, bool | int | str], ...]) -> _Programs:
    """Return the compiled functions for one velocity function.

    JAX keeps the programs as long as the jitted function itself, and static arguments for ever. So
    each velocity has jitted functions of its own that close over it, and the cache is bounded.
    """

    @partial(jax.jit, static_argnums=(0, 1), compiler_options=dict(options) or None)
    def _integrate(
        stage: _Stage,
        every_step: bool,
        arrays: _Arrays,
        y: Array,
        sigmas: Array,
        sag_args: SagArgs,
        known: Known | None,
        solver_state: Any,
    ) -> tuple[Array, Array | None, Any]:
        term, solver = stage.build(velocity, arrays)
        return integrate(
            term,
            solver,
            y,
            sigmas,
            sag_args,
            solver_state,
            every_step=every_step,
            impose=None if known is None else known.impose,
        )

    # All arguments are kept and `y` passes through a barrier, so that the results are on the same
    # devices, and as committed to them, as those of a step.
    @partial(jax.jit, static_argnums=0, keep_unused=True)
    def _init(
        stage: _Stage, arrays: _Arrays, y: Array, sigmas: Array, sag_args: SagArgs
    ) -> tuple[Array, Any]:
        term, solver = stage.build(velocity, arrays)
        state = solver.init(term, sigmas[0], sigmas[1], y, sag_args)
        return jax.lax.optimization_barrier((y, state))

    return _Programs(_integrate, _init)


@jax.jit
def _impose(known: Known, y: Array, sigma: Array) -> Array:
    return known.impose(y, sigma)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _build_lifter(index: Int[Array, "b k"], slots: int, grid: Grid, lift: str) -> Lifter:
    anchors = AnchorSet.padded(index, slots, grid[0] * grid[1])
    return Lifter.build(anchors, grid, index.shape[1], lift)
