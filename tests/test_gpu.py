"""Tests that need an NVIDIA GPU; run them with `pytest -m gpu -n 0`."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

import jitjax
from benchmarks import replay
from jitjax.config import TransformerConfig
from jitjax.models import param_shapes
from jitjax.models.attention import attend
from jitjax.models.devices import compiler_options
from jitjax.models.flux import FluxTransformer
from jitjax.velocity import FluxVelocity

pytestmark = pytest.mark.gpu
CONFIG = TransformerConfig(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=32,
    pooled_projection_dim=24,
    axes_dims_rope=(8, 28, 28),
)
BFLOAT16_TOLERANCE = 2e-2
"""Relative: bfloat16 has 8 bits, and the implementations round at different places."""


@pytest.fixture(scope="module", autouse=True)
def _require_gpu():
    assert jax.default_backend() == "gpu", "expected an NVIDIA GPU"


def relative_difference(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("valid", [384, 333])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_attention_equals_the_formula(batch, valid, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, 384, 4, 64), dtype) for key in keys)
    mask = jnp.broadcast_to(jnp.arange(384) < valid, (batch, 1, 1, 384))
    # Large values in the padding, so that attending to any of it changes the result.
    v_padded = jnp.where(mask[:, 0, 0, :, None, None], v, jnp.asarray(1e4, dtype))
    got = jax.jit(lambda *x: attend(*x, "cudnn"))(q, k, v_padded, None if valid == 384 else mask)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, :valid], v[:, :valid]))
    logits = np.einsum("bqhw,bkhw->bhqk", q, k) / 8
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert relative_difference(got, np.einsum("bhqk,bkhw->bqhw", weights, v)) < 5e-3


def test_auto_is_cudnn_and_has_all_derivatives():
    keys = jax.random.split(jax.random.key(0), 6)
    arrays = [jax.random.normal(key, (2, 256, 4, 64), "bfloat16") for key in keys]
    values, tangents = tuple(arrays[:3]), tuple(arrays[3:])
    mask = jnp.broadcast_to(jnp.arange(256) < 200, (2, 1, 1, 256))
    wide = tuple(x.astype(jnp.float32) for x in values)
    wide_tangents = tuple(x.astype(jnp.float32) for x in tangents)

    def attend_as(implementation):
        return lambda q, k, v: attend(q, k, v, mask, implementation)

    auto, exact = attend_as("auto"), attend_as("xla")
    assert "fmha" in jax.jit(auto).lower(*values).as_text()
    with jax.default_matmul_precision("highest"):
        expected, expected_jvp = jax.jvp(exact, wide, wide_tangents)
        expected_grad = jax.grad(lambda *x: exact(*x).sum())(*wide)
    assert relative_difference(jax.jit(auto)(*values), expected) < 5e-3
    assert (
        relative_difference(jax.jvp(auto, values, tangents)[1], expected_jvp) < BFLOAT16_TOLERANCE
    )
    gradient = jax.grad(lambda *x: auto(*x).astype(jnp.float32).sum())(*values)
    assert relative_difference(gradient, expected_grad) < BFLOAT16_TOLERANCE
    each = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None], mask[:1], "auto")[0])
    assert relative_difference(jax.jit(each)(*values), expected) < 5e-3


def test_weights_of_scanned_blocks_are_not_copied():
    """XLA hands cuBLAS pointers into the stacks of weights, for all products of both blocks."""
    params, tokens, positions, text, pooled = random_inputs(1, 256)
    model = FluxTransformer(CONFIG, jnp.bfloat16, "auto")
    jitted = jax.jit(model.apply, compiler_options=compiler_options())
    lowered = jitted.lower({"params": params}, tokens, positions, text, pooled, 0.7, 3.5)
    program = lowered.compile().as_text()
    products = len(re.findall(r"custom_call_target=\"__cublas", program))
    in_place = len(re.findall(r"^%dynamic-slice-fusion", program, re.MULTILINE))
    # Image and text in, the last modulation and image out are not in a scan.
    assert products - in_place <= 4, f"{in_place} of {products} products read weights in place"


@pytest.mark.parametrize("plan", ["4x", "7x"])
def test_denoise_in_bfloat16_is_close_to_xla(plan):
    params = jitjax.load("tiny", dtype=jnp.bfloat16)
    conditioning = jitjax.encode_prompt(params, ["a large red circle", "a small blue star"])
    noise = jax.random.normal(jax.random.key(0), (2, 256, 64))
    run = partial(
        jitjax.denoise,
        params,
        conditioning,
        noise,
        # Anchors on a fixed grid are the same for both implementations.
        plan=jitjax.PLANS[plan].replace(activation="grid"),
        key=jax.random.key(1),
    )
    assert relative_difference(run(), run(attention="xla")) < 2 * BFLOAT16_TOLERANCE


def random_inputs(batch: int, tokens: int):
    """Return params, tokens, positions, text and pooled."""
    keys = iter(jax.random.split(jax.random.key(1), 8))
    params = build.random_tree(param_shapes.transformer(CONFIG), seed=0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    index = jnp.arange(tokens)
    positions = jnp.stack([jnp.zeros(tokens), index // 16, index % 16], -1)
    positions = jnp.broadcast_to(positions, (batch, tokens, 3))
    text = jax.random.normal(next(keys), (batch, 64, 32))
    pooled = jax.random.normal(next(keys), (batch, 24))
    return params, jax.random.normal(next(keys), (batch, tokens, 64)), positions, text, pooled


def test_transformer_with_cudnn_and_padding():
    params, tokens, positions, text, pooled = random_inputs(2, 256)
    valid = jnp.broadcast_to(jnp.arange(256) < 200, (2, 256))
    padded = jnp.where(valid[:, :, None], tokens, jnp.nan)

    def velocity(attention, tokens, positions, valid):
        model = FluxTransformer(CONFIG, jnp.bfloat16, attention)
        return jax.jit(model.apply)(
            {"params": params}, tokens, positions, text, pooled, 0.7, 3.5, valid
        )

    expected = velocity("xla", tokens[:, :200], positions[:, :200], None)
    for attention in ("xla", "cudnn"):
        got = velocity(attention, padded, positions, valid)
        assert not np.asarray(got[:, 200:]).any()
        assert relative_difference(got[:, :200], expected) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("plan", ["4x", "7x"])
def test_padded_plan_with_cudnn(plan):
    params, noise, _, text, pooled = random_inputs(2, 256)
    results = []
    for attention in ("xla", "cudnn"):
        padded_plan = jitjax.PLANS[plan].replace(pad_to=128)
        budget = padded_plan.budgets(256, 64)[0]
        anchors = np.random.default_rng(0).permutation(256)[None, :budget].repeat(2, 0)
        results.append(
            jitjax.jit_solve(
                FluxVelocity(CONFIG, attention),
                noise,
                jnp.linspace(1, 0, padded_plan.steps + 1),
                # Anchors on a fixed grid are the same for both implementations.
                plan=padded_plan.replace(activation="grid"),
                grid=(16, 16),
                first_anchors=jnp.asarray(anchors),
                microflow_noise=noise[::-1],
                args=(params, jitjax.Conditioning(text, pooled), jnp.full(2, 3.5)),
                text_tokens=64,
            )
        )
    assert relative_difference(*results) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_recordings_replay(name):
    """Recordings replay as on a CPU if matrix products do not use TensorFloat-32."""
    params = replay.read_transformer(build.TRANSFORMER, build.TRANSFORMER.with_suffix(".json"))
    arrays = replay.read_recording(build.HERE / f"{name}.npz")
    with jax.default_matmul_precision("highest"):
        tokens, _ = replay.replay(params, arrays, replay.recorded_plan(arrays))
    assert replay.difference(np.asarray(tokens), arrays["latents_final"])[1] < 1e-4


def test_a_key_gives_the_same_image_alone_and_in_a_batch():
    params = jitjax.load("tiny")
    keys = jax.random.split(jax.random.key(0), 3)
    prompts = ["a large red circle", "a small blue star", "a green ring"]
    arguments = {"height": 256, "width": 256, "plan": "4x"}
    with jax.default_matmul_precision("highest"):
        batch = jitjax.sample(params, prompts, key=keys, **arguments)
        repeated = jitjax.sample(params, prompts, key=keys, **arguments)
        single = jitjax.sample(params, prompts[1:2], key=keys[1:2], **arguments)
    assert np.array_equal(batch, repeated)
    assert float(jnp.abs(single - batch[1:2]).max()) < 2 / 255
