"""Solvers whose state includes the last velocity, which activation and micro-flow need.

`diffrax` solvers do not return the velocity of the last step, and computing it again would cost a
network evaluation. The last entry of the state of each solver here is that velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MOST_EXTRAPOLATION = 2.0
"""Largest factor by which `Multistep` extrapolates the change of the clean prediction."""


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


class _TwoStepSolver(diffrax.AbstractSolver):
    """A method of second order that looks back one step.

    Its state is (values at the start of the last step, a number, the velocity of the last step);
    the number is 0 if there is no last step.
    """

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        """Return 2."""
        return 2

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any
    ) -> tuple[Array, Array, Array]:
        """Return zeros, since there is no previous step."""
        return jnp.zeros_like(y0), jnp.zeros_like(terms.contr(t0, t1)), jnp.zeros_like(y0)

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """Evaluate the vector field."""
        return terms.vf(t0, y0, args)


class AdamsBashforth2(_TwoStepSolver):
    """The two-step Adams-Bashforth method: second order for one network evaluation per step.

    The mean velocity over the step is extrapolated from the velocity u at its start and the
    velocity u_previous at the start of the previous step: u + r / 2 (u - u_previous), where r is
    the ratio of the step sizes. The first step of every stage is an Euler step, because the
    velocities are discontinuous between stages. The state is (velocity, step size, mean velocity)
    of the last step.

    Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", III.5, for
    steps of different sizes.

    Examples:
        >>> plan = jitjax.PLANS["4x"].replace(solver=jitjax.AdamsBashforth2())
        >>> plan.steps
        18
    """

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


class Multistep(_TwoStepSolver):
    """The two-step exponential integrator of the clean prediction, DPM-Solver++(2M).

    A step keeps the clean prediction constant instead of the velocity, which is exact for a single
    possible picture at any step size. With lambda = log((1 - sigma) / sigma),

        r = (lambda(sigma') - lambda(sigma)) / (lambda(sigma) - lambda(sigma_previous))
        D = x0 + r / 2 (x0 - x0_previous), with r / 2 at most `MOST_EXTRAPOLATION`
        y' = (sigma' / sigma) y + (1 - sigma' / sigma) D

    The first step, a step to sigma 0, and the one after a step from sigma 1 have D = x0.
    `jit_solve` keeps x0 of the last step over a transition; new tokens get the lifted clean
    prediction that their target is made from. The state is (x0, sigma at the start of the last
    step, the velocity (y - D) / sigma of that step). Sigmas are in (0, 1], but the last may be 0.

    Source: Lu et al., "DPM-Solver++", 2022, algorithm 2, for the flow y = (1 - sigma) x0 +
    sigma noise.
    """

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Array, None, dict[str, Array], tuple[Array, Array, Array], diffrax.RESULTS]:
        """Take a step with one network evaluation."""
        previous_clean, previous, _ = solver_state
        sigma, end = (jnp.asarray(t, y0.dtype) for t in (t0, t1))
        clean = y0 - sigma * terms.vf(t0, y0, args)
        is_second_order = (previous > 0) & (previous < 1) & (end > 0)

        def log_snr(value: Array) -> Array:
            value = jnp.where(is_second_order, value, 0.5)  # any number that gives no infinity
            return jnp.log1p(-value) - jnp.log(value)

        past = jnp.where(is_second_order, log_snr(sigma) - log_snr(previous), 1)
        half_ratio = (log_snr(end) - log_snr(sigma)) / past / 2
        half_ratio = jnp.where(is_second_order, jnp.minimum(half_ratio, MOST_EXTRAPOLATION), 0)
        extrapolated = clean + half_ratio * (clean - previous_clean)
        velocity = (y0 - extrapolated) / sigma
        y1 = y0 + terms.prod(velocity, terms.contr(t0, t1))
        state = (clean, sigma, velocity)
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful


def named_solver(solver: Any) -> Any:
    """Return the solver of a name in `jitjax.sampler.plan.SOLVERS`; anything else unchanged."""
    named = {"euler": Euler(), "multistep": Multistep()}
    return named.get(solver, solver) if isinstance(solver, str) else solver


def with_last_velocity(solver: Any) -> diffrax.AbstractSolver:
    """Return an equivalent solver whose state ends with the last velocity.

    Raises:
        ValueError: `solver` is no diffrax solver that takes fixed steps of an ordinary differential
            equation, or an implicit one without tolerances.
    """
    _check_solver(solver)
    if type(solver) is diffrax.Euler:
        return Euler()
    if isinstance(solver, Euler | AdamsBashforth2 | Multistep) and not isinstance(
        solver, diffrax.AbstractWrappedSolver
    ):
        return solver
    solver = _with_lax_scan(solver)
    return solver if isinstance(solver, MeanVelocitySolver) else MeanVelocitySolver(solver)


def _check_solver(solver: Any) -> None:
    if isinstance(solver, type):
        raise ValueError(f"solver is the class {solver.__name__}; expected an instance of it")
    if not isinstance(solver, diffrax.AbstractSolver):
        raise ValueError(f"solver is {solver!r}; expected a diffrax solver, or None for the plan's")
    name, inner = type(solver).__name__, solver
    while isinstance(inner, diffrax.AbstractWrappedSolver):
        inner = inner.solver
    structure = inner.term_structure
    if not (isinstance(structure, type) and issubclass(diffrax.ODETerm, structure)):
        raise ValueError(
            f"solver {name} needs the terms {structure}; expected a solver of ordinary "
            "differential equations with one term, such as diffrax.Heun()"
        )
    if isinstance(inner, diffrax.AbstractImplicitSolver) and not all(
        isinstance(tolerance, float | int | np.ndarray | jax.Array)
        for tolerance in (inner.root_finder.rtol, inner.root_finder.atol)
    ):
        raise ValueError(
            f"solver {name} has no tolerances for its root finder; expected for example "
            f"{type(inner).__name__}(root_finder=diffrax.VeryChord(rtol=1e-4, atol=1e-4))"
        )


def _with_lax_scan(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """Let Runge-Kutta methods scan their stages by `lax.scan`, which has all derivatives."""
    if isinstance(solver, diffrax.AbstractWrappedSolver):
        inner = _with_lax_scan(solver.solver)
        return eqx.tree_at(lambda wrapped: wrapped.solver, solver, inner)
    if isinstance(solver, diffrax.AbstractRungeKutta) and solver.scan_kind is None:
        return dataclasses.replace(solver, scan_kind="lax")
    return solver


def evaluations_per_step(solver: diffrax.AbstractSolver) -> int | None:
    """Return the number of network evaluations per step; None if it is unknown."""
    if isinstance(solver, MeanVelocitySolver):
        return evaluations_per_step(solver.solver)
    if isinstance(solver, Euler | AdamsBashforth2 | Multistep):
        return 1
    tableau = getattr(solver, "tableau", None)  # Runge-Kutta methods have one
    if isinstance(tableau, diffrax.ButcherTableau) and not tableau.fsal:
        return tableau.num_stages
    return None


def integrate(
    term: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    y: Float[Array, ...],
    sigmas: Float[Array, " levels"],
    args: Any,
    state: Any = None,
    *,
    every_step: bool = False,
    impose: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, Array | None, Any]:
    """Integrate `term` with one step between each two adjacent sigmas.

    The number of steps is known, so a `lax.scan` over them takes the place of
    `diffrax.diffeqsolve`, whose loop over an unknown number of steps has no forward mode and no
    second derivatives. The term decides what is kept for the gradient, by `jax.checkpoint`.

    Args:
        term: the differential equation.
        solver: the solver.
        y: state at `sigmas[0]`.
        sigmas: strictly decreasing sigmas.
        args: run-time arguments of the term.
        state: the solver's state from a previous call, to continue that solve; None to start one.
        every_step: whether to return the state after every step.
        impose: changes the state after every step, given the sigma that it is at: what is known of
            it. History of the solver is kept.

    Returns:
        The state at `sigmas[-1]`; the states after every step, [steps, ...] (None unless
        `every_step`); and the solver's state. From the first step on in which the root finder of
        an implicit solver does not converge, states are NaN.
    """
    if state is None:
        state = solver.init(term, sigmas[0], sigmas[1], y, args)
    # A failed root finder returns a wrong state, without an error.
    can_fail = isinstance(solver, diffrax.AbstractImplicitSolver)
    # Then some solvers may not use the velocity at the end of the last step for the next one.
    jumps = impose is not None

    def step(carry: tuple[Array, Any], interval: tuple[Array, Array]) -> tuple[Any, Array | None]:
        y, state = carry
        start, end = interval
        y, _, _, state, result = solver.step(term, start, end, y, args, state, made_jump=jumps)
        if can_fail:
            y = jnp.where(result == diffrax.RESULTS.successful, y, jnp.nan)
        if impose is not None:
            y = impose(y, end)
        return (y, state), y if every_step else None

    (y, state), states = jax.lax.scan(step, (y, state), (sigmas[:-1], sigmas[1:]))
    return y, states, state
