"""`sample(negative_prompt=, true_guidance=)` and `denoise(negative=, true_guidance=)`."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_runs import DENSE, GRID, PROMPTS, SIZE
from shared_runs import SPARSE as SHORT

import jitjax
from jitjax.denoise import _draw, batch_keys, flux_sigmas
from jitjax.models import flux
from jitjax.negative import DEFAULT_TRUE_GUIDANCE, negative_inputs
from jitjax.sampler.grid import positions
from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import jit_solve
from jitjax.velocity import FluxVelocity, VelocityInputs

NEGATIVE = "blue square"
TOKENS = 8
SPARSE = Plan(3, (0.5, 0.75, 1.0), (0.4, 0.7, 1.0))
"""Stages of 1 step each, on 4, 6 and 8 tokens."""
ONE_STEP = Plan(1)
"""For gradients, whose compilation takes long."""
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def text(small) -> jitjax.Conditioning:
    return jitjax.encode_prompt(small, PROMPTS)


@pytest.fixture(scope="module")
def negative(small) -> jitjax.Conditioning:
    return jitjax.encode_prompt(small, [NEGATIVE, "grey"])


def first(conditioning: jitjax.Conditioning) -> jitjax.Conditioning:
    return jax.tree.map(lambda x: x[:1], conditioning)


@partial(jax.jit, static_argnums=0)
def call(velocity, *args):
    return velocity(*args)


def evaluate(small, conditioning, *guided, tokens=None, valid=None):
    tokens = jax.random.normal(jax.random.key(4), (2, TOKENS, 64)) if tokens is None else tokens
    where = jnp.broadcast_to(positions(jnp.arange(TOKENS), GRID), (2, TOKENS, 3))
    inputs = VelocityInputs(small.transformer, conditioning, jnp.array([3.5, 1.0]), *guided)
    velocity = FluxVelocity(small.config.transformer)
    return np.asarray(call(velocity, tokens, where, jnp.float32(0.6), valid, inputs))


@pytest.mark.slow
def test_the_velocity_combines_those_of_both_prompts(small, text, negative):
    scale = np.array([1.5, 4.0], np.float32)
    positive, of_negative = (evaluate(small, c) for c in (text, negative))
    expected = of_negative + scale[:, None, None] * (positive - of_negative)
    got = evaluate(small, text, negative, jnp.asarray(scale))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(got - positive).max() > 0.1  # it is not the positive one
    shared = evaluate(small, text, first(negative), jnp.asarray(scale))
    np.testing.assert_allclose(shared[0], expected[0], rtol=1e-4, atol=1e-5)


def test_padded_slots_do_not_matter(small, text, negative):
    tokens = jax.random.normal(jax.random.key(4), (2, TOKENS, 64))
    valid = jnp.arange(TOKENS)[None] < jnp.array([[7], [5]])
    broken = jnp.where(valid[:, :, None], tokens, jnp.nan)
    got, expected = (
        evaluate(small, text, negative, jnp.array([3.0, 2.0]), tokens=x, valid=valid)
        for x in (broken, tokens)
    )
    np.testing.assert_array_equal(got, expected)
    assert (got[~np.asarray(valid)] == 0).all()


def denoise(small, text, negative, scale=3.0, **options):
    noise = jax.random.normal(jax.random.key(1), (text.text.shape[0], TOKENS, 64))
    guided = {"negative": negative, "true_guidance": scale}
    own = {"plan": SPARSE, "grid": GRID, "key": KEY}
    return jitjax.denoise(small, text, noise, **own | guided | options)


@pytest.mark.slow
def test_everything_after_the_network_uses_the_combination(small, text, negative):
    """Lifter, importance, micro-flow, history: as a solve of two separate passes, combined."""
    # The third step, the first on all tokens, uses the history of the second.
    plan = SHORT.replace(steps=4, solver="multistep", microflow="hit")
    scale = jnp.array([3.0, 2.0])
    tokens, trace = denoise(small, text, negative, scale, plan=plan, trace=True)
    network = FluxVelocity(small.config.transformer)

    def combined(tokens, positions, sigma, valid, args):
        params, both = args
        positive, of_negative = (
            network(tokens, positions, sigma, valid, (params, c, jnp.full((2,), 3.5))) for c in both
        )
        return of_negative + scale[:, None, None] * (positive - of_negative)

    noise = jax.random.normal(jax.random.key(1), (2, TOKENS, 64))
    drawn = _draw(plan, GRID, 5, 64, batch_keys(KEY, 2))
    expected, other = jit_solve(
        combined,
        noise,
        jnp.asarray(flux_sigmas(plan, TOKENS, small.config)),
        plan=plan,
        grid=GRID,
        first_anchors=drawn[0],
        microflow_noise=drawn[1],
        args=(small.transformer, (text, negative)),
        trace=True,
    )
    np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=1e-4)
    for got, wanted in zip(trace.anchors, other.anchors, strict=True):
        np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(trace.transitions, other.transitions, strict=True):
        np.testing.assert_allclose(got.scores, wanted.scores, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got.target, wanted.target, rtol=1e-3, atol=1e-4)
    assert trace.evaluations == plan.steps


def test_both_passes_run_on_the_anchors_only_one_after_another(small, text, negative, monkeypatch):
    traced: list[tuple[int, ...]] = []
    check = flux._check_inputs

    def record(config, tokens, *others):
        traced.append(tokens.shape[:2])
        check(config, tokens, *others)

    monkeypatch.setattr(flux, "_check_inputs", record)
    plan = Plan(2, (0.5, 1.0), (0.5, 1.0))  # of no other test, so that it is traced
    jaxpr = jax.make_jaxpr(lambda: denoise(small, text, negative, plan=plan))()
    assert set(traced) == {(2, 4), (2, TOKENS)}
    # Traced once for both prompts: a loop of two passes, around the loops over the blocks.
    assert len(traced) == 2
    assert "length=2" in str(jaxpr)


def test_scale_1_and_no_negative_prompt_run_the_same_program(small, text, negative):
    noise = jax.random.normal(jax.random.key(1), (2, TOKENS, 64))

    def run(scale, of_negative):
        return lambda noise: jitjax.denoise(
            small,
            text,
            noise,
            plan=SHORT,
            grid=GRID,
            key=KEY,
            negative=of_negative,
            true_guidance=scale,
        )

    plain, off, also_off = (
        str(jax.make_jaxpr(run(*options))(noise))
        for options in ((None, None), (1.0, negative), (jnp.ones(2), first(negative)))
    )
    assert plain == off == also_off
    assert str(jax.make_jaxpr(run(2.0, negative))(noise)) != plain
    default = str(jax.make_jaxpr(run(None, negative))(noise))
    assert default == str(jax.make_jaxpr(run(DEFAULT_TRUE_GUIDANCE, negative))(noise))
    # A traced scale of 1 costs a second pass, and gives the same up to rounding.
    traced = jax.jit(lambda scale: denoise(small, text, negative, scale, plan=ONE_STEP))(1.0)
    plain = jitjax.denoise(small, text, noise, plan=ONE_STEP, grid=GRID, key=KEY)
    np.testing.assert_allclose(traced, plain, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def sampled(small):
    """Pictures of two prompts, each with its negative prompt and scale."""
    return np.asarray(sample(small))


NEGATIVES = [NEGATIVE, "grey"]
SCALES = jnp.array([3.0, 1.0])


def sample(small, prompts=PROMPTS, negatives=NEGATIVES, scale=SCALES, key=KEY, **options):
    options = {"plan": DENSE, **SIZE} | options
    return jitjax.sample(
        small, prompts, key=key, negative_prompt=negatives, true_guidance=scale, **options
    )


def test_sample_is_encode_denoise_decode(small, sampled):
    noise_keys = jax.vmap(jax.random.split)(batch_keys(KEY, 2))[:, 0]
    noise = jax.vmap(lambda key: jax.random.normal(key, (TOKENS, 64)))(noise_keys)
    tokens = jitjax.denoise(
        small,
        jitjax.encode_prompt(small, PROMPTS),
        noise,
        plan=DENSE,
        grid=GRID,
        negative=jitjax.encode_prompt(small, NEGATIVES),
        true_guidance=SCALES,
    )
    np.testing.assert_allclose(jitjax.decode(small, tokens, grid=GRID), sampled, atol=1e-4)
    plain = np.asarray(jitjax.sample(small, PROMPTS, key=KEY, plan=DENSE, **SIZE))
    np.testing.assert_allclose(plain[1], sampled[1], atol=1e-4)  # its scale is 1
    assert np.abs(plain[0] - sampled[0]).max() > 1e-2


@pytest.mark.slow
def test_ways_to_give_the_negative_prompts(small, sampled):
    """One per prompt or one for all, strings or encoded, with prompts that are strings or not."""
    encoded = jitjax.encode_prompt(small, NEGATIVES)
    for prompts, negatives in (
        (PROMPTS, encoded),
        (jitjax.encode_prompt(small, PROMPTS), NEGATIVES),
    ):
        np.testing.assert_allclose(sample(small, prompts, negatives), sampled, atol=1e-4)
    repeated = np.asarray(sample(small, negatives=[NEGATIVE] * 2))
    np.testing.assert_allclose(repeated[0], sampled[0], atol=1e-4)
    for shared in (NEGATIVE, [NEGATIVE], first(encoded)):
        np.testing.assert_allclose(sample(small, negatives=shared), repeated, atol=1e-4)
    # Without one it is the empty prompt.
    empty = sample(small, negatives="")
    np.testing.assert_array_equal(sample(small, negatives=None), empty)
    assert np.abs(empty - repeated).max() > 1e-3


def test_a_shared_negative_prompt_is_encoded_once(small, monkeypatch):
    rows: list[int] = []
    encode = sys.modules["jitjax.text"].encode_tokens

    def record(params, t5_ids, clip_ids):
        rows.append(t5_ids.shape[0])
        return encode(params, t5_ids, clip_ids)

    # Nothing but the encoders is of interest.
    monkeypatch.setattr(sys.modules["jitjax.sample"], "denoise", lambda *args, **_: args[2])
    blank = np.zeros((1, *SIZE.values(), 3), np.float32)
    monkeypatch.setattr(sys.modules["jitjax.sample"], "decode", lambda *_, **__: blank)
    for module in ("negative", "task"):
        monkeypatch.setattr(sys.modules[f"jitjax.{module}"], "encode_tokens", record)
    sample(small, negatives=NEGATIVE, chunk=1)
    assert rows == [1, 1, 1]
    rows.clear()
    sample(small)
    assert rows == [4]


@pytest.mark.slow
def test_batches_chunks_progress_and_keys(small, sampled):
    calls: list[int] = []
    chunked = sample(small, key=batch_keys(KEY, 2), chunk=1, progress=calls.append)
    np.testing.assert_allclose(chunked, sampled, atol=1e-4)
    assert calls == [1] * 4  # 2 steps, in two chunks
    jitted = jax.jit(lambda scale: sample(small, scale=scale, chunk=1))(SCALES)
    np.testing.assert_allclose(jitted, sampled, atol=1e-4)


@pytest.mark.slow
def test_parameters_in_host_memory(small, sampled):
    host = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), small
    )
    np.testing.assert_allclose(sample(host), sampled, atol=1e-4)


@pytest.mark.slow
def test_vmap_and_gradients(small, text, negative):
    noise = jax.random.normal(jax.random.key(1), (2, TOKENS, 64))

    def run(of_negative, scale, text, noise):
        options = {"negative": of_negative, "true_guidance": scale}
        return jitjax.denoise(small, text, noise, plan=ONE_STEP, grid=GRID, **options)

    def loss(*inputs):
        tokens = run(*jax.tree.map(lambda x: x[None], inputs))[0]
        return (tokens**2).sum(), tokens

    at = negative, jnp.array([3.0, 2.0])
    transformed = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1), has_aux=True)))
    gradients, mapped = transformed(*at, text, noise)
    np.testing.assert_allclose(mapped, run(*at, text, noise), rtol=1e-3, atol=1e-4)
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradients))
    # Against a difference along one direction of both arguments.
    rng = np.random.default_rng(9)
    along = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), at)
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradients, along)))
    step = np.float32(1e-3)

    def loss_at(step):
        moved = jax.tree.map(lambda x, d: jnp.asarray(np.asarray(x) + step * d), at, along)
        return np.square(run(*moved, text, noise), dtype=float).sum()

    np.testing.assert_allclose(slope, (loss_at(step) - loss_at(-step)) / (2 * step), rtol=0.02)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"true_guidance": 0.5}, ValueError, "true_guidance is 0.5; expected finite .* 1 or more"),
        ({"true_guidance": -3}, ValueError, "true_guidance is -3"),
        ({"true_guidance": np.nan}, ValueError, "true_guidance is nan"),
        ({"true_guidance": [2.0, np.inf]}, ValueError, "expected finite numbers"),
        ({"true_guidance": 1e39}, ValueError, "expected finite numbers"),
        ({"true_guidance": np.ones(3)}, ValueError, r"shape \[3\].* expected .* \[\] or \[2\]"),
        ({"true_guidance": "2"}, ValueError, "true_guidance is a str; expected an array"),
        ({"true_guidance": 2j}, ValueError, "expected real numbers"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt is int; expected a string"),
        ({"negative_prompt": ["a", 3]}, TypeError, r"negative_prompt\[1\] is int"),
        ({"negative_prompt": []}, ValueError, "negative_prompt is empty"),
        ({"negative_prompt": "\ud800"}, ValueError, r"negative_prompt\[0\] has '\\ud800'"),
        ({"negative_prompt": ["a"] * 3}, ValueError, "has 3 strings; expected 1 or 2"),
        # What does not matter is checked too.
        ({"negative_prompt": 3, "true_guidance": 1}, TypeError, "negative_prompt is int"),
    ],
)
def test_errors_before_any_model_runs(small, monkeypatch, change, error, message):
    def fail(*arguments, **options):
        raise AssertionError("a model runs")

    for module, name in (("sample", "denoise"), ("sample", "encode_both")):
        monkeypatch.setattr(sys.modules[f"jitjax.{module}"], name, fail)
    arguments = {"negative_prompt": NEGATIVE, "key": KEY, "plan": SPARSE, **SIZE} | change
    with pytest.raises(error, match=message):
        jitjax.sample(small, PROMPTS[:2], **arguments)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_encoded_negative_prompts(small, text, negative):
    def fails(of_negative, message, scale=None):
        with pytest.raises(ValueError, match=message):
            denoise(small, text, of_negative, scale)
        if of_negative is not None:
            message = message.replace("negative ", "negative_prompt ")
            with pytest.raises(ValueError, match=message):
                sample(small, PROMPTS[:2], of_negative, scale)

    fails(None, "true_guidance is given, but negative is None; expected both", 2.0)
    cut = dataclasses.replace(negative, text=negative.text[:, :5])
    fails(cut, "negative has 5 text tokens; expected 12, as the prompts have")
    three = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), negative)
    fails(three, "negative has batch size 3; expected 1 or 2, the number of prompts")
    infinite = dataclasses.replace(negative, pooled=negative.pooled.at[0, 0].set(jnp.inf))
    fails(infinite, r"negative.*\.pooled has 1 values that are not finite")
    short = dataclasses.replace(text, text=text.text[:, :5])
    with pytest.raises(ValueError, match="negative_prompt has 12 text tokens; expected 5"):
        sample(small, short, NEGATIVE, 2.0)
    without = dataclasses.replace(small, t5={}, clip={})
    with pytest.raises(ValueError, match="no t5"):
        sample(without, text, NEGATIVE, 2.0)


def test_a_negative_prompt_that_is_too_long_is_told(small):
    with pytest.warns(UserWarning, match=r"negative_prompt\[0\] has more than 12 T5 tokens"):
        negative_inputs({"negative_prompt": "red " * 20}, small, 1, 12)
