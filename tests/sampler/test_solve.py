"""The staged solve on velocity functions that need no network, and `denoise` on a random FLUX."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jitjax
from jitjax.denoise import flux_sigmas
from jitjax.latents import draw_noise
from jitjax.sampler.anchors import first_anchors
from jitjax.sampler.grid import positions
from jitjax.sampler.plan import CHOICES, Plan
from jitjax.sampler.schedule import beta_sigmas
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2

GRID = (6, 7)
N = GRID[0] * GRID[1]
PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0), microflow="hit", microflow_noise="initial")


@dataclass(frozen=True)
class Pull:
    """Velocity of a flow to a point that depends on the token's place, evaluations counted.

    As in a transformer, each velocity depends on all tokens that are not padding.
    """

    poison: bool = False

    def __call__(self, tokens, positions, sigma, valid, args):
        jax.debug.callback(lambda: COUNT.update(["evaluations"]))
        place = positions[..., 1:].sum(-1, keepdims=True)
        goal = jnp.sin(place * args)
        seen = jnp.ones(tokens.shape[:2]) if valid is None else valid.astype(tokens.dtype)
        mean = jnp.einsum("bm,bmd->bd", seen, tokens - goal) / seen.sum(1, keepdims=True)
        u = (tokens - goal + 0.1 * mean[:, None]) / jnp.maximum(sigma, 0.05)
        if self.poison and valid is not None:
            u = jnp.where(valid[..., None], u, jnp.nan)
        return u


COUNT: Counter[str] = Counter()


def solve(plan=PLAN, batch=2, *, seed=0, poison=False, **more):
    keys = jax.random.split(jax.random.key(seed), batch)
    noise = more.pop("noise", draw_noise(keys, GRID, 8))
    budget = plan.budgets(N, more.get("text_tokens", 0))[0]
    first = jax.vmap(lambda k: first_anchors(k, GRID, budget))(keys) if budget < N else None
    sigmas = jnp.asarray(flux_sigmas(plan, N, jitjax.FluxConfig()), noise.dtype)
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
    sigmas = flux_sigmas(plan, N, jitjax.FluxConfig())
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
            jnp.asarray(flux_sigmas(PLAN, N, jitjax.FluxConfig())),
            plan=PLAN,
            grid=GRID,
            first_anchors=first,
            args=jnp.float32(0.3),
        )
        np.testing.assert_allclose(alone[0], both[i], rtol=1e-6, atol=1e-6)


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


def test_the_compiled_program_calls_nothing_back():
    # A program that calls back to Python is not kept in JAX's persistent cache.
    def quiet(tokens, positions, sigma, valid, args):
        return tokens * sigma

    noise = jnp.zeros((1, N, 8))
    first = jnp.arange(PLAN.budgets(N)[0])[None]
    sigmas = jnp.asarray(flux_sigmas(PLAN, N, jitjax.FluxConfig()))
    lowered = jax.jit(
        lambda y: jit_solve(quiet, y, sigmas, plan=PLAN, grid=GRID, first_anchors=first)
    ).lower(noise)
    assert "callback" not in lowered.as_text()


def wave(tokens, positions, sigma, valid, args):
    """A velocity that mixes channels, places and sigma; no token sees another."""
    place = positions[..., 1:].astype(jnp.float32).sum(-1, keepdims=True)
    turned = jnp.roll(tokens, 1, axis=-1)
    return jnp.sin(tokens + 0.3 * place) + 0.5 * turned * sigma - jnp.cos(place * sigma)


@settings(max_examples=8)
@given(
    st.sampled_from([(2, 2), (5, 3), (3, 8), (6, 6), (1, 7)]),
    st.sampled_from([(), (0.5,), (0.3, 0.6), (0.3, 0.45, 0.8)]),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from(["blur", "linear"]),
    st.integers(0, 99),
)
def test_the_whole_solve_equals_the_numpy_one(grid, sparse, relax, kind, seed):
    """Any grid, any number of stages, any r, r = 0 too; first anchors in any order."""
    n = grid[0] * grid[1]
    densities, stages = (*sparse, 1.0), len(sparse) + 1
    plan = Plan(
        2 * stages,
        densities,
        tuple((k + 1) / stages for k in range(stages)),
        microflow="blend" if relax else "hit",
        relax=relax or 1.0,
        lift=kind,
    )
    rng = np.random.default_rng(seed)
    noise, other = rng.normal(size=(2, 1, n, 3)).astype(np.float32)
    first = rng.permutation(n)[: plan.budgets(n)[0]]
    sigmas = np.append(beta_sigmas(plan.steps), 0).astype(np.float32)
    got = jit_solve(
        wave,
        jnp.asarray(noise),
        jnp.asarray(sigmas),
        plan=plan,
        grid=grid,
        first_anchors=jnp.asarray(first)[None],
        microflow_noise=jnp.asarray(other),
    )

    def velocity(y, index, sigma):
        places = positions(jnp.asarray(index), grid)
        return np.asarray(wave(jnp.asarray(y, jnp.float32), places, sigma, None, None))

    expected = oracles.solve(
        velocity, noise[0], other[0], sigmas, list(plan.stage_steps), list(densities), relax, first,
        grid, kind,
    )  # fmt: skip
    np.testing.assert_allclose(got[0], expected, rtol=2e-4, atol=2e-4)


OPTIONS = [
    {name: value} for name in ("first", "fill", "activation", "lift") for value in CHOICES[name]
] + [{"microflow": m, "microflow_steps": 3} for m in CHOICES["microflow"]]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_runs_and_padding_and_batch_do_not_matter(option):
    plan = PLAN.replace(**option)
    scores = jax.random.uniform(jax.random.key(5), (2, N))
    both = solve(plan, random_scores=scores)
    assert bool(jnp.isfinite(both).all())
    padded = solve(plan.replace(pad_to=16), random_scores=scores, poison=True, text_tokens=3)
    np.testing.assert_allclose(padded, both, rtol=1e-5, atol=1e-5)


def test_ablations_do_what_they_say():
    _, full = solve(trace=True)
    _, still = solve(PLAN.replace(microflow="none"), trace=True)
    happened = still.transitions[0]
    np.testing.assert_array_equal(happened.before, happened.after)
    _, frozen = solve(PLAN.replace(lift="none"), trace=True)
    others = np.setdiff1d(np.arange(N), frozen.anchors[0][0])
    noise = draw_noise(jax.random.split(jax.random.key(0), 2), GRID, 8)
    np.testing.assert_array_equal(frozen.states[1, 0, others], noise[0, others])
    # The target keeps its structure: without it, this would take away two things at once.
    index, clean = np.asarray(frozen.anchors[0][0]), np.asarray(frozen.clean[0][0])
    lifted = oracles.lift(clean[index], index, GRID, "blur")
    np.testing.assert_allclose(frozen.transitions[0].lifted[0], lifted, rtol=1e-4, atol=1e-5)
    _, grid = solve(PLAN.replace(activation="grid"), trace=True)
    assert set(grid.transitions[0].new[0].tolist()) != set(full.transitions[0].new[0].tolist())
    scores = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32), (2, N))
    _, chosen = solve(PLAN.replace(activation="random"), random_scores=scores, trace=True)
    free = np.setdiff1d(np.arange(N), chosen.anchors[0][0])
    new = chosen.transitions[0].new
    assert new[0].tolist() == free[::-1][: new.shape[1]].tolist()


@pytest.mark.parametrize("plan", [PLAN, PLAN.replace(pad_to=32), Plan(5)])
@pytest.mark.parametrize("progress", [None, lambda done: None])
def test_the_trace_tells_what_happened_and_changes_nothing(plan, progress):
    plain = solve(plan).block_until_ready()
    jax.effects_barrier()
    COUNT.clear()
    got, trace = solve(plan, trace=True, progress=progress)
    jax.block_until_ready(trace)
    jax.effects_barrier()
    np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-6)
    assert trace.evaluations == COUNT["evaluations"] == plan.steps
    assert trace.states.shape == (plan.steps, *got.shape)
    np.testing.assert_array_equal(trace.states[-1], got)
    budgets = plan.budgets(N)
    assert [a.shape for a in trace.anchors] == [(2, k) for k in budgets]
    assert len(trace.transitions) == len(budgets) - 1
    assert len(trace.slots) == plan.steps
    assert trace.slots[-1] == N
    if plan.pad_to == 32:
        assert trace.slots[0] == 32
    for k, happened in enumerate(trace.transitions):
        end = plan.stage_steps[k]
        np.testing.assert_array_equal(happened.before, trace.states[end - 1])
        old, new = trace.anchors[k], happened.new
        both = np.sort(np.concatenate([old, new], axis=1))
        np.testing.assert_array_equal(np.sort(trace.anchors[k + 1]), both)
        hit = np.take_along_axis(np.asarray(happened.after), np.asarray(new)[..., None], 1)
        np.testing.assert_allclose(hit, happened.target, rtol=1e-5, atol=1e-5)
    # With Euler the state at the end of the last stage is its clean prediction.
    np.testing.assert_allclose(trace.clean[-1], got, rtol=1e-5, atol=1e-5)


def test_a_trace_not_asked_for_is_not_in_the_program():
    noise = draw_noise(jax.random.split(jax.random.key(0), 2), GRID, 8)
    plain = jax.jit(lambda y: solve(noise=y)).lower(noise).compile()
    traced = jax.jit(lambda y: solve(noise=y, trace=True)[1].states).lower(noise).compile()
    size = noise.nbytes
    assert plain.memory_analysis().output_size_in_bytes < 1.5 * size
    assert traced.memory_analysis().output_size_in_bytes >= PLAN.steps * size


def test_spare_slots_can_hold_anchors():
    plan = PLAN.replace(pad_to=16, spare="anchors")
    assert plan.budgets(N, text_tokens=5) == (27, 42, 42)  # 16 + 11 slots; 43 is capped by the grid
    assert PLAN.budgets(N, text_tokens=5) == (16, 29, 42)
    got, trace = solve(plan, text_tokens=5, trace=True)
    assert trace.slots[0] == trace.anchors[0].shape[1] == 27
    assert trace.transitions[1] is None  # nothing left to take up
    assert bool(jnp.isfinite(got).all())


def test_a_multistep_solver_through_all_stages():
    got, trace = solve(PLAN.replace(steps=24), solver=AdamsBashforth2(), trace=True)
    stepwise = solve(PLAN.replace(steps=24), solver=AdamsBashforth2(), progress=lambda done: None)
    np.testing.assert_allclose(got, stepwise, rtol=1e-5, atol=1e-5)
    assert trace.evaluations == 24


@dataclass(frozen=True)
class Broken:
    """Not a number below a sigma, in the second sample."""

    below: float

    def __call__(self, tokens, positions, sigma, valid, args):
        bad = (jnp.arange(tokens.shape[0]) == 1)[:, None, None] & (sigma < self.below)
        return jnp.where(bad, jnp.nan, tokens)


def test_a_velocity_that_is_not_finite_is_told_when_asked_to():
    sigmas = jnp.asarray([1.0, 0.8, 0.6, 0.4, 0.0])
    plan = Plan(4, (0.5, 1.0), (0.5, 1.0), schedule=(1.0, 0.8, 0.6, 0.4), microflow_noise="initial")
    given = {"plan": plan, "grid": (2, 2), "first_anchors": jnp.asarray([[0, 1], [2, 3]])}
    noise = jnp.ones((2, 4, 3))
    with pytest.raises(FloatingPointError, match=r"step 2 \(sigma 0.6000\).*samples \[1\]"):
        jit_solve(Broken(0.7), noise, sigmas, check_finite=True, **given)
    assert not bool(jnp.isfinite(jit_solve(Broken(0.7), noise, sigmas, **given)).all())
    ok = jit_solve(Broken(-1.0), noise, sigmas, check_finite=True, **given)
    np.testing.assert_allclose(ok, jit_solve(Broken(-1.0), noise, sigmas, **given), rtol=1e-6)
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda y: jit_solve(Broken(0.7), y, sigmas, check_finite=True, **given))(noise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": jnp.full((1, 4, 3), jnp.nan)}, "noise has 12 values that are not finite"),
        ({"noise": jnp.ones((1, 5, 3))}, r"expected \[batch, 4, channels\]"),
        ({"noise": jnp.ones((1, 4, 3), jnp.bfloat16)}, "expected float32"),
        ({"microflow_noise": jnp.ones((1, 4, 2))}, "expected the shape of noise"),
        ({"microflow_noise": jnp.full((1, 4, 3), jnp.inf)}, "12 values that are not finite"),
        ({"sigmas": jnp.asarray([1.0, 0.5])}, r"expected \[3\]"),
        ({"sigmas": jnp.asarray([1.0, 0.5, 0.5])}, "none repeated"),
        ({"sigmas": jnp.asarray([1.0, 0.5, 0.7])}, "falling"),
        ({"first_anchors": None}, r"this plan needs \[1, 2\]"),
        ({"first_anchors": jnp.asarray([[0, 1, 2]])}, r"expected \[1, 2\]"),
        ({"first_anchors": jnp.asarray([[0, 4]])}, "expected 0 to 3"),
        ({"first_anchors": jnp.asarray([[-1, 2]])}, "expected 0 to 3"),
        ({"first_anchors": jnp.asarray([[2, 2]])}, "more than once"),
        ({"first_anchors": jnp.asarray([[0.0, 1.0]])}, "expected whole numbers"),
        (
            {
                "plan": Plan(
                    2, (0.5, 1.0), (0.5, 1.0), activation="random", microflow_noise="initial"
                )
            },
            "random_scores is None",
        ),
        ({"plan": Plan(2, (0.5, 1.0), (0.5, 1.0))}, "microflow_noise is None"),
    ],
)
def test_what_no_run_could_have_is_refused(unchecked, changes, message):
    given = {
        "noise": jnp.ones((1, 4, 3)),
        "sigmas": jnp.asarray([1.0, 0.5, 0.0]),
        "plan": Plan(2, (0.5, 1.0), (0.5, 1.0), microflow_noise="initial"),
        "grid": (2, 2),
        "first_anchors": jnp.asarray([[0, 3]]),
    } | changes
    with pytest.raises(ValueError, match=message):
        jit_solve(wave, given.pop("noise"), given.pop("sigmas"), **given)
