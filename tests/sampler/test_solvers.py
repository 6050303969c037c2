"""Solvers on a flow whose exact solution is known: a Gaussian mixture."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2, Euler, Secant, evaluations_per_step, integrate

MEANS, SPREADS, WEIGHTS = np.array([-1.2, 0.4, 1.9]), np.array([0.5, 0.3, 0.6]), (0.3, 0.3, 0.4)
GRID = (3, 4)


def mixture_velocity(tokens, positions, sigma, valid, args):
    """E[noise - x0 | x] where each number of x0 is drawn from the mixture."""
    # The last axis runs over the mixture.
    means, spreads, weights = (
        jnp.asarray(v, tokens.dtype).reshape(1, 1, 1, 3) for v in (MEANS, SPREADS, WEIGHTS)
    )
    x = tokens[..., None]
    variance = ((1 - sigma) * spreads) ** 2 + sigma**2
    gap = x - (1 - sigma) * means
    logits = jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * gap**2 / variance
    share = jax.nn.softmax(logits, axis=-1)
    x0 = (share * (means + (1 - sigma) * spreads**2 / variance * gap)).sum(-1)
    return (tokens - x0) / jnp.maximum(sigma, 1e-9)  # noise = (x - (1 - sigma) x0) / sigma


def exact(noise: np.ndarray, sigma: float) -> np.ndarray:
    """A flow in one dimension keeps quantiles: the x of the mixture's quantile of the noise."""
    spread = np.sqrt(((1 - sigma) * SPREADS) ** 2 + sigma**2)

    def below(x):
        return (WEIGHTS * norm.cdf(x[..., None], (1 - sigma) * MEANS, spread)).sum(-1)

    low, high = np.full(noise.shape, -20.0), np.full(noise.shape, 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        under = below(middle) < norm.cdf(noise)
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return low


def error(solver, steps: int, uneven: bool) -> float:
    """Mean error at sigma 0.1, in float64, all tokens active."""
    even = np.linspace(0, 1, steps + 1)
    levels = 1 - 0.9 * (even**1.5 if uneven else even)
    noise = np.random.default_rng(0).normal(size=(2, 12, 5))
    with jax.enable_x64(True):
        plan = Plan(steps, schedule=tuple(levels[:-1].tolist()))
        got = jit_solve(
            mixture_velocity,
            jnp.asarray(noise),
            jnp.asarray(levels),
            plan=plan,
            grid=GRID,
            solver=solver,
        )
    assert got.dtype == np.float64
    return float(np.abs(np.asarray(got) - exact(noise, 0.1)).mean())


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Euler(), 1),
        (diffrax.Euler(), 1),
        (diffrax.Heun(), 2),
        (AdamsBashforth2(), 2),
    ],
)
def test_order_of_convergence_to_the_exact_flow(solver, order, uneven):
    coarse, fine = error(solver, 40, uneven), error(solver, 80, uneven)
    assert fine < 0.02
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_adams_bashforth_is_exact_for_velocities_linear_in_sigma_at_any_steps():
    """But for its first step, Euler's: true ratios of the step sizes, not equal ones."""
    levels = jnp.asarray([1.0, 0.9, 0.6, 0.55, 0.2])
    term = diffrax.ODETerm(lambda t, y, args: 2 * t * jnp.ones_like(y))
    y, states, state = integrate(
        term, AdamsBashforth2(), jnp.zeros(1), levels, None, every_step=True
    )
    first = 2 * 1.0 * (0.9 - 1.0)
    expected = first + np.asarray(levels[1:]) ** 2 - 0.9**2
    np.testing.assert_allclose(states[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(state[-1], (y - states[-2]) / (0.2 - 0.55), rtol=1e-5)


def test_evaluations_per_step():
    counted = {
        evaluations_per_step(s): s for s in (Euler(), AdamsBashforth2(), Secant(diffrax.Heun()))
    }
    assert set(counted) == {1, 2}
    assert evaluations_per_step(Secant(diffrax.Tsit5())) is None  # reuses its last evaluation
