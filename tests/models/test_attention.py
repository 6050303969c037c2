"""How attention is computed: the choice of an implementation, and what reaches cuDNN."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.config import TransformerConfig
from jitjax.models import attention, param_shapes
from jitjax.models.attention import attend
from jitjax.models.flux import FluxTransformer

CONFIG = TransformerConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 2, 2),
)


@pytest.fixture
def calls(monkeypatch):
    """What `jax.nn.dot_product_attention` is called with; tracing cuDNN's needs cuDNN."""
    received = []

    def record(query, key, value, **options):
        received.append((query, key, value, options))
        return value

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return received


def heads(dtype, tokens: int = 6):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, tokens, 3, 8), dtype) for key in keys]


@pytest.mark.parametrize("lengths", [None, (6, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_gets_lengths_and_no_mask(calls, lengths, dtype):
    mask = None
    if lengths:
        mask = (jnp.arange(6)[None, :] < jnp.asarray(lengths)[:, None])[:, None, None, :]
    query, key, value = heads(dtype)
    attend(query, key, value, mask, "cudnn")
    ((*arrays, options),) = calls
    assert all(a is b for a, b in zip(arrays, (query, key, value), strict=True))
    assert options.pop("implementation") == "cudnn"
    received = options.pop("key_value_seq_lengths")
    assert not options
    if lengths is None:
        assert received is None
    else:
        assert received.dtype == jnp.int32
        assert tuple(np.asarray(received)) == lengths


@pytest.mark.slow
def test_the_transformer_counts_text_and_valid_tokens(calls):
    """Text stands first and is never padded here, so a row has its length and the valid tokens."""
    tokens, text = 5, 3
    valid = jnp.arange(tokens)[None, :] < jnp.asarray([5, 2])[:, None]
    shapes = param_shapes.transformer(CONFIG, jnp.bfloat16)
    jax.eval_shape(
        FluxTransformer(CONFIG, jnp.bfloat16, "cudnn").apply,
        {"params": shapes},
        jnp.zeros((2, tokens, 64)),
        jnp.zeros((2, tokens, 3)),
        jnp.zeros((2, text, 12)),
        jnp.zeros((2, 8)),
        0.5,
        3.5,
        valid,
    )
    assert len(calls) >= 2  # both kinds of block; a scan may trace its body again
    for query, _, _, options in calls:
        assert query.shape == (2, text + tokens, 2, 8)
        assert options["key_value_seq_lengths"].shape == (2,)


def formula(query, key, value, valid: int):
    """Attention to the first `valid` keys in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key[:, :valid], value[:, :valid]))
    logits = np.einsum("bqhw,bkhw->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhw->bqhw", weights, v)


@pytest.mark.parametrize("valid", [37, 29])
@pytest.mark.parametrize("block", [1, 5, 36, 37, 100])
def test_blocks_of_queries_equal_the_formula(monkeypatch, block, valid):
    monkeypatch.setattr(attention, "LOGITS_BYTES", 4 * 2 * 3 * 37 * block)
    query, key, value = heads("float32", 37)
    mask = None
    if valid < 37:
        mask = jnp.broadcast_to(jnp.arange(37) < valid, (2, 1, 1, 37))
        # Values that would be seen in any result that attends to padding.
        key, value = (jnp.where(mask[:, 0, 0, :, None, None], x, 1e6) for x in (key, value))
    got = jax.jit(attention._attend_in_blocks)(query, key, value, mask)
    np.testing.assert_allclose(got, formula(query, key, value, valid), rtol=0, atol=3e-6)


def test_blocks_of_queries_have_the_derivatives_of_one_block(monkeypatch):
    arrays = heads("float32", 37)

    def loss(*arrays):
        return (attention._attend_in_blocks(*arrays, None) ** 2).sum()

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    monkeypatch.setattr(attention, "LOGITS_BYTES", 4 * 2 * 3 * 37 * 5)
    # Another function, or `jit` would take the program that it has.
    got = jax.jit(jax.grad(lambda *x: loss(*x), (0, 1, 2)))(*arrays)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_full_size_attention_holds_at_most_half_a_gigabyte():
    """All logits of FLUX.1-dev at 1024 px would be 2 GB."""
    array = jax.ShapeDtypeStruct((1, 4608, 24, 128), jnp.float32)
    attend_in_blocks = jax.jit(lambda *x: attention._attend_in_blocks(*x, None))
    compiled = attend_in_blocks.lower(array, array, array).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_no_full_size_program_has_all_logits(platform):
    """Exported from a CPU, where there is no cuDNN: for CUDA, attention is the XLA path."""
    array = jax.ShapeDtypeStruct((1, 4608, 24, 128), jnp.bfloat16)
    exported = jax.export.export(
        jax.jit(lambda *x: attend(*x, None, "auto")), platforms=[platform]
    )(array, array, array)
    program = exported.mlir_module()
    assert "4608x4608" not in program
    assert ("tpu_custom_call" in program) == (platform == "tpu")


@pytest.mark.parametrize(
    ("tokens", "valid"), [(256, 256), (200, 200), pytest.param(700, 650, marks=pytest.mark.slow)]
)
def test_pallas_attention_equals_the_formula(tokens, valid):
    """The TPU kernel in JAX's interpreter, with tokens that need padding and without."""
    from jax.experimental.pallas import tpu as pltpu

    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, tokens, 1, 128)) for k in keys)
    mask = None
    if valid < tokens:
        mask = (jnp.arange(tokens) < valid)[None, None, None, :]
        key, value = (jnp.where(mask[:, 0, 0, :, None, None], x, 1e6) for x in (key, value))
    with pltpu.force_tpu_interpret_mode():
        got = attend(query, key, value, mask, "pallas")
    np.testing.assert_allclose(got, formula(query, key, value, valid), rtol=0, atol=5e-6)


