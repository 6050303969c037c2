"""Solvers that remember the last velocity, which the micro-flow and the activation need.

`diffrax` solvers forget it after each step; asking the network again would cost a step. The
solvers here keep it as part of their state: the last entry of the state is the velocity.
"""

from __future__ import annotations

from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Euler(diffrax.Euler):
    """Euler's method whose state is the velocity of the last step: `y + v (sigma' - sigma)`."""

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> tuple[Array]:
        """No velocity is known before the first step; zeros stand for it."""
        return (jnp.zeros_like(y0),)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, None, dict[str, Array], tuple[Array], diffrax.RESULTS]:
        """One network evaluation, one step."""
        velocity = terms.vf(t0, y0, args)
        y1 = y0 + terms.prod(velocity, terms.contr(t0, t1))
        return y1, None, {"y0": y0, "y1": y1}, (velocity,), diffrax.RESULTS.successful


class Secant(diffrax.AbstractWrappedSolver):
    """Any diffrax solver, with the mean velocity of the last step added to its state."""

    solver: diffrax.AbstractSolver

    @property
    def term_structure(self) -> Any:  # type: ignore[override]
        """As the wrapped solver's."""
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        """As the wrapped solver's."""
        return self.solver.interpolation_cls

    def order(self, terms: Any) -> int | None:
        """As the wrapped solver's."""
        return self.solver.order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> tuple[Any, Array]:
        """The wrapped solver's state, and zeros for the velocity."""
        return self.solver.init(terms, t0, t1, y0, args), jnp.zeros_like(y0)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, Any, Any, tuple[Any, Array], diffrax.RESULTS]:
        """The wrapped solver's step; the velocity is its increment over the step's length."""
        inner, _ = solver_state
        y1, error, dense, inner, result = self.solver.step(
            terms, t0, t1, y0, args, inner, made_jump
        )
        return y1, error, dense, (inner, (y1 - y0) / terms.contr(t0, t1)), result

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """As the wrapped solver's."""
        return self.solver.func(terms, t0, y0, args)


class AdamsBashforth2(diffrax.AbstractSolver):
    """The two-step Adams-Bashforth method: second order for one network evaluation per step.

    The velocity at the start of the step and that of the step before are extrapolated to the
    mean over the step, with the true ratio r of step sizes: u + r / 2 (u - u_before). The first
    step of every stage is Euler's, since the anchors' velocities jump there. The last entry of
    the state is that mean.
    """

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        """Second."""
        return 2

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any
    ) -> tuple[Array, Array, Array]:
        """No velocity is known: a step of length 0 stands before the first one."""
        return jnp.zeros_like(y0), jnp.zeros_like(terms.contr(t0, t1)), jnp.zeros_like(y0)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, None, dict[str, Array], tuple[Array, Array, Array], diffrax.RESULTS]:
        """One network evaluation, one step."""
        before, last, _ = solver_state
        velocity, step = terms.vf(t0, y0, args), terms.contr(t0, t1)
        known = last != 0
        ratio = jnp.where(known, step / jnp.where(known, last, 1), 0).astype(y0.dtype)
        mean = velocity + ratio / 2 * (velocity - before)
        y1 = y0 + terms.prod(mean, step)
        state = (velocity, step, mean)
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """The vector field."""
        return terms.vf(t0, y0, args)


def remembering(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """`solver` in a form that remembers the last velocity."""
    if type(solver) is diffrax.Euler:
        return Euler()
    return solver if isinstance(solver, Euler | Secant | AdamsBashforth2) else Secant(solver)


def evaluations_per_step(solver: diffrax.AbstractSolver) -> int | None:
    """Network evaluations of one step; None where the solver does not say."""
    if isinstance(solver, Secant):
        return evaluations_per_step(solver.solver)
    if isinstance(solver, Euler | AdamsBashforth2):
        return 1
    tableau = getattr(solver, "tableau", None)  # of Runge-Kutta methods
    if isinstance(tableau, diffrax.ButcherTableau) and not tableau.fsal:
        return tableau.num_stages
    return None


class _StepTo(diffrax.StepTo):
    """`diffrax.StepTo` without its run-time checks: plans are validated before.

    The checks are host callbacks in the compiled program, and JAX's persistent cache does not
    keep programs that call back.
    """

    def wrap(self, direction: Any) -> _StepTo:
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
    """Solve `term` through exactly the given sigmas.

    Returns:
        the state at the last sigma; the states after every step, if asked for; and the solver's
        own state. Given back as `state`, the next call goes on as if there had been one.
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
        stepsize_controller=_StepTo(ts=sigmas),
        saveat=diffrax.SaveAt(t1=not every_step, steps=every_step, solver_state=True),
        solver_state=state,
        max_steps=steps,
        throw=False,
    )
    assert solution.ys is not None
    states = solution.ys if every_step else None
    return solution.ys[-1], states, solution.solver_state
