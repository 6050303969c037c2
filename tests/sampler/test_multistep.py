"""The exponential two-step solver: its formula, its history over transitions, and bad input."""

from __future__ import annotations

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.sampler import solve as solve_module
from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import MOST_EXTRAPOLATION, Multistep, integrate

GRID = (6, 6)
N = GRID[0] * GRID[1]
LEVELS = (1.0, 0.95, 0.9, 0.82, 0.7, 0.55, 0.35, 0.15)
SIGMAS = jnp.asarray([*LEVELS, 0.0])
PLAN = Plan(
    8, (0.4, 0.7, 1.0), (0.375, 0.625, 1.0), LEVELS, microflow="hit", microflow_noise="initial"
)


def towards(goal):
    """The velocity if there is a single possible picture."""
    return diffrax.ODETerm(lambda sigma, y, args: (y - goal) / sigma)


def test_a_single_possible_picture_is_reached_exactly():
    goal = jnp.arange(4.0)
    y, _, _ = integrate(towards(goal), Multistep(), jnp.ones(4), SIGMAS, None)
    np.testing.assert_allclose(y, goal, rtol=0, atol=1e-6)


def test_steps_are_those_of_the_formula():
    """Three steps in NumPy; the second follows one from sigma 1, and is of first order."""
    sigmas = np.array([1.0, 0.8, 0.55, 0.3, 0.002])
    term = diffrax.ODETerm(lambda sigma, y, args: jnp.sin(3 * y) + sigma)
    y0 = np.array([0.3, -1.2])
    _, states, state = integrate(
        term, Multistep(), jnp.asarray(y0), jnp.asarray(sigmas), None, every_step=True
    )
    log_snr = np.log1p(-sigmas[1:]) - np.log(sigmas[1:])
    y, before = y0, None
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        clean = y - start * (np.sin(3 * y) + start)
        factor = 0.0
        if i >= 2:
            ratio = (log_snr[i] - log_snr[i - 1]) / (log_snr[i - 1] - log_snr[i - 2])
            factor = min(ratio / 2, MOST_EXTRAPOLATION)
        data = clean if before is None else clean + factor * (clean - before)
        velocity = (y - data) / start
        y, before = end / start * y + (1 - end / start) * data, clean
        np.testing.assert_allclose(states[i], y, rtol=0, atol=1e-5)
    assert factor == MOST_EXTRAPOLATION  # the last, long step
    np.testing.assert_allclose(state[-1], velocity, rtol=1e-4, atol=1e-5)


def covariance() -> np.ndarray:
    """Covariance of a smooth stationary Gaussian field on the torus of the grid."""
    frequencies = np.meshgrid(*(side * np.fft.fftfreq(side) for side in GRID), indexing="ij")
    spectrum = (1 + sum(f**2 for f in frequencies)) ** -1.5
    correlation = np.fft.ifft2(spectrum).real
    rows, columns = np.indices(GRID).reshape(2, -1)
    row_gaps, column_gaps = (x[:, None] - x[None] for x in (rows, columns))
    return correlation[row_gaps % GRID[0], column_gaps % GRID[1]] / correlation[0, 0]


COVARIANCE = covariance()


def gaussian_velocity(tokens, positions, sigma, valid, args):
    """E[noise - x0] given the states of any of the field's tokens, by Gaussian conditioning."""
    index = (positions[..., 1] * GRID[1] + positions[..., 2]).astype(int)
    known = jax.vmap(lambda i: jnp.asarray(COVARIANCE, tokens.dtype)[i][:, i])(index)
    total = (1 - sigma) ** 2 * known + sigma**2 * jnp.eye(index.shape[1])[None]
    clean = (1 - sigma) * known @ jnp.linalg.solve(total, tokens)
    return (tokens - clean) / sigma


def distance(plan: Plan) -> float:
    """Squared Wasserstein distance of the pictures from the field, over its variance.

    Each channel of the noise is a column of the identity, and the same anchors are used for all
    ("grid"). The result is the linear map from noise to pictures.
    """
    budget = plan.budgets(N)[0]
    first = jnp.asarray(np.random.default_rng(0).permutation(N)[None, :budget])
    linear_map = jit_solve(
        gaussian_velocity,
        jnp.eye(N)[None],
        SIGMAS,
        plan=plan.replace(activation="grid"),
        grid=GRID,
        first_anchors=first if budget < N else None,
    )[0]
    made = np.asarray(linear_map, np.float64)
    # Bures: tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2); the last is a sum of singular values.
    values, vectors = np.linalg.eigh(COVARIANCE)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    common = np.linalg.svd(root @ made, compute_uv=False).sum()
    return float(np.trace(COVARIANCE) + np.trace(made @ made.T) - 2 * common) / N


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PLAN, marks=pytest.mark.slow),
        PLAN.replace(densities=(1.0,), stage_ends=(1.0,)),
    ],
    ids=["sparse", "dense"],
)
def test_pictures_are_nearer_to_the_truth_than_eulers(plan):
    assert distance(plan.replace(solver="multistep")) < 0.6 * distance(plan)


@pytest.mark.slow
def test_history_is_kept_over_transitions_and_helps(monkeypatch):
    plan = PLAN.replace(solver="multistep")
    kept = distance(plan)

    class Forgetful(Multistep):
        """The same steps, but no history that `jit_solve` would know of."""

    def init(self, *args):
        return Multistep.init(self, *args)

    monkeypatch.setattr(solve_module, "Multistep", Forgetful)  # what `jit_solve` looks for
    assert kept < distance(plan)


def test_names_and_the_argument_choose_the_solver():
    def run(plan, **options):
        return jit_solve(
            gaussian_velocity, jnp.eye(N)[None], SIGMAS, plan=plan, grid=GRID, **options
        )

    plan = Plan(8, schedule=LEVELS)
    multistep = run(plan.replace(solver="multistep"))
    assert np.array_equal(multistep, run(plan, solver=Multistep()))
    assert np.array_equal(multistep, run(plan.replace(solver=Multistep())))
    assert np.array_equal(run(plan), run(plan.replace(solver="multistep"), solver=diffrax.Euler()))
    assert not np.allclose(multistep, run(plan), atol=1e-3)


@pytest.mark.parametrize("solver", ["heun", "", 3, None, Multistep, diffrax.Heun])
def test_unknown_solvers_are_refused(solver):
    with pytest.raises(ValueError, match=r"Plan.solver is .*; expected one of \('euler', 'multi"):
        Plan(4, solver=solver)


def test_a_solver_that_is_not_hashable_is_refused():
    with pytest.raises(ValueError, match=r"not hashable .* pass it to `denoise` or `jit_solve`"):
        Plan(4, solver=diffrax.ImplicitEuler(diffrax.VeryChord(jnp.ones(1), jnp.ones(1))))


@pytest.mark.parametrize("sigmas", [[1.2, 0.5, 0.1], [0.9, 0.0, -0.1], [0.9, 0.5, -0.1]])
def test_sigmas_without_a_logarithm_are_refused(sigmas):
    noise = jnp.zeros((1, N, 2))
    with pytest.raises(ValueError, match=r"expected values in \(0, 1\] for solver 'multistep'"):
        jit_solve(
            gaussian_velocity, noise, jnp.asarray(sigmas), plan=Plan(2, solver="multistep"),
            grid=GRID,
        )  # fmt: skip
