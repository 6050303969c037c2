"""The staged solve on analytic velocity functions."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jitjax
from jitjax.denoise import flux_sigmas
from jitjax.latents import draw_noise
from jitjax.sampler.anchors import first_anchors
from jitjax.sampler.grid import positions
from jitjax.sampler.plan import CHOICES, Plan
from jitjax.sampler.schedule import beta_sigmas
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2, Multistep

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

GRID = (6, 7)
N = GRID[0] * GRID[1]
PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0), microflow="hit", microflow_noise="initial")
TWO_STAGES = PLAN.replace(densities=(0.4, 1.0), stage_ends=(0.5, 1.0))


@dataclass(frozen=True)
class CountedVelocity:
    """Velocity towards a goal that depends on the token's position.

    As in a transformer, each velocity depends on all tokens that are not padding.

    Attributes:
        nan_in_padding: whether the velocities of padded slots are NaN.
        counted: whether evaluations are counted. Programs that count are not cached on disk.
    """

    nan_in_padding: bool = False
    counted: bool = False

    def __call__(self, tokens, positions, sigma, valid, args):
        if self.counted:
            jax.debug.callback(lambda: COUNT.update(["evaluations"]))
        distance = positions[..., 1:].sum(-1, keepdims=True)
        goal = jnp.sin(distance * args)
        weights = jnp.ones(tokens.shape[:2]) if valid is None else valid.astype(tokens.dtype)
        mean = jnp.einsum("bm,bmd->bd", weights, tokens - goal) / weights.sum(1, keepdims=True)
        u = (tokens - goal + 0.1 * mean[:, None]) / jnp.maximum(sigma, 0.05)
        if self.nan_in_padding and valid is not None:
            u = jnp.where(valid[..., None], u, jnp.nan)
        return u


COUNT: Counter[str] = Counter()


@functools.cache
def draw(budget):
    """Draw the noise of two samples, and their first anchors."""

    @jax.jit
    def run(keys):
        first = jax.vmap(lambda k: first_anchors(k, GRID, budget))(keys) if budget < N else None
        return draw_noise(keys, GRID, 8), first

    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), 2)))


NOISE = draw(N)[0]


def solve(plan=PLAN, *, rows=slice(2), nan_in_padding=False, counted=False, **kwargs):
    noise, first = draw(plan.budgets(N, kwargs.get("text_tokens", 0))[0])
    noise = kwargs.pop("noise", noise[rows])
    return jit_solve(
        CountedVelocity(nan_in_padding, counted),
        jnp.asarray(noise),
        jnp.asarray(flux_sigmas(plan, N, jitjax.FluxConfig())),
        plan=plan,
        grid=GRID,
        first_anchors=None if first is None else jnp.asarray(first[rows]),
        args=kwargs.pop("args", np.float32(0.3)),
        **kwargs,
    )


@pytest.mark.parametrize("plan", [PLAN.replace(pad_to=32), Plan(5)])
@pytest.mark.parametrize("progress", [None, lambda done: COUNT.update(["progress"])])
def test_velocity_is_evaluated_once_per_step(plan, progress):
    COUNT.clear()
    jax.block_until_ready(solve(plan, progress=progress, counted=True))
    jax.effects_barrier()
    assert COUNT["evaluations"] == plan.steps
    assert COUNT["progress"] == (plan.steps if progress else 0)


def test_stepwise_solve_equals_one_call():
    np.testing.assert_allclose(solve(), solve(progress=lambda done: None), rtol=1e-6, atol=1e-6)


def test_dense_plan_equals_euler_loop():
    plan = Plan(7)
    got, y = solve(plan), NOISE
    sigmas = flux_sigmas(plan, N, jitjax.FluxConfig())
    all_positions = positions(jnp.arange(N), GRID)[None]
    velocity = jax.jit(CountedVelocity())
    for sigma, next_sigma in itertools.pairwise(sigmas):
        u = velocity(y, all_positions, sigma, None, np.float32(0.3))
        y = y + np.asarray(u) * (next_sigma - sigma)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_the_result():
    padded = solve(PLAN.replace(pad_to=16), nan_in_padding=True, text_tokens=5)
    np.testing.assert_allclose(padded, solve(), rtol=1e-6, atol=1e-6)


def test_sample_does_not_depend_on_its_batch():
    both = solve(TWO_STAGES)
    for i in range(2):
        alone = solve(TWO_STAGES, rows=slice(i, i + 1))
        np.testing.assert_allclose(alone[0], both[i], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_traces_under_jit_vmap_and_grad():

    def loss(noise, args):
        made = solve(noise=noise, args=args)
        return (made**2).mean(), made

    both = np.stack([NOISE, NOISE + 1])
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    transformed = jax.jit(jax.vmap(gradient, in_axes=(0, None)))
    (to_noise, to_args), mapped = transformed(both, np.float32(0.3))
    for noise, got in zip(both, mapped, strict=True):
        np.testing.assert_allclose(got, solve(noise=noise), rtol=1e-5, atol=1e-5)
    assert np.isfinite(to_noise).all()
    assert np.abs(to_noise).max() > 0
    step = 1e-3
    ends = [solve(noise=NOISE, args=np.float32(0.3 + s)) for s in (-step, step)]
    before, after = (np.square(end, dtype=float).mean() for end in ends)
    np.testing.assert_allclose(to_args[0], (after - before) / (2 * step), rtol=1e-2)


def test_compiled_program_has_no_host_callbacks():
    # JAX's persistent compilation cache does not store programs with host callbacks.
    def velocity(tokens, positions, sigma, valid, args):
        return tokens * sigma

    noise = jnp.zeros((1, N, 8))
    first = jnp.arange(PLAN.budgets(N)[0])[None]
    sigmas = jnp.asarray(flux_sigmas(PLAN, N, jitjax.FluxConfig()))
    lowered = jax.jit(
        lambda y: jit_solve(velocity, y, sigmas, plan=PLAN, grid=GRID, first_anchors=first)
    ).lower(noise)
    assert "callback" not in lowered.as_text()


def wave(tokens, positions, sigma, valid, args, xp=jnp):
    """A velocity that mixes channels, positions and sigma, but not tokens."""
    distance = positions[..., 1:].astype(xp.float32).sum(-1, keepdims=True)
    rolled = xp.roll(tokens, 1, axis=-1)
    return xp.sin(tokens + 0.3 * distance) + 0.5 * rolled * sigma - xp.cos(distance * sigma)


@pytest.mark.parametrize(
    ("grid", "sparse", "relax", "kind"),
    [
        ((6, 6), (), 1.0, "blur"),
        ((5, 3), (0.3, 0.6), 3.0, "blur"),
        slow((3, 8), (0.3, 0.45, 0.8), 1.0, "linear"),
        ((2, 2), (0.5,), 0.0, "linear"),
        slow((1, 7), (0.3, 0.6), 0.0, "blur"),
    ],
)
def test_solve_equals_numpy_reference(grid, sparse, relax, kind):
    """Any grid, number of stages, `relax` (0 is "hit") and order of the first anchors."""
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
    rng = np.random.default_rng(0)
    noise, microflow_noise = rng.normal(size=(2, 1, n, 3)).astype(np.float32)
    first = rng.permutation(n)[: plan.budgets(n)[0]]
    sigmas = np.append(beta_sigmas(plan.steps), 0).astype(np.float32)
    got = jit_solve(
        wave,
        jnp.asarray(noise),
        jnp.asarray(sigmas),
        plan=plan,
        grid=grid,
        first_anchors=jnp.asarray(first)[None],
        microflow_noise=jnp.asarray(microflow_noise),
    )

    all_positions = np.asarray(positions(jnp.arange(n), grid))

    def velocity(y, index, sigma):  # in NumPy: JAX would compile every operation for every shape
        return wave(np.float32(y), all_positions[index], sigma, None, None, xp=np)

    expected = oracles.solve(
        velocity, noise[0], microflow_noise[0], sigmas, list(plan.stage_steps), list(densities),
        relax, first, grid, kind,
    )  # fmt: skip
    np.testing.assert_allclose(got[0], expected, rtol=2e-4, atol=2e-4)


OPTIONS = [{name: value} for name in ("activation", "lift") for value in CHOICES[name]] + [
    {"microflow": m, "microflow_steps": 3} for m in CHOICES["microflow"]
]


QUICK = OPTIONS[:: len(OPTIONS) // 4]  # tests of each choice are below and in other files
SLOW = [pytest.param(option, marks=pytest.mark.slow) for option in OPTIONS if option not in QUICK]


@pytest.mark.parametrize("option", [*QUICK, *SLOW], ids=str)
def test_every_option_runs_and_ignores_padding(option):
    # Where all other tokens become anchors there is no choice of them.
    plan = (PLAN if "activation" in option else TWO_STAGES).replace(**option)
    scores = jnp.asarray(np.random.default_rng(5).uniform(size=(2, N)).astype(np.float32))
    plain = solve(plan, random_scores=scores)
    assert np.isfinite(plain).all()
    options = {"random_scores": scores, "nan_in_padding": True}
    padded = solve(plan.replace(pad_to=16), text_tokens=5, **options)  # as in another test
    np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-5)


def test_microflow_none_leaves_the_state_unchanged():
    _, trace = solve(TWO_STAGES.replace(microflow="none"), trace=True)
    transition = trace.transitions[0]
    np.testing.assert_array_equal(transition.before, transition.after)


def test_lift_none_freezes_other_tokens_but_blurs_the_clean_prediction():
    _, trace = solve(TWO_STAGES.replace(lift="none"), trace=True)
    trace = jax.tree.map(np.asarray, trace)
    others = np.setdiff1d(np.arange(N), trace.anchors[0][0])
    np.testing.assert_array_equal(trace.states[1, 0, others], NOISE[0, others])
    index, clean = trace.anchors[0][0], trace.clean[0][0]
    lifted = oracles.lift(clean[index], index, GRID, "blur")
    np.testing.assert_allclose(trace.transitions[0].lifted[0], lifted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_activation_grid_chooses_other_anchors_than_importance():
    _, importance = solve(trace=True)
    _, grid = solve(PLAN.replace(activation="grid"), trace=True)
    grid_new, importance_new = (
        np.asarray(trace.transitions[0].new)[0] for trace in (grid, importance)
    )
    assert set(grid_new.tolist()) != set(importance_new.tolist())


def test_activation_random_follows_the_random_scores():
    scores = jnp.asarray(np.broadcast_to(np.arange(N, dtype=np.float32), (2, N)))
    _, trace = solve(PLAN.replace(activation="random"), random_scores=scores, trace=True)
    others = np.setdiff1d(np.arange(N), np.asarray(trace.anchors[0])[0])
    new = np.asarray(trace.transitions[0].new)
    assert new[0].tolist() == others[::-1][: new.shape[1]].tolist()


@pytest.mark.parametrize("plan", [PLAN.replace(pad_to=32), slow(Plan(5))])
@pytest.mark.parametrize("progress", [None, lambda done: None])
def test_trace_agrees_with_the_solve_and_does_not_change_it(plan, progress):
    plain = solve(plan)
    COUNT.clear()
    got, trace = solve(plan, trace=True, progress=progress, counted=True)
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
    for k, transition in enumerate(trace.transitions):
        end = plan.stage_steps[k]
        np.testing.assert_array_equal(transition.before, trace.states[end - 1])
        old, new = trace.anchors[k], transition.new
        expected = np.sort(np.concatenate([old, new], axis=1))
        np.testing.assert_array_equal(np.sort(trace.anchors[k + 1]), expected)
        moved = np.take_along_axis(np.asarray(transition.after), np.asarray(new)[..., None], 1)
        np.testing.assert_allclose(moved, transition.target, rtol=1e-5, atol=1e-5)
    # With Euler the state at the end of the last stage is its clean prediction.
    np.testing.assert_allclose(trace.clean[-1], got, rtol=1e-5, atol=1e-5)


def test_compiled_program_without_trace_does_not_output_states():
    plain = jax.jit(lambda y: solve(TWO_STAGES, noise=y)).lower(NOISE).compile()
    traced = jax.jit(lambda y: solve(TWO_STAGES, noise=y, trace=True)[1].states)
    traced, size = traced.lower(NOISE).compile(), NOISE.nbytes
    assert plain.memory_analysis().output_size_in_bytes < 1.5 * size
    assert traced.memory_analysis().output_size_in_bytes >= TWO_STAGES.steps * size


def test_spare_anchors_fill_the_padded_slots():
    plan = PLAN.replace(pad_to=16, spare="anchors")
    assert plan.budgets(N, text_tokens=5) == (27, 42, 42)  # 32 - 5; 48 - 5, capped at N
    assert PLAN.budgets(N, text_tokens=5) == (16, 29, 42)
    got, trace = solve(plan, text_tokens=5, trace=True)
    assert trace.slots[0] == trace.anchors[0].shape[1] == 27
    assert trace.transitions[1] is None  # the second stage is dense already
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    "solver", [AdamsBashforth2(), pytest.param(Multistep(), marks=pytest.mark.slow)]
)
def test_multistep_solver_through_all_stages(solver):
    plan = TWO_STAGES.replace(steps=24)
    got, trace = solve(plan, solver=solver, trace=True)
    stepwise = solve(plan, solver=solver, progress=lambda done: None)
    np.testing.assert_allclose(got, stepwise, rtol=1e-5, atol=1e-5)
    assert trace.evaluations == 24


@dataclass(frozen=True)
class NanVelocity:
    """A velocity that is NaN in the second sample, below a sigma."""

    below: float

    def __call__(self, tokens, positions, sigma, valid, args):
        is_nan = (jnp.arange(tokens.shape[0]) == 1)[:, None, None] & (sigma < self.below)
        return jnp.where(is_nan, jnp.nan, tokens)


def test_check_finite_reports_the_step_and_the_samples():
    sigmas = jnp.asarray([1.0, 0.8, 0.6, 0.4, 0.0])
    plan = Plan(4, (0.5, 1.0), (0.5, 1.0), schedule=(1.0, 0.8, 0.6, 0.4), microflow_noise="initial")
    kwargs = {"plan": plan, "grid": (2, 2), "first_anchors": jnp.asarray([[0, 1], [2, 3]])}
    noise, velocity = jnp.ones((2, 4, 3)), NanVelocity(0.7)
    with pytest.raises(FloatingPointError, match=r"step 2 \(sigma 0.6000\).*samples \[1\]"):
        jit_solve(velocity, noise, sigmas, check_finite=True, **kwargs)
    assert not np.isfinite(jit_solve(velocity, noise, sigmas, **kwargs)).all()
    checked = jit_solve(NanVelocity(-1.0), noise, sigmas, check_finite=True, **kwargs)
    plain = jit_solve(NanVelocity(-1.0), noise, sigmas, **kwargs)
    np.testing.assert_allclose(checked, plain, rtol=1e-6)
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda y: jit_solve(velocity, y, sigmas, check_finite=True, **kwargs))(noise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": jnp.full((1, 4, 3), jnp.nan)}, "noise has 12 values that are not finite"),
        ({"noise": jnp.ones((1, 5, 3))}, r"expected \[batch, 4, channels\]"),
        ({"noise": jnp.ones((1, 4, 3), jnp.bfloat16)}, "expected float32"),
        ({"microflow_noise": jnp.ones((1, 4, 2))}, "expected the shape of noise"),
        ({"microflow_noise": jnp.full((1, 4, 3), jnp.inf)}, "12 values that are not finite"),
        ({"sigmas": jnp.asarray([1.0, 0.5])}, r"expected \[3\]"),
        ({"sigmas": jnp.asarray([1.0, 0.5, 0.5])}, "strictly decreasing"),
        ({"sigmas": jnp.asarray([1.0, 0.5, 0.7])}, "strictly decreasing"),
        ({"first_anchors": None}, r"None; expected shape \[1, 2\]"),
        ({"first_anchors": jnp.asarray([[0, 1, 2]])}, r"expected \[1, 2\]"),
        ({"first_anchors": jnp.asarray([[0, 4]])}, "expected 0 to 3"),
        ({"first_anchors": jnp.asarray([[-1, 2]])}, "expected 0 to 3"),
        ({"first_anchors": jnp.asarray([[2, 2]])}, "duplicate indices"),
        ({"first_anchors": jnp.asarray([[0.0, 1.0]])}, "expected integers"),
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
def test_invalid_inputs_raise(unchecked, changes, message):
    inputs = {
        "noise": jnp.ones((1, 4, 3)),
        "sigmas": jnp.asarray([1.0, 0.5, 0.0]),
        "plan": Plan(2, (0.5, 1.0), (0.5, 1.0), microflow_noise="initial"),
        "grid": (2, 2),
        "first_anchors": jnp.asarray([[0, 3]]),
    } | changes
    with pytest.raises(ValueError, match=message):
        jit_solve(wave, inputs.pop("noise"), inputs.pop("sigmas"), **inputs)
