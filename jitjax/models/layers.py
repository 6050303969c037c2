"""Pieces of the FLUX transformer: embeddings of scalars, rotary positions, projections, MLP.

Whatever the `dtype` of the network, sinusoids, rotations and normalisations are computed in
float32 (float64 for a float64 network): they are cheap, and the first to suffer from rounding.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EPSILON = 1e-6
"""Of every normalisation in FLUX."""
SCALAR_WIDTH = 256
"""Width of the sinusoidal embedding of sigma and of the guidance scale."""
THETA = 10_000.0
"""Base of the rotary frequencies, one for all position axes."""

Rotary = tuple[Float[Array, "b s 1 half"], Float[Array, "b s 1 half"]]


def at_least_float32(dtype: Any) -> Any:
    """float32, or float64 where `dtype` is."""
    return jnp.promote_types(dtype, jnp.float32)


def sinusoidal_embedding(
    values: Float[Array, " b"], width: int = SCALAR_WIDTH
) -> Float[Array, "b width"]:
    """Cosines, then sines, of `values` at geometrically falling frequencies from 1 to 1/10000.

    float32. Reference: diffusers `Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)`.
    """
    half = width // 2
    # Values reach thousands, so the last bit of a frequency shows in the phase (by 5e-4). The
    # exponent is rounded to float32 as in the reference, and its exponential correctly rounded.
    exponents = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32)
    exponents = (exponents / np.float32(half)).astype(np.float64)
    frequencies = np.exp(exponents).astype(np.float32)
    phases = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)


def rotary_embedding(positions: Float[Array, "b s axes"], widths: tuple[int, ...]) -> Rotary:
    """Cosines and sines by which pairs of query and key channels turn, float32.

    Args:
        positions: position ids, one column per axis (0, row, column).
        widths: channels per axis; they sum to the head width.

    Reference: diffusers `FluxPosEmbed`.
    """
    phases = []
    for axis, width in enumerate(widths):
        frequencies = THETA ** -(np.arange(0, width, 2, dtype=np.float64) / max(width, 1))
        one_axis = positions.astype(jnp.float32)[:, :, axis, None]
        phases.append(one_axis * frequencies.astype(np.float32)[None, None, :])
    angle = jnp.concatenate(phases, axis=-1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: Float[Array, "b s heads width"], rotation: Rotary) -> Float[Array, ...]:
    """Turn neighbouring channel pairs of `x` by their angles, in float32 or wider."""
    cos, sin = rotation
    pairs = x.astype(at_least_float32(x.dtype)).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape)


def modulate(
    x: Float[Array, "b s h"], shift: Float[Array, "b h"], scale: Float[Array, "b h"]
) -> Float[Array, "b s h"]:
    """LayerNorm without weights, then `x * (1 + scale) + shift`; float32 inside, or wider."""
    inner = x.astype(at_least_float32(x.dtype))
    centred = inner - inner.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + EPSILON)
    scale, shift = (v.astype(inner.dtype)[:, None, :] for v in (scale, shift))
    return (normal * (1 + scale) + shift).astype(x.dtype)


def clip_float16(x: Float[Array, ...]) -> Float[Array, ...]:
    """Clip a float16 residual stream to what float16 can hold, as diffusers does."""
    return jnp.clip(x, -65504, 65504) if x.dtype == jnp.float16 else x


class MLP(nn.Module):
    """Two linear layers, `up` and `down`, with an activation between.

    Reference: diffusers `FeedForward("gelu-approximate")`, and with `silu` `TimestepEmbedding` and
    `PixArtAlphaTextProjection`.
    """

    inner: int
    outer: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... outer"]:
        x = nn.Dense(self.inner, dtype=self.dtype, name="up")(x)
        x = nn.silu(x) if self.activation == "silu" else nn.gelu(x, approximate=True)
        return nn.Dense(self.outer, dtype=self.dtype, name="down")(x)


def modulation_vectors(
    conditioning: Float[Array, "b h"], parts: int, dtype: Any, name: str
) -> list[Float[Array, "b h"]]:
    """`parts` vectors per sample, by a linear layer `name` of the calling module.

    Reference: the `linear` of diffusers `AdaLayerNormZero`, and its order of the parts.
    """
    features = (parts, conditioning.shape[-1])
    out = nn.DenseGeneral(features, dtype=dtype, name=name)(conditioning)
    return [out[:, part] for part in range(parts)]


class QKVProjection(nn.Module):
    """Queries, keys and values of one stream, from one matrix product; queries and keys normed.

    Queries and keys are float32 or wider, because the rotation follows.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s h"]) -> tuple[Array, Array, Array]:
        features = (3, self.heads, self.width)
        qkv = nn.DenseGeneral(features, dtype=self.dtype, name="qkv")(x)
        norm = {"epsilon": EPSILON, "dtype": at_least_float32(self.dtype)}
        query = nn.RMSNorm(**norm, name="query_norm")(qkv[:, :, 0])
        key = nn.RMSNorm(**norm, name="key_norm")(qkv[:, :, 1])
        return query, key, qkv[:, :, 2]
