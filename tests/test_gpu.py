"""What only an NVIDIA GPU can show: `pytest -m gpu -n 0` on a machine that has one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

import jitjax
from benchmarks import replay
from jitjax.config import TransformerConfig
from jitjax.denoise import FluxVelocity
from jitjax.models.attention import attend
from jitjax.models.flux import FluxTransformer, abstract_params

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
BFLOAT16 = 2e-2
"""Relative: bfloat16 has 8 bits, and the two ways round at other places."""


@pytest.fixture(scope="module", autouse=True)
def _on_a_gpu():
    assert jax.default_backend() == "gpu", "expected an NVIDIA GPU"


def difference(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("valid", [384, 333])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_attention_is_the_formula(batch, valid, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, 384, 4, 64), dtype) for key in keys)
    mask = jnp.broadcast_to(jnp.arange(384) < valid, (batch, 1, 1, 384))
    loud = jnp.where(mask[:, 0, 0, :, None, None], v, jnp.asarray(1e4, dtype))
    got = jax.jit(lambda *x: attend(*x, "cudnn"))(q, k, loud, None if valid == 384 else mask)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, :valid], v[:, :valid]))
    logits = np.einsum("bqhw,bkhw->bhqk", q, k) / 8
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert difference(got, np.einsum("bhqk,bkhw->bqhw", weights, v)) < 5e-3


def arguments(batch: int, tokens: int):
    keys = iter(jax.random.split(jax.random.key(1), 8))
    params = build.random_tree(abstract_params(CONFIG), seed=0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    places = jnp.stack([jnp.zeros(tokens), jnp.arange(tokens) // 16, jnp.arange(tokens) % 16], -1)
    places = jnp.broadcast_to(places, (batch, tokens, 3))
    text = jax.random.normal(next(keys), (batch, 64, 32))
    pooled = jax.random.normal(next(keys), (batch, 24))
    return params, jax.random.normal(next(keys), (batch, tokens, 64)), places, text, pooled


def test_the_transformer_with_cudnn_and_padding():
    params, tokens, places, text, pooled = arguments(2, 256)
    valid = jnp.broadcast_to(jnp.arange(256) < 200, (2, 256))
    padded = jnp.where(valid[:, :, None], tokens, jnp.nan)

    def velocity(attention, tokens, places, valid):
        model = FluxTransformer(CONFIG, jnp.bfloat16, attention)
        return jax.jit(model.apply)(
            {"params": params}, tokens, places, text, pooled, 0.7, 3.5, valid
        )

    short = velocity("xla", tokens[:, :200], places[:, :200], None)
    for attention in ("xla", "cudnn"):
        got = velocity(attention, padded, places, valid)
        assert not np.asarray(got[:, 200:]).any()
        assert difference(got[:, :200], short) < BFLOAT16


@pytest.mark.parametrize("plan", ["4x", "7x"])
def test_a_padded_plan_with_cudnn(plan):
    params, noise, _, text, pooled = arguments(2, 256)
    results = []
    for attention in ("xla", "cudnn"):
        chosen = jitjax.PLANS[plan].replace(pad_to=128)
        budget = chosen.budgets(256, 64)[0]
        anchors = np.random.default_rng(0).permutation(256)[None, :budget].repeat(2, 0)
        results.append(
            jitjax.jit_solve(
                FluxVelocity(CONFIG, attention),
                noise,
                jnp.linspace(1, 0, chosen.steps + 1),
                plan=chosen.replace(activation="grid"),  # the same anchors in both
                grid=(16, 16),
                first_anchors=jnp.asarray(anchors),
                microflow_noise=noise[::-1],
                args=(params, jitjax.Conditioning(text, pooled), jnp.full(2, 3.5)),
                text_tokens=64,
            )
        )
    assert difference(*results) < BFLOAT16


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_the_recordings_replay(name):
    """As on a CPU, if products are not rounded to TensorFloat-32."""
    params = replay.read_transformer(build.TRANSFORMER, build.TRANSFORMER.with_suffix(".json"))
    arrays = replay.read_recording(build.HERE / f"{name}.npz")
    with jax.default_matmul_precision("highest"):
        tokens, _ = replay.replay(params, arrays, replay.recorded_plan(arrays))
    assert replay.difference(np.asarray(tokens), arrays["latents_final"])[1] < 1e-4


def test_a_key_makes_the_same_picture_alone_and_in_a_batch():
    params = jitjax.load("tiny")
    keys = jax.random.split(jax.random.key(0), 3)
    prompts = ["a large red circle", "a small blue star", "a green ring"]
    size = {"height": 256, "width": 256, "plan": "4x"}
    with jax.default_matmul_precision("highest"):
        together = jitjax.sample(params, prompts, key=keys, **size)
        again = jitjax.sample(params, prompts, key=keys, **size)
        alone = jitjax.sample(params, prompts[1:2], key=keys[1:2], **size)
    assert np.array_equal(together, again)
    assert float(jnp.abs(alone - together[1:2]).max()) < 2 / 255
