"""jit_solve and denoise under JAX's transformations, with concrete and traced inputs."""

from __future__ import annotations

import functools
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_runs

import jitjax
from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import VELOCITIES_KEPT, _programs, jit_solve
from jitjax.sampler.solvers import AdamsBashforth2, Multistep
from jitjax.sampler.static import split_arrays

GRID = (4, 4)
SPARSE = Plan(2, (0.5, 1.0), (0.5, 1.0))
NOISE = jax.random.normal(jax.random.key(0), (1, 16, 4))


def velocity(tokens, positions, sigma, valid, args):
    return jnp.sin(tokens * args) * (0.5 + sigma)


def solve(args, noise=NOISE, plan=SPARSE, velocity=velocity, **more):
    return jit_solve(
        velocity,
        noise,
        jnp.linspace(1, 0, plan.steps + 1),
        plan=plan,
        grid=GRID,
        first_anchors=jnp.arange(0, 16, 2)[None],
        microflow_noise=noise[:, ::-1],
        args=args,
        **more,
    )


CLOSED_OVER = {
    "jit": lambda f, x: jax.jit(f)(x),
    "jit of grad": lambda f, x: f(x) + 0 * jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "vmap": lambda f, x: jax.vmap(f)(x[None])[0],
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "map": lambda f, x: jax.lax.map(f, x[None])[0],
    "scan": lambda f, x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x[None])[1][0],
    "cond": lambda f, x: jax.lax.cond(x > 0, f, lambda x: f(-x), x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,))[0],
    "eval_shape": lambda f, x: f(x) if jax.eval_shape(f, x).shape == NOISE.shape else None,
}


QUICK = ("jit", "vmap", "map", "eval_shape")


@pytest.mark.parametrize(
    "transform",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLOSED_OVER],
)
def test_concrete_inputs_may_be_closed_over(transform):
    x = jnp.float32(0.7)
    got = CLOSED_OVER[transform](solve, x)
    np.testing.assert_allclose(got, solve(x), rtol=1e-5, atol=1e-5)


def test_closed_over_values_are_still_checked():
    bad = NOISE.at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="noise has 1 values that are not finite"):
        jax.jit(lambda x: solve(x, noise=bad))(0.7)


@pytest.mark.slow
def test_denoise_with_closed_over_noise_key_and_conditioning(small):
    conditioning = jitjax.encode_prompt(small, "a large red circle")
    noise = jax.random.normal(jax.random.key(0), (1, 16, 64))
    key = jax.random.key(1)

    def run(guidance):
        return jitjax.denoise(small, conditioning, noise, plan=SPARSE, guidance=guidance, key=key)

    mapped = jax.lax.map(run, jnp.array([1.0, 3.5]))  # traced, as under `jit`
    np.testing.assert_allclose(mapped[1], run(3.5), rtol=1e-4, atol=1e-4)


def slow(*values, id):
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("plan", "solver"),
    [
        pytest.param(Plan(3), None, id="dense-Euler"),
        slow(SPARSE, None, id="sparse-Euler"),
        slow(SPARSE, AdamsBashforth2(), id="sparse-AB2"),
        slow(SPARSE, Multistep(), id="sparse-multistep"),
    ],
)
def test_forward_mode_and_second_derivatives_equal_finite_differences(plan, solver):
    with jax.enable_x64(True):
        noise = NOISE.astype(jnp.float64)
        weights = jax.random.normal(jax.random.key(1), noise.shape, jnp.float64)

        @jax.jit
        def f(x):
            return (weights * solve(x, noise=noise, plan=plan, solver=solver)).sum()

        x, h = jnp.float64(0.7), 1e-5
        first = (f(x + h) - f(x - h)) / (2 * h)
        slope = jax.jit(jax.grad(f))
        second = (slope(x + h) - slope(x - h)) / (2 * h)

        @jax.jit  # one program for all
        def derivatives(x):
            once = {
                "jacfwd": jax.jacfwd(f)(x),  # `jvp` under `vmap`
                "linearize": jax.linearize(f, x)[1](1.0),
                "grad": slope(x),
            }
            twice = {
                "grad of grad": jax.grad(jax.grad(f))(x),
                "hessian": jax.hessian(f)(x),  # `jvp` of `grad`, under `vmap`
                "grad of jvp": jax.grad(lambda x: jax.jvp(f, (x,), (1.0,))[1])(x),
            }
            return once, twice

        once, twice = derivatives(x)
        for name, value in once.items():
            assert float(value) == pytest.approx(float(first), rel=1e-7), name
        for name, value in twice.items():
            assert float(value) == pytest.approx(float(second), rel=1e-6), name


@pytest.mark.parametrize("option", [{"check_finite": True}, {"progress": lambda done: None}])
@pytest.mark.parametrize(
    "call",
    [
        lambda f: jax.jit(f)(0.7),
        lambda f: jax.grad(lambda x: f(x).sum())(0.7),
        lambda f: jax.vmap(f)(jnp.array([0.7, 0.8])),
        lambda f: jax.jit(lambda x: f(0.7) + x)(0.7),
        lambda f: jax.grad(
            lambda x: f(None, velocity=lambda tokens, *_: tokens * x).sum()
        )(0.7),
    ],
    ids=["jit", "grad", "vmap", "jit, closed over", "grad of a closed-over velocity"],
)  # fmt: skip
def test_steps_from_python_are_refused_under_transformations(option, call):
    with pytest.raises(ValueError, match="progress or check_finite is set under jit"):
        call(functools.partial(solve, **option))


