"""The FLUX transformer: velocities of image tokens, given noisy tokens, a prompt and sigma.

    tokens    [b, n, c] -- image_in --+                            +-- image --> image_out
    text      [b, t, d] -- text_in ---+- double blocks - single ---+             [b, n, c]
    pooled    [b, p] --+              |  (two streams)   blocks    |
    sigma     [b] -----+- conditioning vector, which modulates all blocks and the output
    guidance  [b] -----+
    positions [b, n, 3] -- rotations of queries and keys

Both kinds of block are scanned: the parameters of all blocks are stacked along a leading axis, so
that each kind is compiled once for any number of blocks.

The architecture is Black Forest Labs' FLUX.1. Reference: diffusers `FluxTransformer2DModel`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jitjax.config import EMBEDDING_SCALE, TransformerConfig
from jitjax.models.attention import attend
from jitjax.models.layers import (
    MLP,
    QKVProjection,
    Rotary,
    apply_rotary,
    clip_float16,
    dense,
    modulate,
    modulation_vectors,
    product,
    rotary_embedding,
    sinusoidal_embedding,
)
from jitjax.models.linen import Dense, scan_blocks
from jitjax.models.partitioning import product_of_joined
from jitjax.models.precision import at_least_float32


def _rotary_attention(
    query: Array, key: Array, value: Array, rotation: Rotary, mask: Array | None, attention: str
) -> Array:
    """Rotate queries and keys, attend, and join the heads: [b, s, hidden]."""
    query, key = (apply_rotary(x, rotation).astype(value.dtype) for x in (query, key))
    out = attend(query, key, value, mask, attention)
    return out.reshape(*out.shape[:2], -1)


class DoubleBlock(nn.Module):
    """Separate weights for the image and the text stream, with joint attention over both.

    Reference: diffusers `FluxTransformerBlock`.
    """

    config: TransformerConfig
    dtype: Any
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b t h"], Float[Array, "b n h"]],
        conditioning: Float[Array, "b h"],
        rotation: Rotary,
        mask: Bool[Array, "b 1 1 s"] | None,
    ) -> tuple[tuple[Array, Array], None]:
        config, dtype = self.config, self.dtype
        names = ("text", "image")
        modulations = [modulation_vectors(conditioning, 6, dtype, f"{n}_modulation") for n in names]

        projected = []
        for name, x, (shift, scale, *_) in zip(names, streams, modulations, strict=True):
            project = QKVProjection(
                config.num_attention_heads,
                config.attention_head_dim,
                dtype,
                name=f"{name}_attention",
            )
            projected.append(project(modulate(x, shift, scale)))
        query, key, value = (jnp.concatenate(pair, axis=1) for pair in zip(*projected, strict=True))
        joint = _rotary_attention(query, key, value, rotation, mask, self.attention)

        out = []
        attended = jnp.split(joint, [streams[0].shape[1]], axis=1)
        for name, x, y, modulation in zip(names, streams, attended, modulations, strict=True):
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
            y = dense(config.hidden, dtype=dtype, name=f"{name}_attention_out")(y)
            x = x + gate[:, None, :] * y
            mlp = MLP(4 * config.hidden, config.hidden, dtype=dtype, name=f"{name}_mlp")
            x = x + mlp_gate[:, None, :] * mlp(modulate(x, mlp_shift, mlp_scale))
            out.append(clip_float16(x))
        return (out[0], out[1]), None


class SingleBlock(nn.Module):
    """Text and image as one stream, with attention and MLP in parallel and one output layer.

    Reference: diffusers `FluxSingleTransformerBlock`.
    """

    config: TransformerConfig
    dtype: Any
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s h"],
        conditioning: Float[Array, "b h"],
        rotation: Rotary,
        mask: Bool[Array, "b 1 1 s"] | None,
    ) -> tuple[Float[Array, "b s h"], None]:
        config, dtype = self.config, self.dtype
        shift, scale, gate = modulation_vectors(conditioning, 3, dtype, "modulation")
        normed = modulate(x, shift, scale)
        project = QKVProjection(
            config.num_attention_heads, config.attention_head_dim, dtype, name="attention"
        )
        attended = _rotary_attention(*project(normed), rotation, mask, self.attention)
        mlp = nn.gelu(dense(4 * config.hidden, dtype=dtype, name="mlp_up")(normed), True)
        joined = jnp.concatenate([attended, mlp], axis=-1)
        multiply = product_of_joined(product, config.hidden)
        y = dense(config.hidden, dtype=dtype, dot_general=multiply, name="out")(joined)
        return clip_float16(x + gate[:, None, :] * y), None


class FluxTransformer(nn.Module):
    """The FLUX transformer.

    Attributes:
        config: sizes.
        dtype: dtype of the matrix products and the residual stream. Parameters of another dtype
            are cast block by block.
        attention: the `implementation` of `jitjax.models.attention.attend`. "cudnn" and "auto" need
            padding to follow all valid tokens.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n i"],
        positions: Num[Array, "b n 3"],
        text: Float[Array, "b t d"],
        pooled: Float[Array, "b p"],
        sigma: Float[Array, " b"] | Float[Array, ""] | float,
        guidance: Float[Array, " b"] | Float[Array, ""] | float | None = None,
        valid: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b n o"]:
        """Compute the velocities dy/dsigma of the tokens.

        Args:
            tokens: [b, n, in_channels] noisy latents, 2 x 2 latent pixels per token, and after
                them what conditions them (see `TransformerConfig.control`). They may be any
                subset of the grid's tokens in any order.
            positions: [b, n, 3] position (0, row, column) of each token, in tokens.
            text: [b, t, d] T5 embeddings of the prompt. All have the position (0, 0, 0).
            pooled: [b, p] CLIP embedding of the prompt.
            sigma: noise level from 1 (noise) to 0 (image); a scalar or one per sample.
            guidance: guidance scale, such as 3.5; a scalar or one per sample. Models without
                guidance embeddings ignore it.
            valid: [b, n], False for padding tokens. No token attends to padding, which may hold
                any values, NaN included. None if there is no padding; no mask is built then.

        Returns:
            Velocities [b, n, out_channels], 0 for padding, in float32, or float64 if `dtype` is
            float64.

        Raises:
            ValueError: a shape or dtype does not fit, or the model needs `guidance` and it is None.
        """
        config, dtype = self.config, self.dtype
        _check_inputs(config, tokens, positions, text, pooled, sigma, guidance, valid)
        batch = tokens.shape[0]
        text_length = text.shape[1]

        mask = None
        if valid is not None:
            tokens = jnp.where(valid[:, :, None], tokens, 0)
            positions = jnp.where(valid[:, :, None], positions, 0)
            key_mask = jnp.concatenate([jnp.ones((batch, text_length), bool), valid], axis=1)
            mask = key_mask[:, None, None, :]

        def embed_scalar(name: str, value: Any) -> Array:
            value = jnp.asarray(value, jnp.float32)
            value = jnp.broadcast_to(value.reshape(-1), (batch,))
            return embed_vector(name, sinusoidal_embedding(value * EMBEDDING_SCALE))

        def embed_vector(name: str, value: Array) -> Array:
            # At least float32: it costs little, and it modulates every block.
            hidden = config.hidden
            return MLP(hidden, hidden, "silu", dtype=at_least_float32(dtype), name=name)(value)

        conditioning = embed_scalar("sigma_in", sigma) + embed_vector("pooled_in", pooled)
        if config.guidance_embeds:
            conditioning = conditioning + embed_scalar("guidance_in", guidance)
        conditioning = nn.silu(conditioning).astype(dtype)

        text_positions = jnp.zeros((batch, text_length, 3), jnp.float32)
        positions = jnp.concatenate([text_positions, positions.astype(jnp.float32)], axis=1)
        rotation = rotary_embedding(positions, config.axes_dims_rope)

        image_stream = Dense(config.hidden, dtype=dtype, name="image_in")(tokens)
        text_stream = Dense(config.hidden, dtype=dtype, name="text_in")(text)

        block_args = (config, dtype, self.attention)
        double = scan_blocks(DoubleBlock, config.num_layers, 3, "transformer/double_blocks")(
            *block_args, name="double_blocks"
        )
        streams, _ = double((text_stream, image_stream), conditioning, rotation, mask)
        single = scan_blocks(SingleBlock, config.num_single_layers, 3, "transformer/single_blocks")(
            *block_args, name="single_blocks"
        )
        x, _ = single(jnp.concatenate(streams, axis=1), conditioning, rotation, mask)

        image_stream = x[:, text_length:]
        # The reference has the scale first here, but the shift first in its blocks.
        scale, shift = modulation_vectors(conditioning, 2, dtype, "final_modulation")
        normed = modulate(image_stream, shift, scale)
        out = Dense(config.out_channels, dtype=dtype, name="image_out")(normed)
        out = out.astype(at_least_float32(dtype))
        return out if valid is None else jnp.where(valid[:, :, None], out, 0)


