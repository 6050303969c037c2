"""Multi-head attention: JAX's implementation on accelerators, one head at a time on a CPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jitjax.models.layers import at_least_float32

IMPLEMENTATIONS = ("xla", "cudnn")
"""Values that `implementation` of `attend` may have."""


def attend(
    query: Float[Array, "b s heads width"],
    key: Float[Array, "b s heads width"],
    value: Float[Array, "b s heads width"],
    mask: Bool[Array, "b 1 1 s"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "b s heads width"]:
    """Compute multi-head attention, `softmax(q k / sqrt(width)) v`.

    The two matrix products run in the dtype of the inputs, the softmax in float32 or wider.
    Source: Vaswani et al., 2017 (arXiv 1706.03762), equation 1; as in diffusers' FLUX.

    Args:
        query, key, value: [b, s, heads, width].
        mask: [b, 1, 1, s], False for keys that no token attends to. None attends to all keys.
        implementation: "xla", or "cudnn" for cuDNN's flash attention on NVIDIA GPUs, which never
            holds the [b, heads, s, s] logits in memory. cuDNN takes lengths instead of a mask, so
            in every row of `mask` the True values must come first.

    Returns:
        [b, s, heads, width] in the dtype of `value`.

    Raises:
        ValueError: `implementation` is unknown, or "cudnn" with a dtype other than bfloat16 or
            float16.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    if implementation == "cudnn":
        if value.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"value has dtype {value.dtype}; expected bfloat16 or float16 for attention 'cudnn'"
            )
        lengths = None if mask is None else mask[:, 0, 0].sum(axis=-1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    if value.dtype == jnp.float64:  # JAX's function computes the softmax of float64 in float32.
        return _attend_per_head(query, key, value, mask)
    by_platform = {"cpu": _attend_per_head}
    default = _attend_batched
    if value.dtype == jnp.float16:  # JAX's function multiplies float16 on GPUs only.
        by_platform |= {"cuda": _attend_batched, "rocm": _attend_batched}
        default = _attend_batched_in_float32
    return jax.lax.platform_dependent(query, key, value, mask, **by_platform, default=default)


def _attend_batched(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def _attend_batched_in_float32(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    return _attend_batched(q, k, v, mask).astype(value.dtype)


def _attend_per_head(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Attend one head at a time: on a CPU, XLA's plain products are four times as fast as batched.

    Same shapes as `attend`.
    """
    b, s, heads, width = query.shape
    accumulator_dtype = at_least_float32(value.dtype)
    # Not every platform lowers float16 products, and a CPU would compute them in float32 anyway.
    product_dtype = accumulator_dtype if value.dtype == jnp.float16 else value.dtype

    def attend_one_head(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, allowed = inputs
        logits = jnp.matmul(q, k.T, preferred_element_type=accumulator_dtype) / math.sqrt(width)
        if allowed is not None:
            logits = jnp.where(allowed[None, :], logits, -jnp.inf)
        # Normalise after the product: the weights are [s, s], the output only [s, width].
        weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        out = jnp.matmul(weights.astype(product_dtype), v, preferred_element_type=accumulator_dtype)
        return (out / total).astype(value.dtype)

    def split_heads(x: Array) -> Array:
        return x.astype(product_dtype).transpose(0, 2, 1, 3).reshape(b * heads, s, width)

    allowed = None if mask is None else jnp.repeat(mask[:, 0, 0], heads, axis=0)
    q, k, v = split_heads(query), split_heads(key), split_heads(value)
    out = jax.lax.map(attend_one_head, (q, k, v, allowed))
    return out.reshape(b, heads, s, width).transpose(0, 2, 1, 3)