def test_auto_is_xla_where_nothing_faster_runs():
    arrays = heads("bfloat16")
    assert np.array_equal(attend(*arrays, None, "auto"), attend(*arrays, None, "xla"))


def test_auto_takes_cudnn_on_nvidia_gpus_with_the_derivatives_of_xla(monkeypatch):
    def fake(query, key, value, mask):
        return 7 * value

    monkeypatch.setattr(attention, "_has_cudnn", lambda *_: True)
    monkeypatch.setattr(attention, "_cudnn", fake)
    arrays = heads("bfloat16")

    def choose_as_for_cuda(*args, default, cuda=None, cpu=None, **_):
        return (cuda or cpu or default)(*args)

    real = jax.lax.platform_dependent
    monkeypatch.setattr(jax.lax, "platform_dependent", choose_as_for_cuda)
    assert np.array_equal(attend(*arrays, None, "auto"), 7 * arrays[2])
    value, tangent = jax.jvp(lambda v: attend(*arrays[:2], v, None, "auto"), arrays[2:], arrays[2:])
    monkeypatch.setattr(jax.lax, "platform_dependent", real)
    expected = attend(*arrays, None, "xla").astype(jnp.float32)
    for got in (value, tangent):  # attention is linear in its values
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ("9.0", "bfloat16", True),
        ("8.0", "float16", True),
        ("9.0", "float32", False),
        ("7.5", "float16", False),
        ("gfx942", "bfloat16", False),
    ],
)
def test_cudnn_needs_ampere_and_16_bits(calls, monkeypatch, capability, dtype, expected):
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    attention._has_cudnn.cache_clear()
    assert attention._has_cudnn((1, 8, 2, 64), dtype, True) == expected
    attention._has_cudnn.cache_clear()


def test_cudnn_that_cannot_be_traced_is_not_chosen(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    attention._has_cudnn.cache_clear()
    assert not attention._has_cudnn((1, 8, 2, 64), "bfloat16", False)  # no cuDNN here
    attention._has_cudnn.cache_clear()


def test_unknown_implementations_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of"):
        attend(*heads("float32"), None, "flash")
    with pytest.raises(ValueError, match="float32; expected bfloat16 or float16"):
        attend(*heads("float32"), None, "cudnn")
