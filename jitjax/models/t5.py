"""The T5 encoder (v1.1), from which FLUX takes one vector per prompt token.

    ids [b, l] -> embedding -> blocks x layers -> RMS norm -> text [b, l, d]
                                  ^
          relative bias [1, heads, l, l], one table for all blocks

Source: Raffel et al., 2019 (arXiv 1910.10683); gated GELU: Shazeer, 2020 (arXiv 2002.05202).
Reference: transformers 5 `T5EncoderModel`.
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
from jitjax.models.linen import Dense, DenseGeneral, Embed, GivenParams, scan_blocks
from jitjax.models.partitioning import over_batch, whole


class RMSNorm(GivenParams, nn.Module):
    """Root mean square norm in float32, multiplied by a learned scale in `dtype`."""

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
    """Bidirectional multi-head attention. T5 adds a bias to the logits and does not scale them."""

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
        features = (3, c.num_heads, c.d_kv)
        qkv = DenseGeneral(features, use_bias=False, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        x = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0, implementation="xla")
        x = x.reshape(*x.shape[:2], c.num_heads * c.d_kv)
        return Dense(c.d_model, use_bias=False, dtype=self.dtype, name="out")(x)


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, with gate and up in one kernel."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        gate_up = DenseGeneral((2, c.d_ff), use_bias=False, dtype=self.dtype, name="gate_up")(x)
        x = jax.nn.gelu(gate_up[..., 0, :], approximate=True) * gate_up[..., 1, :]
        return Dense(c.d_model, use_bias=False, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the gated MLP, each added to the stream."""

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
        return x, None  # `nn.scan` expects (carry, output).


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of the relative position of every (query, key) pair.

    One half of the buckets is for keys up to the query, the other for keys after it. In each half,
    the first half of the buckets holds one distance each. The others cover distances up to
    `max_distance` on a logarithmic scale, and the last one also holds all larger distances.

    This runs on the host with NumPy: lengths are static, and the float32 logarithm has to round as
    the reference's does, or distances at a bucket's boundary would change buckets.

    Reference: transformers `T5Attention._relative_position_bucket`.

    Args:
        length: sequence length of queries and keys.
        buckets: total number of buckets.
        max_distance: distances from here on share the last bucket.

    Returns:
        int32 [length, length], indexed by query and key.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # Distances below `exact` do not use the logarithm; the maximum keeps it finite for them.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scale = np.float32(math.log(max_distance / exact))
    log_bucket = exact + (np.log(ratio) / scale * np.float32(half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(log_bucket, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class T5Encoder(nn.Module):
    """T5's encoder.

    Attributes:
        config: sizes.
        dtype: dtype of the computation; norms and softmax are float32 for every dtype.
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
            mask: [b, l], True for tokens that may be attended to. None attends to all tokens,
                padding included, as FLUX does.

        Returns:
            Hidden states after the final norm, [b, l, d_model] in `dtype`.
        """
        c = self.config
        embed = Embed(c.vocab_size, c.d_model, dtype=self.dtype, name="token_embedding")
        x = over_batch(embed(whole(ids)))
        buckets = relative_buckets(
            ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        relative_bias = Embed(
            c.relative_attention_num_buckets, c.num_heads, dtype=self.dtype, name="relative_bias"
        )
        bias = relative_bias(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        key_mask = None if mask is None else mask[:, None, None, :]
        blocks = scan_blocks(Block, c.num_layers, 2, "t5/blocks")
        x, _ = blocks(c, self.dtype, name="blocks")(x, bias, key_mask)
        return RMSNorm(c.layer_norm_epsilon, self.dtype, name="final_norm")(x)