def _check_inputs(
    config: TransformerConfig,
    tokens: Array,
    positions: Array,
    text: Array,
    pooled: Array,
    sigma: Any,
    guidance: Any,
    valid: Array | None,
) -> None:
    """Raise one `ValueError` that lists every argument whose shape or dtype does not fit."""
    batch, count = tokens.shape[:2] if tokens.ndim >= 2 else ("b", "n")
    length = text.shape[1] if text.ndim >= 2 else "t"
    shapes = {
        "tokens": (tokens.shape, (batch, count, config.in_channels)),
        "positions": (positions.shape, (batch, count, 3)),
        "text": (text.shape, (batch, length, config.joint_attention_dim)),
        "pooled": (pooled.shape, (batch, config.pooled_projection_dim)),
    }
    if valid is not None:
        shapes["valid"] = (valid.shape, (batch, count))
    problems = [
        f"{name} has shape {got}, expected {expected}"
        for name, (got, expected) in shapes.items()
        if got != expected
    ]
    if valid is not None and valid.dtype != jnp.bool_:
        problems.append(f"valid has dtype {valid.dtype}, expected bool")
    if config.guidance_embeds and guidance is None:
        problems.append("guidance is None, expected a scale: the model has guidance embeddings")
    scalars = {"sigma": sigma, "guidance": guidance if config.guidance_embeds else None}
    for name, value in scalars.items():
        if value is not None and jnp.shape(value) not in ((), (1,), (batch,)):
            problems.append(f"{name} has shape {jnp.shape(value)}, expected () or ({batch},)")
    if problems:
        raise ValueError("FluxTransformer: " + "; ".join(problems))
