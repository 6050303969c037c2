"""Parameters in host memory: the same pictures, with one model on the device at a time."""

from __future__ import annotations

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from jitjax import offload, text
from jitjax.checkpoint import PARTS
from jitjax.sampler import solve
from jitjax.sampler.plan import Plan

sample_module = sys.modules["jitjax.sample"]  # `jitjax.sample` is the function
SETTINGS = {"key": jax.random.key(0), "height": 32, "width": 32, "plan": Plan(1)}
TWO_STAGES = Plan(2, (0.5, 1.0), (0.5, 1.0))


@pytest.fixture(scope="module")
def on_host(saved):
    return jitjax.load(saved, low_memory=True)


def part_bytes(params, *parts):
    return sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(getattr(params, part)))


def watch(monkeypatch, ids_before):
    """Record the device bytes of parameters when each model starts and when it ends."""
    seen = []
    gc.collect()
    gc.freeze()  # later collections look at what is made from here on, and take no time

    def count(name):
        gc.collect()
        arrays = [x for x in jax.live_arrays() if id(x) not in ids_before]
        device = [x for x in arrays if x.sharding.memory_kind == "device"]
        seen.append((name, sum(x.nbytes for x in device)))

    def watched(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            count(name)
            result = jax.block_until_ready(function(*args, **kwargs))
            count(name)
            return result

        monkeypatch.setattr(module, name, call)

    for module, name in ((text, "encode_ids"), (solve, "jit_solve"), (sample_module, "_decode")):
        watched(module, name)
    return seen


def peak(monkeypatch, load):
    """Return the most device bytes in a call of `sample` with what `load` returns."""
    gc.collect()
    before = jax.live_arrays()
    with monkeypatch.context() as patch:
        seen = watch(patch, {id(x) for x in before})
        jitjax.sample(load(), "a red circle", **SETTINGS)
    assert {name for name, _ in seen} == {"encode_ids", "jit_solve", "_decode"}
    return max(number for _, number in seen)


@pytest.mark.slow
def test_the_device_holds_the_largest_part_and_not_the_sum(small, saved, monkeypatch):
    """`jax.live_arrays` counts all arrays; states and embeddings are the slack."""
    low = peak(monkeypatch, lambda: jitjax.load(saved, low_memory=True))
    naive = peak(monkeypatch, lambda: jitjax.load(saved))
    parts = [part_bytes(small, "t5", "clip"), *(part_bytes(small, p) for p in PARTS[::3])]
    slack = 40_000
    assert slack < min(sum(parts) - max(parts), max(parts)) / 2
    assert max(parts) <= low < max(parts) + slack
    assert sum(parts) <= naive < sum(parts) + slack


@pytest.mark.slow
def test_same_picture_to_the_bit(small, on_host):
    settings = SETTINGS | {"plan": TWO_STAGES}
    expected = jitjax.sample(small, "a red circle", **settings)
    got = jitjax.sample(on_host, "a red circle", **settings)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_each_function_alone(small, on_host):
    count = len(jax.live_arrays())
    conditioning = jitjax.encode_prompt(on_host, "a red circle")
    expected = jitjax.encode_prompt(small, "a red circle")
    np.testing.assert_array_equal(conditioning.text, expected.text)
    noise = jnp.ones((1, 4, 64))
    tokens, trace = jitjax.denoise(on_host, conditioning, noise, plan=Plan(1), trace=True)
    assert trace.evaluations == 1
    images = jitjax.decode(on_host, tokens, grid=(2, 2))
    assert images.sharding.memory_kind == "device"
    encoded = jitjax.encode(on_host, images)
    np.testing.assert_array_equal(encoded, jitjax.encode(small, images))
    assert encoded.sharding.memory_kind == "device"
    assert all(leaf.sharding.memory_kind == offload.HOST for leaf in jax.tree.leaves(on_host))
    del conditioning, expected, noise, tokens, trace, images, encoded
    gc.collect()
    assert len(jax.live_arrays()) <= count + 8  # constants of programs; a model has dozens


@pytest.mark.slow
def test_dtype_and_sharding_of_load(saved):
    device = jax.local_devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    options = {"dtype": "bfloat16", "parts": ("clip",)}
    params = jitjax.load(saved, low_memory=True, sharding=sharding, **options)
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == sharding.with_memory_kind(offload.HOST)
    expected = jitjax.load(saved, **options)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_bundled_checkpoint_in_host_memory():
    params = jitjax.load("tiny", low_memory=True, parts=("clip",))
    assert jax.tree.leaves(params)
    assert all(leaf.sharding.memory_kind == offload.HOST for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_copies_are_deleted_after_an_error(on_host, unchecked):
    gc.collect()
    count = len(jax.live_arrays())
    # The error holds the frames of all functions that it passed, and what they refer to.
    with pytest.raises(ValueError, match="tokens has shape") as error:
        jitjax.decode(on_host, np.ones((1, 3, 64), np.float32), grid=(4, 4))
    assert len(jax.live_arrays()) <= count
    assert error.traceback


@pytest.mark.parametrize(
    "call",
    [
        lambda p: jax.jit(lambda params: jitjax.sample(params, "a", **SETTINGS))(p),
        lambda p: jax.jit(lambda: jitjax.sample(p, "a", **SETTINGS))(),
        lambda p: jax.grad(lambda x: jitjax.decode(p, x, grid=(1, 1)).sum())(jnp.ones((1, 1, 64))),
    ],
)
def test_traced_calls_say_what_is_wrong(on_host, call):
    with pytest.raises(ValueError, match=r"in host memory .* traced"):
        call(on_host)


def test_compile_needs_parameters_on_a_device(on_host):
    with pytest.raises(ValueError, match="params are in host memory"):
        jitjax.compile(on_host)


def test_a_device_without_host_memory(monkeypatch):
    monkeypatch.setattr(offload, "HOST", "such_memory")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with pytest.raises(ValueError, match=r"has the memory kinds device, .*; expected such_memory"):
        offload.host_sharding(sharding)
