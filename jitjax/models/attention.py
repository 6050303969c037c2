"""Attention over all tokens: JAX's own where it is fast, one head at a time on a CPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jitjax.models.layers import at_least_float32

IMPLEMENTATIONS = ("xla", "cudnn")
"""How attention can be computed."""


def attend(
    query: Float[Array, "b s heads width"],
    key: Float[Array, "b s heads width"],
    value: Float[Array, "b s heads width"],
    mask: Bool[Array, "b 1 1 s"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "b s heads width"]:
    """Every token attends to every token whose `mask` is true: `softmax(q k / sqrt(width)) v`.

    The two matrix products run in the dtype of the inputs, the softmax in float32 or wider.
    Source: Vaswani et al., 2017 (arXiv 1706.03762), equation 1; as in diffusers' FLUX.

    Args:
        query, key, value: heads of width `width`.
        mask: False for keys that no token attends to; None if there are none.
        implementation: "xla", or "cudnn" for cuDNN's flash attention on NVIDIA GPUs, which never
            holds the [b, heads, s, s] logits. It takes lengths instead of a mask: in every row
            of `mask` the True values must come first.

    Raises:
        ValueError: an unknown implementation, or "cudnn" for a dtype that it does not take.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    if implementation == "cudnn":
        if value.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"cuDNN's attention got {value.dtype}; expected bfloat16 or float16")
        lengths = None if mask is None else mask[:, 0, 0].sum(axis=-1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    if value.dtype == jnp.float64:  # JAX's softmax would be float32 even then
        return _by_heads(query, key, value, mask)
    platforms = {"cpu": _by_heads}
    elsewhere = _at_once
    if value.dtype == jnp.float16:  # JAX's products of float16 are for GPUs alone
        platforms |= {"cuda": _at_once, "rocm": _at_once}
        elsewhere = _at_once_in_float32
    return jax.lax.platform_dependent(query, key, value, mask, **platforms, default=elsewhere)


def _at_once(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def _at_once_in_float32(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    return _at_once(q, k, v, mask).astype(value.dtype)


def _by_heads(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """XLA on a CPU runs two plain matrices four times as fast as a batch of them."""
    b, s, heads, width = query.shape
    accumulated = at_least_float32(value.dtype)
    # float16 products would be computed in float32 in any case, but not everywhere lowered.
    inner = accumulated if value.dtype == jnp.float16 else value.dtype

    def one_head(qkvm: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, allowed = qkvm
        logits = jnp.matmul(q, k.T, preferred_element_type=accumulated) / math.sqrt(width)
        if allowed is not None:
            logits = jnp.where(allowed[None, :], logits, -jnp.inf)
        # Divided by their sum after the product: the shares are s x s, the result s x width.
        shares = jnp.exp(logits - logits.max(axis=1, keepdims=True))
        total = shares.sum(axis=1, keepdims=True)
        out = jnp.matmul(shares.astype(inner), v, preferred_element_type=accumulated)
        return (out / total).astype(value.dtype)

    def split(x: Array) -> Array:
        return x.astype(inner).transpose(0, 2, 1, 3).reshape(b * heads, s, width)

    rows = None if mask is None else jnp.repeat(mask[:, 0, 0], heads, axis=0)
    out = jax.lax.map(one_head, (split(query), split(key), split(value), rows))
    return out.reshape(b, heads, s, width).transpose(0, 2, 1, 3)
