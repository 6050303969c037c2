"""Solvers on the flow of a Gaussian mixture, whose exact solution is known."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import (
    AdamsBashforth2,
    Euler,
    MeanVelocitySolver,
    Multistep,
    evaluations_per_step,
    integrate,
)

MEANS, SPREADS, WEIGHTS = np.array([-1.2, 0.4, 1.9]), np.array([0.5, 0.3, 0.6]), (0.3, 0.3, 0.4)
GRID = (3, 4)


def mixture_velocity(tokens, positions, sigma, valid, args):
    """Return E[noise - x0 | x], where every element of x0 is drawn from the mixture."""
    # The last axis holds the components of the mixture.
    means, spreads, weights = (
        jnp.asarray(v, tokens.dtype).reshape(1, 1, 1, 3) for v in (MEANS, SPREADS, WEIGHTS)
    )
    x = tokens[..., None]
    variance = ((1 - sigma) * spreads) ** 2 + sigma**2
    residual = x - (1 - sigma) * means
    logits = jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * residual**2 / variance
    posterior = jax.nn.softmax(logits, axis=-1)
    x0 = (posterior * (means + (1 - sigma) * spreads**2 / variance * residual)).sum(-1)
    return (tokens - x0) / jnp.maximum(sigma, 1e-9)  # noise = (x - (1 - sigma) x0) / sigma


def exact_solution(noise: np.ndarray, sigma: float) -> np.ndarray:
    """Compute the state at `sigma` that starts from `noise` at sigma 1.

    A flow in one dimension keeps quantiles, so the state is the value whose quantile under the
    mixture at `sigma` equals that of the noise. It is found by bisection.
    """
    spread = np.sqrt(((1 - sigma) * SPREADS) ** 2 + sigma**2)

    def mixture_cdf(x):
        return (WEIGHTS * norm.cdf(x[..., None], (1 - sigma) * MEANS, spread)).sum(-1)

    low, high = np.full(noise.shape, -20.0), np.full(noise.shape, 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        too_low = mixture_cdf(middle) < norm.cdf(noise)
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return low


def mean_error(solver, steps: int, uneven: bool, start: float) -> float:
    """Compute the mean error at sigma 0.1 of a dense solve in float64 from sigma `start`."""
    even = np.linspace(0, 1, steps + 1)
    sigmas = start - (start - 0.1) * (even**1.5 if uneven else even)
    noise = np.random.default_rng(0).normal(size=(2, 12, 5))
    with jax.enable_x64(True):
        plan = Plan(steps, schedule=tuple(sigmas[:-1].tolist()))
        got = jit_solve(
            mixture_velocity,
            jnp.asarray(exact_solution(noise, start)),
            jnp.asarray(sigmas),
            plan=plan,
            grid=GRID,
            solver=solver,
        )
    assert got.dtype == np.float64
    return float(np.abs(np.asarray(got) - exact_solution(noise, 0.1)).mean())


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    ("solver", "order", "start"),
    [
        (Euler(), 1, 1.0),
        (diffrax.Euler(), 1, 1.0),
        (diffrax.Heun(), 2, 1.0),
        (AdamsBashforth2(), 2, 1.0),
        # The logarithm has a pole at 1, from which even steps converge like h^2 log h.
        (Multistep(), 2, 0.95),
    ],
)
def test_order_of_convergence(solver, order, start, uneven):
    coarse, fine = (mean_error(solver, steps, uneven, start) for steps in (40, 80))
    assert fine < 0.02
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_adams_bashforth_is_exact_for_linear_velocity_and_uneven_steps():
    """Every step but the first, an Euler step, is exact for velocities linear in sigma."""
    sigmas = jnp.asarray([1.0, 0.9, 0.6, 0.55, 0.2])
    term = diffrax.ODETerm(lambda t, y, args: 2 * t * jnp.ones_like(y))
    y, states, state = integrate(
        term, AdamsBashforth2(), jnp.zeros(1), sigmas, None, every_step=True
    )
    euler_step = 2 * 1.0 * (0.9 - 1.0)
    expected = euler_step + np.asarray(sigmas[1:]) ** 2 - 0.9**2
    np.testing.assert_allclose(states[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(state[-1], (y - states[-2]) / (0.2 - 0.55), rtol=1e-5)


def test_evaluations_per_step():
    assert evaluations_per_step(Euler()) == 1
    assert evaluations_per_step(AdamsBashforth2()) == 1
    assert evaluations_per_step(Multistep()) == 1
    assert evaluations_per_step(MeanVelocitySolver(diffrax.Heun())) == 2
    # Tsit5 reuses the last evaluation of the previous step (FSAL).
    assert evaluations_per_step(MeanVelocitySolver(diffrax.Tsit5())) is None


def exponential(tokens, positions, sigma, valid, args):
    return tokens * args


def decay(solver, steps: int = 4, **options):
    """Solve dy / dsigma = 0.7 y from sigma 1 to 0; exactly y = exp(-0.7) at the end."""
    return jit_solve(
        exponential,
        jnp.ones((1, 4, 2)),
        jnp.linspace(1, 0, steps + 1),
        plan=Plan(steps),
        grid=(2, 2),
        args=0.7,
        solver=solver,
        **options,
    )


FINDER = diffrax.VeryChord(rtol=1e-5, atol=1e-5)
WORKING = [
    (diffrax.Tsit5(), 1e-5),
    (diffrax.Dopri8(), 1e-5),
    (diffrax.Midpoint(), 5e-3),
    (diffrax.ReversibleHeun(), 2e-2),
    (diffrax.HalfSolver(diffrax.Heun()), 2e-3),
    (diffrax.Kvaerno3(root_finder=FINDER), 1e-3),
    (diffrax.Kvaerno5(root_finder=FINDER), 1e-4),
]


@pytest.mark.parametrize(("solver", "tolerance"), WORKING, ids=lambda v: type(v).__name__)
def test_other_solvers_of_diffrax(solver, tolerance):
    np.testing.assert_allclose(decay(solver), np.exp(-0.7), rtol=tolerance)


def test_leapfrog_midpoint():
    """An Euler step, then y[n + 1] = y[n - 1] - 2 h 0.7 y[n] with 2 h 0.7 = 0.35."""
    values = [1.0, 1 - 0.175]
    for _ in range(3):
        values.append(values[-2] - 0.35 * values[-1])
    np.testing.assert_allclose(decay(diffrax.LeapfrogMidpoint()), values[-1], rtol=1e-6)


@pytest.mark.slow
def test_implicit_euler_and_its_gradient():
    """Each step is y' = y - h 0.7 y', so that four steps of 1/4 give (1 + 0.175) ** -4."""
    solver = diffrax.ImplicitEuler(root_finder=FINDER)
    np.testing.assert_allclose(decay(solver), (1 + 0.7 / 4) ** -4, rtol=1e-4)
    np.testing.assert_allclose(
        decay(solver, progress=lambda done: None), (1 + 0.7 / 4) ** -4, rtol=1e-4
    )

    def end(a):
        return jit_solve(
            exponential, jnp.ones((1, 1, 1)), jnp.linspace(1, 0, 5), plan=Plan(4), grid=(1, 1),
            args=a, solver=solver,
        ).sum()  # fmt: skip

    slope = -((1 + 0.7 / 4) ** -5)
    both = jax.jit(lambda a: (jax.grad(end)(a), jax.jvp(end, (a,), (1.0,))[1]))
    backward, forward = map(float, both(0.7))
    assert backward == pytest.approx(slope, rel=1e-3)
    assert forward == pytest.approx(slope, rel=1e-3)


def test_a_root_finder_that_does_not_converge_gives_nan():
    solver = diffrax.ImplicitEuler(root_finder=FINDER, root_find_max_steps=1)
    assert np.isnan(decay(solver)).all()


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (diffrax.Heun, "solver is the class Heun; expected an instance"),
        ("heun", "solver is 'heun'; expected a diffrax solver"),
        (diffrax.Kvaerno3(), "solver Kvaerno3 has no tolerances"),
        (diffrax.ImplicitEuler(), "solver ImplicitEuler has no tolerances"),
        (diffrax.HalfSolver(diffrax.ImplicitEuler()), "solver HalfSolver has no tolerances"),
        (diffrax.SemiImplicitEuler(), "solver SemiImplicitEuler needs the terms"),
        (diffrax.KenCarp3(root_finder=FINDER), "solver KenCarp3 needs the terms"),
        (diffrax.EulerHeun(), "solver EulerHeun needs the terms"),
        (diffrax.ShARK(), "solver ShARK needs the terms"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_solvers_that_do_not_fit_are_refused_by_name(solver, message):
    with pytest.raises(ValueError, match=message):
        decay(solver)
