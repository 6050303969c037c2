"""The staged solve on velocity functions that need no network, and `denoise` on a random FLUX."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import jitjax
from jitjax.anchors import AnchorSet, activate, first_anchors, local_variance
from jitjax.config import PLANS, Plan
from jitjax.latents import draw_noise, pack, positions, unpack
from jitjax.lifter import Lifter
from jitjax.schedule import plan_sigmas
from jitjax.solve import jit_solve, microflow
from jitjax.solvers import Euler, integrate

GRID = (6, 7)
N = GRID[0] * GRID[1]
PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0))


@dataclass(frozen=True)
class Pull:
    """Velocity of a flow to a point that depends on the token's place, evaluations counted."""

    poison: bool = False

    def __call__(self, tokens, positions, sigma, valid, args):
        jax.debug.callback(lambda: COUNT.update(["evaluations"]))
        place = positions[..., 1:].sum(-1, keepdims=True)
        goal = jnp.sin(place * args)
        u = (tokens - goal) / jnp.maximum(sigma, 0.05)
        if self.poison and valid is not None:
            u = jnp.where(valid[..., None], u, jnp.nan)
        return u


COUNT: Counter[str] = Counter()


def solve(plan=PLAN, batch=2, *, seed=0, poison=False, **more):
    keys = jax.random.split(jax.random.key(seed), batch)
    noise = more.pop("noise", draw_noise(keys, GRID, 8))
    budget = plan.budgets(N)[0]
    first = jax.vmap(lambda k: first_anchors(k, GRID, budget))(keys) if budget < N else None
    sigmas = jnp.asarray(plan_sigmas(plan, N, jitjax.FluxConfig()), noise.dtype)
    args = more.pop("args", jnp.float32(0.3))
    return jit_solve(
        Pull(poison), noise, sigmas, plan=plan, grid=GRID, first_anchors=first, args=args, **more
    )


@pytest.mark.parametrize("plan", [PLAN, PLAN.replace(pad_to=32), Plan(5)])
@pytest.mark.parametrize("progress", [None, lambda done: COUNT.update(["progress"])])
def test_the_network_is_evaluated_once_per_step(plan, progress):
    COUNT.clear()
    jax.block_until_ready(solve(plan, progress=progress))
    jax.effects_barrier()
    assert COUNT["evaluations"] == plan.steps
    assert COUNT["progress"] == (plan.steps if progress else 0)


def test_step_by_step_equals_all_at_once():
    np.testing.assert_allclose(solve(), solve(progress=lambda done: None), rtol=1e-6, atol=1e-6)


def test_a_dense_plan_is_plain_euler():
    plan = Plan(7)
    got = solve(plan)
    y = draw_noise(jax.random.split(jax.random.key(0), 2), GRID, 8)
    sigmas = plan_sigmas(plan, N, jitjax.FluxConfig())
    place = positions(jnp.arange(N), GRID)[None]
    for a, b in itertools.pairwise(sigmas):
        y = y + Pull()(y, place, a, None, jnp.float32(0.3)) * (b - a)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)


