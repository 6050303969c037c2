"""Layers of the FLUX transformer: sinusoidal and rotary embeddings, modulation, projections, MLP.

Sinusoids, rotations and normalisations are computed in float32, even if the network's `dtype` is
narrower (rotations and normalisations of a float64 network in float64): they cost little and are
sensitive to rounding.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jitjax.models import linen, quantised
from jitjax.models.param_shapes import SCALAR_WIDTH
from jitjax.models.partitioning import over_batch, whole
from jitjax.models.precision import at_least_float32

EPSILON = 1e-6
"""Epsilon of every normalisation in FLUX."""
THETA = 10_000.0
"""Base of the rotary frequencies, one for all position axes."""

Rotary = tuple[Float[Array, "b s 1 half"], Float[Array, "b s 1 half"]]
"""Cosines and sines of the rotation angle of every channel pair, from `rotary_embedding`."""


def sinusoidal_embedding(
    values: Float[Array, " b"], width: int = SCALAR_WIDTH
) -> Float[Array, "b width"]:
    """Embed scalars as cosines, then sines, at frequencies that fall geometrically from 1.

    Reference: diffusers `Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)`.

    Args:
        values: [b] scalars: sigma or guidance times `EMBEDDING_SCALE`.
        width: number of channels, even; frequency i of width / 2 is 10000 ** (-2 i / width).

    Returns:
        float32 [b, width].
    """
    half = width // 2
    # Values reach thousands, so the last bit of a frequency changes the phase by 5e-4. Round the
    # exponent to float32 as the reference does, and its exponential correctly.
    exponents = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32)
    exponents = (exponents / np.float32(half)).astype(np.float64)
    frequencies = np.exp(exponents).astype(np.float32)
    phases = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)


def rotary_embedding(positions: Float[Array, "b s axes"], widths: tuple[int, ...]) -> Rotary:
    """Return the cosines and sines by which `apply_rotary` rotates queries and keys.

    Reference: diffusers `FluxPosEmbed`.

    Args:
        positions: [b, s, 3] position ids (0, row, column).
        widths: even number of channels per axis; they sum to the head width.

    Returns:
        cosines, sines: float32 [b, s, 1, head width / 2].
    """
    phases = []
    for axis, width in enumerate(widths):
        frequencies = THETA ** -(np.arange(0, width, 2, dtype=np.float64) / max(width, 1))
        coordinates = positions.astype(jnp.float32)[:, :, axis, None]
        phases.append(coordinates * frequencies.astype(np.float32)[None, None, :])
    angles = jnp.concatenate(phases, axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Float[Array, "b s heads width"], rotation: Rotary) -> Float[Array, ...]:
    """Rotate neighbouring channel pairs of `x` by their angles; the result is float32 or wider."""
    cos, sin = rotation
    pairs = x.astype(at_least_float32(x.dtype)).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape)


def modulate(
    x: Float[Array, "b s h"], shift: Float[Array, "b h"], scale: Float[Array, "b h"]
) -> Float[Array, "b s h"]:
    """Normalise `x` over its channels, then scale by `1 + scale` and add `shift`.

    This is a layer norm without weights. It computes in float32 or wider and returns the dtype of
    `x`. Reference: the norm and the modulation of diffusers `AdaLayerNormZero`.
    """
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + EPSILON)
    scale, shift = (v.astype(wide.dtype)[:, None, :] for v in (scale, shift))
    return (normed * (1 + scale) + shift).astype(x.dtype)


def clip_float16(x: Float[Array, ...]) -> Float[Array, ...]:
    """Clip infinities of a float16 residual stream to the range of float16, as diffusers does."""
    return jnp.clip(x, -65504, 65504) if x.dtype == jnp.float16 else x


def product(*args: Any, **kwargs: Any) -> Array:
    """The product of a layer, to which XLA does not fuse the bias that follows on NVIDIA GPUs.

    Blocks are scanned, so a product's weights are a slice of a stack. XLA passes a slice to cuBLAS
    in place, but copies it first if a bias is fused to the product (see docs/performance.md). The
    bias is fused with what comes after it instead. Arguments and result are those of
    `jitjax.models.quantised.product`.
    """
    return _barrier_on_cuda(quantised.product(*args, **kwargs))


@partial(jax.jit, inline=True)  # traced once per shape
def _barrier_on_cuda(array: Array) -> Array:
    return jax.lax.platform_dependent(
        array, cuda=jax.lax.optimization_barrier, default=lambda array: array
    )


dense = partial(linen.Dense, dot_general=product)
dense_general = partial(linen.DenseGeneral, dot_general=product)


class MLP(nn.Module):
    """Two linear layers, `up` and `down`, with an activation between them.

    Reference: diffusers `FeedForward("gelu-approximate")`; with "silu", diffusers
    `TimestepEmbedding` and `PixArtAlphaTextProjection`.

    Attributes:
        hidden_features: width between the two layers.
        out_features: width of the output.
        activation: "gelu" (its tanh approximation) or "silu".
        dtype: dtype of the computation.
    """

    hidden_features: int
    out_features: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... out"]:
        x = dense(self.hidden_features, dtype=self.dtype, name="up")(x)
        x = nn.silu(x) if self.activation == "silu" else nn.gelu(x, approximate=True)
        return dense(self.out_features, dtype=self.dtype, name="down")(x)


def modulation_vectors(
    conditioning: Float[Array, "b h"], parts: int, dtype: Any, name: str
) -> list[Float[Array, "b h"]]:
    """Project the conditioning to `parts` modulation vectors per sample.

    Reference: the `linear` of diffusers `AdaLayerNormZero`, with its order of the parts.

    Args:
        conditioning: [b, h].
        parts: number of vectors.
        dtype: dtype of the projection.
        name: name of the linear layer within the calling module.

    Returns:
        `parts` arrays [b, h].
    """
    features = (parts, conditioning.shape[-1])
    out = dense_general(features, dtype=dtype, name=name)(conditioning)
    out = over_batch(whole(out))  # the weights stay divided
    return [out[:, part] for part in range(parts)]


class QKVProjection(nn.Module):
    """Queries, keys and values from one matrix product, with RMS norm on queries and keys.

    Queries and keys are float32 or wider, for the rotation that follows.

    Attributes:
        heads: number of heads.
        width: channels per head.
        dtype: dtype of the product and of the values.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s h"]) -> tuple[Array, Array, Array]:
        features = (3, self.heads, self.width)
        qkv = dense_general(features, dtype=self.dtype, name="qkv")(x)
        norm = {"epsilon": EPSILON, "dtype": at_least_float32(self.dtype)}
        query = linen.RMSNorm(**norm, name="query_norm")(qkv[:, :, 0])
        key = linen.RMSNorm(**norm, name="key_norm")(qkv[:, :, 1])
        return query, key, qkv[:, :, 2]