class Scale(eqx.Module):
    """A velocity with an array, a static field and a function."""

    weight: jax.Array
    power: int = eqx.field(static=True)
    shape: object

    def __call__(self, tokens, positions, sigma, valid, args):
        return self.shape(tokens) * self.weight**self.power


def scaled(weight, tokens, positions, sigma, valid, args):
    return jnp.sin(tokens) * weight**2


def test_modules_and_partials_are_velocities_without_compiling_again():
    traces = []

    def shape(tokens):
        traces.append(None)
        return jnp.sin(tokens)

    def sine(tokens, positions, sigma, valid, args):
        return jnp.sin(tokens) * args**2

    weight = jnp.float32(0.7)
    expected = solve(weight, velocity=sine, plan=Plan(2))
    got = solve(None, velocity=Scale(weight, 2, shape), plan=Plan(2))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    count = len(traces)
    other = solve(None, velocity=Scale(2 * weight, 2, shape), plan=Plan(2))
    assert len(traces) == count
    np.testing.assert_allclose(
        other, solve(2 * weight, velocity=sine, plan=Plan(2)), rtol=1e-6, atol=1e-6
    )
    got = solve(None, velocity=functools.partial(scaled, weight), plan=Plan(2))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    slope = eqx.filter_grad(lambda v: solve(None, velocity=v, plan=Plan(2)).sum())
    by_args = jax.grad(lambda w: solve(w, velocity=sine, plan=Plan(2)).sum())(weight)
    gradient = slope(Scale(weight, 2, jnp.sin)).weight
    np.testing.assert_allclose(gradient, by_args, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_velocities_that_cannot_be_compiled_for_are_refused_by_name():
    with pytest.raises(ValueError, match="velocity is a int; expected a function"):
        solve(None, velocity=3)

    class Unhashable:
        __hash__ = None

        def __call__(self, tokens, *rest):
            return tokens

    with pytest.raises(ValueError, match="velocity is a Unhashable that is not hashable"):
        solve(None, velocity=Unhashable())


def test_functions_made_anew_and_their_programs_are_freed():
    functions, programs = [], []
    for _ in range(VELOCITIES_KEPT + 4):
        function = lambda tokens, *rest: -tokens  # noqa: E731
        solve(None, velocity=function, plan=Plan(1))
        _, static = split_arrays("velocity", function)
        functions.append(weakref.ref(function))
        programs.append(weakref.ref(_programs(static, ()).integrate))
    del function, static
    gc.collect()
    assert [ref() is None for ref in functions] == [True] * 4 + [False] * VELOCITIES_KEPT
    assert sum(ref() is not None for ref in programs) <= VELOCITIES_KEPT


@pytest.mark.parametrize("committed", [False, True])
def test_progress_compiles_each_stage_once(committed):
    traces = []

    def counted(tokens, positions, sigma, valid, args):
        return tokens * args

    def listen(event, seconds, fun_name=None, **more):
        if event.endswith("backend_compile_duration"):
            traces.append(fun_name)

    args = jnp.float32(0.7)
    if committed:
        args = jax.device_put(args, jax.devices()[0])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        solve(args, velocity=counted, plan=SPARSE.replace(steps=6), progress=lambda done: None)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("integrate" in str(name) for name in traces) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": float("nan")}, "guidance is nan; expected finite values"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": 1e38}, r"guidance is 1e\+38; expected finite values .* to 3.4e\+35"),
        ({"guidance": None}, "guidance is a NoneType; expected an array of numbers"),
        ({"guidance": "3.5"}, "guidance is a str"),
        ({"plan": {}}, "unknown plan {}"),
        ({"grid": [3, 5]}, "16 tokens; expected 3 x 5"),
        ({"grid": (4.0, 4)}, r"grid is \(4.0, 4\)"),
        ({"text": jnp.nan}, "Conditioning.text has 1 values that are not finite"),
        ({"pooled": jnp.inf}, "Conditioning.pooled has 1 values that are not finite"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_denoise_names_what_is_wrong_before_any_step(small, change, message):
    conditioning = jitjax.encode_prompt(small, "a large red circle")
    values = {}
    for name in ("text", "pooled"):
        array = getattr(conditioning, name)
        first = (0,) * array.ndim
        values[name] = array.at[first].set(change[name]) if name in change else array
    conditioning = jitjax.Conditioning(**values)
    options = {name: value for name, value in change.items() if name not in values}
    noise = jax.random.normal(jax.random.key(0), (1, 16, 64))
    with pytest.raises(ValueError, match=message):
        jitjax.denoise(small, conditioning, noise, **{"plan": Plan(1), **options})


def test_microflow_none_needs_no_noise_and_no_key(small):
    conditioning = jitjax.encode_prompt(small, shared_runs.PROMPTS)
    noise = jax.random.normal(jax.random.key(0), (2, 8, 64))
    plan = shared_runs.SPARSE.replace(microflow="none", microflow_noise="fresh")
    options = {"plan": plan, "grid": shared_runs.GRID, "first_anchors": jnp.arange(5)}
    without = jitjax.denoise(small, conditioning, noise, **options)
    with_key = jitjax.denoise(small, conditioning, noise, key=jax.random.key(0), **options)
    np.testing.assert_array_equal(without, with_key)
