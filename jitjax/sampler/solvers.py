"""Solvers whose state includes the last velocity, which activation and micro-flow need.

`diffrax` solvers do not return the velocity of the last step, and computing it again would cost a
network evaluation. The last entry of the state of each solver here is that velocity.
"""

from __future__ import annotations

from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Euler(diffrax.Euler):
    """Euler's method, `y + v (sigma' - sigma)`, whose state is the velocity v of the last step."""

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> tuple[Array]:
        """Return zeros, since there is no velocity before the first step."""
        return (jnp.zeros_like(y0),)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, None, dict[str, Array], tuple[Array], diffrax.RESULTS]:
        """Take a step with one network evaluation."""
        velocity = terms.vf(t0, y0, args)
        y1 = y0 + terms.prod(velocity, terms.contr(t0, t1))
        return y1, None, {"y0": y0, "y1": y1}, (velocity,), diffrax.RESULTS.successful


class MeanVelocitySolver(diffrax.AbstractWrappedSolver):
    """Wraps any diffrax solver and adds the mean velocity of the last step to its state.

    Attributes:
        solver: the wrapped solver.
    """

    solver: diffrax.AbstractSolver

    @property
    def term_structure(self) -> Any:  # type: ignore[override]
        """Same as the wrapped solver's."""
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        """Same as the wrapped solver's."""
        return self.solver.interpolation_cls

    def order(self, terms: Any) -> int | None:
        """Same as the wrapped solver's."""
        return self.solver.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> tuple[Any, Array]:
        """Return the wrapped solver's state, and zeros for the velocity."""
        return self.solver.init(terms, t0, t1, y0, args), jnp.zeros_like(y0)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, Any, Any, tuple[Any, Array], diffrax.RESULTS]:
        """Take a step of the wrapped solver; the mean velocity is the increment per unit sigma."""
        inner_state, _ = solver_state
        y1, error, dense_info, inner_state, result = self.solver.step(
            terms, t0, t1, y0, args, inner_state, made_jump
        )
        mean_velocity = (y1 - y0) / terms.contr(t0, t1)
        return y1, error, dense_info, (inner_state, mean_velocity), result

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """Same as the wrapped solver's."""
        return self.solver.func(terms, t0, y0, args)


class AdamsBashforth2(diffrax.AbstractSolver):
    """The two-step Adams-Bashforth method: second order for one network evaluation per step.

    The mean velocity over the step is extrapolated from the velocity u at its start and the
    velocity u_previous at the start of the previous step: u + r / 2 (u - u_previous), where r is
    the ratio of the step sizes. The first step of every stage is an Euler step, because the
    velocities are discontinuous between stages. The state is (velocity, step size, mean velocity)
    of the last step.
    """

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        """Return 2."""
        return 2

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any
    ) -> tuple[Array, Array, Array]:
        """Return zeros: a previous step of length 0 means that there is none."""
        return jnp.zeros_like(y0), jnp.zeros_like(terms.contr(t0, t1)), jnp.zeros_like(y0)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, None, dict[str, Array], tuple[Array, Array, Array], diffrax.RESULTS]:
        """Take a step with one network evaluation."""
        previous_velocity, previous_step, _ = solver_state
        velocity, step = terms.vf(t0, y0, args), terms.contr(t0, t1)
        has_previous = previous_step != 0
        ratio = jnp.where(has_previous, step / jnp.where(has_previous, previous_step, 1), 0)
        mean = velocity + ratio.astype(y0.dtype) / 2 * (velocity - previous_velocity)
        y1 = y0 + terms.prod(mean, step)
        state = (velocity, step, mean)
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """Evaluate the vector field."""
        return terms.vf(t0, y0, args)


def with_last_velocity(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """Return an equivalent solver whose state ends with the last velocity."""
    if type(solver) is diffrax.Euler:
        return Euler()
    if isinstance(solver, Euler | MeanVelocitySolver | AdamsBashforth2):
        return solver
    return MeanVelocitySolver(solver)


def evaluations_per_step(solver: diffrax.AbstractSolver) -> int | None:
    """Return the number of network evaluations per step; None if it is unknown."""
    if isinstance(solver, MeanVelocitySolver):
        return evaluations_per_step(solver.solver)
    if isinstance(solver, Euler | AdamsBashforth2):
        return 1
    tableau = getattr(solver, "tableau", None)  # Runge-Kutta methods have one
    if isinstance(tableau, diffrax.ButcherTableau) and not tableau.fsal:
        return tableau.num_stages
    return None


class _UncheckedStepTo(diffrax.StepTo):
    """`diffrax.StepTo` without its run-time checks; the sigmas are validated before the solve.

    The checks are host callbacks in the compiled program, and JAX's persistent compilation cache
    does not store programs with host callbacks.
    """

    def wrap(self, direction: Any) -> _UncheckedStepTo:
        return type(self)(ts=self.ts * direction)

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        dt0: Any,
        args: Any,
        func: Any,
        error_order: Any,
    ) -> tuple[Array, int]:
        return self.ts[1], 2


def integrate(
    term: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    y: Float[Array, ...],
    sigmas: Float[Array, " levels"],
    args: Any,
    state: Any = None,
    *,
    every_step: bool = False,
) -> tuple[Array, Array | None, Any]:
    """Integrate `term` with one step between each two adjacent sigmas.

    Args:
        term: the differential equation.
        solver: the solver.
        y: state at `sigmas[0]`.
        sigmas: strictly decreasing sigmas.
        args: run-time arguments of the term.
        state: the solver's state from a previous call, to continue that solve; None to start one.
        every_step: whether to return the state after every step.

    Returns:
        The state at `sigmas[-1]`; the states after every step, [steps, ...] (None unless
        `every_step`); and the solver's state.
    """
    steps = sigmas.shape[0] - 1
    solution = diffrax.diffeqsolve(
        term,
        solver,
        t0=sigmas[0],
        t1=sigmas[-1],
        dt0=None,
        y0=y,
        args=args,
        stepsize_controller=_UncheckedStepTo(ts=sigmas),
        saveat=diffrax.SaveAt(t1=not every_step, steps=every_step, solver_state=True),
        solver_state=state,
        max_steps=steps,
        throw=False,
    )
    assert solution.ys is not None
    states = solution.ys if every_step else None
    return solution.ys[-1], states, solution.solver_state
