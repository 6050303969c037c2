"""The T5 encoder (v1.1), which turns token ids into the text sequence of FLUX.

    ids [b, l] -> embedding -> blocks x layers -> RMS norm -> text [b, l, d]
                                  ^
          relative bias [1, heads, l, l], one table for all blocks

Raffel et al., 2019 (arXiv 1910.10683); gated GELU after Shazeer, 2020 (arXiv 2002.05202). The
numbers are those of `T5EncoderModel` in transformers 5.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jitjax.config import T5Config


class RMSNorm(nn.Module):
    """Root mean square norm: a scale, no mean, no bias; computed in float32."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        return x.astype(self.dtype) * scale.astype(self.dtype)


class SelfAttention(nn.Module):
    """Attention over the whole sequence. T5 adds a bias to the scores and does not scale them."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        bias: Float[Array, "1 heads l l"],
        mask: Bool[Array, "b 1 1 l"] | None,
    ) -> Float[Array, "b l d"]:
        c = self.config
        heads = (3, c.num_heads, c.d_kv)
        qkv = nn.DenseGeneral(heads, use_bias=False, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        x = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0, implementation="xla")
        x = x.reshape(*x.shape[:2], c.num_heads * c.d_kv)
        return nn.Dense(c.d_model, use_bias=False, dtype=self.dtype, name="out")(x)


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, gate and up in one kernel."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        both = nn.DenseGeneral((2, c.d_ff), use_bias=False, dtype=self.dtype, name="gate_up")(x)
        x = jax.nn.gelu(both[..., 0, :], approximate=True) * both[..., 1, :]
        return nn.Dense(c.d_model, use_bias=False, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    """Attention, then the gated MLP; each on a normed copy, each added to the stream."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        bias: Float[Array, "1 heads l l"],
        mask: Bool[Array, "b 1 1 l"] | None,
    ) -> tuple[Float[Array, "b l d"], None]:
        c = self.config
        normed = RMSNorm(c.layer_norm_epsilon, self.dtype, name="attention_norm")(x)
        x = x + SelfAttention(c, self.dtype, name="attention")(normed, bias, mask)
        normed = RMSNorm(c.layer_norm_epsilon, self.dtype, name="mlp_norm")(x)
        x = x + GatedMLP(c, self.dtype, name="mlp")(normed)
        return x, None  # (carry, output) as `nn.scan` wants it


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair: half of the buckets for keys before, half for keys after.

    Within a half, the first buckets hold one distance each, the others hold distances on a
    logarithmic scale up to `max_distance`; all beyond share the last one.

    Computed on the host: the lengths are static, and the float32 logarithm must round as the
    original's does, or the boundary distances change buckets.

    Args:
        length: sequence length, of queries and keys.
        buckets: number of buckets in all.
        max_distance: where the last bucket begins.

    Returns:
        int32 [length, length], query by key.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # Distances below `exact` do not use the logarithm; 1 keeps it finite there.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scale = np.float32(math.log(max_distance / exact))
    log_bucket = exact + (np.log(ratio) / scale * np.float32(half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(log_bucket, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class T5Encoder(nn.Module):
    """The encoder stack.

    Attributes:
        config: sizes.
        dtype: dtype of the computation; norms and softmax are float32 in any case.
    """

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        """Encode token ids.

        Args:
            ids: [b, l] token ids.
            mask: [b, l], True where a token may be attended to. None attends everywhere, padding
                included, as FLUX does.

        Returns:
            [b, l, d_model] in `dtype`.
        """
        c = self.config
        x = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, name="token_embedding")(ids)
        buckets = relative_buckets(
            ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        table = nn.Embed(
            c.relative_attention_num_buckets, c.num_heads, dtype=self.dtype, name="relative_bias"
        )
        bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        keys = None if mask is None else mask[:, None, None, :]
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=c.num_layers,
        )
        x, _ = stack(c, self.dtype, name="blocks")(x, bias, keys)
        return RMSNorm(c.layer_norm_epsilon, self.dtype, name="final_norm")(x)


def abstract_params(config: T5Config, dtype: Any = jnp.float32) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s of `dtype`; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
