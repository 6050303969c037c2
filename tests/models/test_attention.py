"""How attention is computed: the choice of an implementation, and what reaches cuDNN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.config import TransformerConfig
from jitjax.models.attention import attend
from jitjax.models.flux import FluxTransformer, abstract_params

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


def test_the_transformer_counts_text_and_valid_tokens(calls):
    """Text stands first and is never padded here, so a row has its length and the valid tokens."""
    tokens, text = 5, 3
    valid = jnp.arange(tokens)[None, :] < jnp.asarray([5, 2])[:, None]
    shapes = abstract_params(CONFIG, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    calls.clear()  # of initialising, which takes the default
    FluxTransformer(CONFIG, jnp.bfloat16, "cudnn").apply(
        {"params": params},
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


def test_unknown_implementations_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of"):
        attend(*heads("float32"), None, "flash")
    with pytest.raises(ValueError, match="float32; expected bfloat16 or float16"):
        attend(*heads("float32"), None, "cudnn")