def test_padding_does_not_matter_whatever_the_network_makes_of_it():
    plain = solve()
    for pad_to in (16, 40):
        padded = solve(PLAN.replace(pad_to=pad_to), poison=True, text_tokens=5)
        np.testing.assert_allclose(padded, plain, rtol=1e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    both = solve()
    keys = jax.random.split(jax.random.key(0), 2)
    for i in range(2):
        one = keys[i : i + 1]
        first = jax.vmap(lambda k: first_anchors(k, GRID, PLAN.budgets(N)[0]))(one)
        alone = jit_solve(
            Pull(),
            draw_noise(one, GRID, 8),
            jnp.asarray(plan_sigmas(PLAN, N, jitjax.FluxConfig())),
            plan=PLAN,
            grid=GRID,
            first_anchors=first,
            args=jnp.float32(0.3),
        )
        np.testing.assert_allclose(alone[0], both[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [Euler(), diffrax.Euler(), diffrax.Heun()])
def test_any_solver_may_be_given(solver):
    # The flow is linear towards a fixed point: every solver ends near it.
    y = solve(Plan(40, (0.5, 1.0), (0.2, 1.0)), solver=solver)
    place = positions(jnp.arange(N), GRID)[:, 1:].sum(-1)
    goal = jnp.sin(place * 0.3)[None, :, None]
    assert float(jnp.abs(y - goal).max()) < 0.2


def test_traces_under_jit_vmap_and_grad():
    plain = solve()
    keys = jax.random.split(jax.random.key(0), 2)
    noise = draw_noise(keys, GRID, 8)
    np.testing.assert_allclose(
        jax.jit(lambda y: solve(noise=y))(noise), plain, rtol=1e-5, atol=1e-5
    )
    stacked = jax.vmap(lambda y: solve(noise=y))(jnp.stack([noise, noise + 1]))
    np.testing.assert_allclose(stacked[0], plain, rtol=1e-5, atol=1e-5)

    def loss(noise, args):
        return (solve(noise=noise, args=args) ** 2).mean()

    to_noise, to_args = jax.grad(loss, argnums=(0, 1))(noise, jnp.float32(0.3))
    assert bool(jnp.isfinite(to_noise).all())
    assert float(jnp.abs(to_noise).max()) > 0
    step = 1e-3
    difference = (loss(noise, 0.3 + step) - loss(noise, 0.3 - step)) / (2 * step)
    np.testing.assert_allclose(to_args, difference, rtol=1e-2)  # float32 differences


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_hitting_micro_flow_hits_for_any_partition(steps):
    from jitjax.terms import MicroflowArgs, microflow_ode

    y, target = jax.random.normal(jax.random.key(0), (2, 1, 9, 4))
    times = jnp.linspace(0.7, 0.6, steps + 1)
    hit, _ = integrate(microflow_ode, Euler(), y, times, MicroflowArgs(target, times[-1]))
    np.testing.assert_allclose(hit, target, rtol=1e-6, atol=1e-6)


def test_blend_goes_one_part_of_the_way():
    y, target = jax.random.normal(jax.random.key(0), (2, 1, 9, 4))
    ends = jnp.float32(0.7), jnp.float32(0.6)
    blend = microflow(PLAN.replace(microflow="blend", relax=4.0), y, target, *ends)
    np.testing.assert_allclose(blend, y + (target - y) / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(microflow(PLAN, y, target, *ends), target, rtol=1e-6, atol=1e-6)


def test_the_compiled_program_calls_nothing_back():
    # A program that calls back to Python is not kept in JAX's persistent cache.
    def quiet(tokens, positions, sigma, valid, args):
        return tokens * sigma

    noise = jnp.zeros((1, N, 8))
    first = jnp.arange(PLAN.budgets(N)[0])[None]
    sigmas = jnp.asarray(plan_sigmas(PLAN, N, jitjax.FluxConfig()))
    lowered = jax.jit(
        lambda y: jit_solve(quiet, y, sigmas, plan=PLAN, grid=GRID, first_anchors=first)
    ).lower(noise)
    assert "callback" not in lowered.as_text()


@pytest.mark.parametrize("grid", [(2, 2), (5, 3), (6, 7), (16, 16), (1, 4)])
@pytest.mark.parametrize("density", [0.2, 0.35, 0.8])
def test_first_anchors(grid, density):
    n = grid[0] * grid[1]
    budget = max(1, int(n * density))
    draw = jax.jit(lambda key: first_anchors(key, grid, budget))
    a, again, other = (np.asarray(draw(jax.random.key(s))) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert len(set(a)) == budget
    assert a.min() >= 0
    assert a.max() < n
    if 4 < budget < n and min(grid) > 4:
        assert not np.array_equal(a, other)
    corners = {0, grid[1] - 1, n - grid[1], n - 1}
    assert len(corners & set(a)) == min(len(corners), budget)
    rows, columns = np.divmod(np.arange(n), grid[1])
    base = (rows % 2 == 0) & (columns % 2 == 0)
    base |= (rows == 0) | (rows == grid[0] - 1) | (columns == 0) | (columns == grid[1] - 1)
    if budget >= base.sum():
        assert set(np.flatnonzero(base)) <= set(a)
    else:
        assert base[a].all()


def test_local_variance_against_numpy():
    u = np.asarray(jax.random.normal(jax.random.key(0), (2, N, 3)))
    padded = np.pad(u.reshape(2, *GRID, 3), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = (windows**2).mean((-1, -2)) - windows.mean((-1, -2)) ** 2
    got = local_variance(jnp.asarray(u), GRID)
    np.testing.assert_allclose(got, expected.mean(-1).reshape(2, -1), rtol=1e-5, atol=1e-6)


def test_activation_takes_the_most_important_others():
    importance = jax.random.uniform(jax.random.key(0), (2, N))
    old = jnp.asarray([[0, 5, 9], [1, 2, 3]])
    index, new = activate(AnchorSet.padded(old, 8, N), importance, 3, 10)
    for row in range(2):
        rest = [i for i in np.argsort(-importance[row]) if i not in set(old[row].tolist())]
        assert index[row].tolist() == old[row].tolist() + rest[:7]
        assert new[row].tolist() == rest[:7]


@pytest.mark.parametrize("grid", [(6, 7), (2, 9), (3, 1)])
def test_lifter_against_scipy(grid):
    n = grid[0] * grid[1]
    m = max(2, n // 3)
    index = np.sort(np.random.default_rng(0).permutation(n)[:m])
    values = np.random.default_rng(1).normal(size=(m, 4)).astype(np.float32)
    rows, columns = np.indices(grid).reshape(2, -1)
    squared = (rows[:, None] - rows[index]) ** 2 + (columns[:, None] - columns[index]) ** 2
    field = values[squared.argmin(1)].reshape(*grid, 4)
    # scipy's "mirror" is torch's "reflect".
    expected = gaussian_filter(
        field.astype(np.float64), (1, 1, 0), mode="mirror", radius=(3, 3, 0)
    ).reshape(n, 4)
    expected[index] = values
    anchors = AnchorSet.padded(jnp.asarray(index)[None], m + 3, n)
    padded = jnp.pad(jnp.asarray(values), ((0, 3), (0, 0)), constant_values=jnp.nan)
    got = Lifter.build(anchors, grid)(padded[None], grid, m / n)
    np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[0, index], values)


def test_packing_is_channel_major_and_invertible():
    latents = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    # Token of patch row 1, column 2; channel 1, row 0 and column 1 within the patch.
    assert tokens[1, 5, 1 * 4 + 0 * 2 + 1] == latents[1, 2, 5, 1]
    np.testing.assert_array_equal(unpack(tokens, (2, 3)), latents)


def test_shifted_sigmas_are_those_of_flux():
    config = jitjax.FluxConfig()
    # FLUX.1-dev at 1024 px: mu = 1.15, so that sigma = e^1.15 / (e^1.15 + 1/s - 1).
    sigmas = plan_sigmas(Plan(4, schedule="shifted"), 4096, config)
    even = np.array([1, 0.75, 0.5, 0.25])
    expected = np.exp(1.15) / (np.exp(1.15) + 1 / even - 1)
    np.testing.assert_allclose(sigmas, [*expected, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "positive integer"),
        ({"steps": 2}, "at least one step in every stage"),
        ({"densities": (0.6, 0.4, 1.0)}, "rising"),
        ({"densities": (0.3, 0.6, 1.2)}, "rising"),
        ({"densities": (0.3, 0.6)}, "end at 1"),
        ({"densities": (0.3, 1.0)}, "one of each per stage"),
        ({"stage_ends": (0.6, 0.4, 1.0)}, "rising"),
        ({"schedule": "cosine"}, "expected one of"),
        ({"schedule": (1.0, 0.5)}, "2 sigmas"),
        ({"schedule": (1.0, 0.8, 0.8, 0.5, 0.3, 0.1)}, "strictly falling"),
        ({"microflow": "jump"}, "expected one of"),
        ({"microflow_noise": "old"}, "expected one of"),
        ({"relax": 0.5}, "at least 1"),
        ({"pad_to": 0}, "positive integer"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PLAN.replace(**changes)


def test_the_named_plans_are_the_papers():
    assert PLANS["4x"].stage_steps == (7, 11, 18)
    assert PLANS["7x"].stage_steps == (4, 7, 11)
    assert PLANS["4x"].budgets(4096) == (1433, 2539, 4096)
    assert PLANS["7x"].budgets(4096) == (1310, 2457, 4096)
    assert hash(PLANS["4x"]) == hash(PLANS["4x"].replace())
