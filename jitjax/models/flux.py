"""The FLUX transformer: velocities of image tokens from noisy tokens, a prompt and sigma.

    tokens    [b, n, c] -- image_in --+                            +-- image --> image_out
    text      [b, t, d] -- text_in ---+- double blocks - single ---+             [b, n, c]
    pooled    [b, p] --+              |  (two streams)   blocks    |
    sigma     [b] -----+- conditioning vector, which modulates all blocks and the output
    guidance  [b] -----+
    positions [b, n, 3] -- rotations of queries and keys

Both kinds of block are scanned: parameters of all blocks lie stacked on a leading axis, and one
block of each kind is compiled, however many there are.

The architecture is Black Forest Labs' FLUX.1; the reference for every detail is diffusers'
`FluxTransformer2DModel`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jitjax.config import TransformerConfig
from jitjax.models.attention import attend
from jitjax.models.layers import (
    MLP,
    QKVProjection,
    Rotary,
    apply_rotary,
    at_least_float32,
    clip_float16,
    modulate,
    modulation_vectors,
    rotary_embedding,
    sinusoidal_embedding,
)

EMBEDDING_SCALE = 1000.0
"""FLUX embeds sigma and guidance times this."""


def _mix(
    query: Array, key: Array, value: Array, rotation: Rotary, mask: Array | None, attention: str
) -> Array:
    """Attention with rotated queries and keys; heads are joined in the result, [b, s, hidden]."""
    query, key = (apply_rotary(x, rotation).astype(value.dtype) for x in (query, key))
    out = attend(query, key, value, mask, attention)
    return out.reshape(*out.shape[:2], -1)


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, meeting in one joint attention.

    Reference: diffusers `FluxTransformerBlock`.
    """

    config: TransformerConfig
    dtype: Any
    attention: str

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
        parts = [modulation_vectors(conditioning, 6, dtype, f"{n}_modulation") for n in names]

        projected = []
        for name, x, (shift, scale, *_) in zip(names, streams, parts, strict=True):
            project = QKVProjection(
                config.num_attention_heads,
                config.attention_head_dim,
                dtype,
                name=f"{name}_attention",
            )
            projected.append(project(modulate(x, shift, scale)))
        query, key, value = (jnp.concatenate(both, axis=1) for both in zip(*projected, strict=True))
        joint = _mix(query, key, value, rotation, mask, self.attention)

        out = []
        mixed = jnp.split(joint, [streams[0].shape[1]], axis=1)
        for name, x, y, part in zip(names, streams, mixed, parts, strict=True):
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = part
            y = nn.Dense(config.hidden, dtype=dtype, name=f"{name}_attention_out")(y)
            x = x + gate[:, None, :] * y
            mlp = MLP(4 * config.hidden, config.hidden, dtype=dtype, name=f"{name}_mlp")
            x = x + mlp_gate[:, None, :] * mlp(modulate(x, mlp_shift, mlp_scale))
            out.append(clip_float16(x))
        return (out[0], out[1]), None


class SingleBlock(nn.Module):
    """Text and image as one stream; attention and MLP side by side, joined by one output layer.

    Reference: diffusers `FluxSingleTransformerBlock`.
    """

    config: TransformerConfig
    dtype: Any
    attention: str

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
        normal = modulate(x, shift, scale)
        project = QKVProjection(
            config.num_attention_heads, config.attention_head_dim, dtype, name="attention"
        )
        mixed = _mix(*project(normal), rotation, mask, self.attention)
        mlp = nn.gelu(nn.Dense(4 * config.hidden, dtype=dtype, name="mlp_up")(normal), True)
        both = jnp.concatenate([mixed, mlp], axis=-1)
        y = nn.Dense(config.hidden, dtype=dtype, name="out")(both)
        return clip_float16(x + gate[:, None, :] * y), None


def _stack(block: type[nn.Module], length: int) -> Any:
    """`length` blocks, each fed the result of the one before; parameters `[length, ...]`."""
    shared: Any = (nn.broadcast, nn.broadcast, nn.broadcast)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=shared,
        length=length,
    )


class FluxTransformer(nn.Module):
    """The FLUX transformer.

    Attributes:
        config: sizes.
        dtype: of the matrix products and the residual stream. Parameters may be stored in another
            dtype; they are cast block by block.
        attention: how attention is computed, see `jitjax.models.attention.attend`. With "cudnn",
            padding must stand last.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n c"],
        positions: Num[Array, "b n 3"],
        text: Float[Array, "b t d"],
        pooled: Float[Array, "b p"],
        sigma: Float[Array, " b"] | Float[Array, ""] | float,
        guidance: Float[Array, " b"] | Float[Array, ""] | float | None = None,
        valid: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Velocities dy/dsigma of the tokens, float32 (float64 where `dtype` is).

        Args:
            tokens: noisy latents, 2 x 2 latent pixels per token. Any subset of the grid's tokens,
                in any order: their places are in `positions`.
            positions: (0, row, column) of each token, in tokens.
            text: T5 embedding of the prompt; its tokens all have position (0, 0, 0).
            pooled: CLIP embedding of the prompt.
            sigma: noise level, 1 (noise) to 0 (image); one per sample, or one for all.
            guidance: guidance scale (3.5, say), for models that take one; others ignore it.
            valid: False for padding. No token attends to padding, whatever it holds (NaN, too),
                and its velocities are 0. None if there is none: then no mask is made at all.

        Raises:
            ValueError: a shape does not fit, or `guidance` is missing.
        """
        config, dtype = self.config, self.dtype
        _check(config, tokens, positions, text, pooled, sigma, guidance, valid)
        batch, _, channels = tokens.shape
        length = text.shape[1]

        mask = None
        if valid is not None:
            tokens = jnp.where(valid[:, :, None], tokens, 0)
            positions = jnp.where(valid[:, :, None], positions, 0)
            keys = jnp.concatenate([jnp.ones((batch, length), bool), valid], axis=1)
            mask = keys[:, None, None, :]

        def scalar(name: str, value: Any) -> Array:
            value = jnp.asarray(value, jnp.float32)
            value = jnp.broadcast_to(value.reshape(-1), (batch,))
            return vector(name, sinusoidal_embedding(value * EMBEDDING_SCALE))

        def vector(name: str, value: Array) -> Array:
            # Small, and everything downstream hangs on it: never narrower than float32.
            hidden = config.hidden
            return MLP(hidden, hidden, "silu", dtype=at_least_float32(dtype), name=name)(value)

        conditioning = scalar("sigma_in", sigma) + vector("pooled_in", pooled)
        if config.guidance_embeds:
            conditioning = conditioning + scalar("guidance_in", guidance)
        conditioning = nn.silu(conditioning).astype(dtype)

        image_ids = positions.astype(jnp.float32)
        ids = jnp.concatenate([jnp.zeros((batch, length, 3), jnp.float32), image_ids], axis=1)
        rotation = rotary_embedding(ids, config.axes_dims_rope)

        image = nn.Dense(config.hidden, dtype=dtype, name="image_in")(tokens)
        words = nn.Dense(config.hidden, dtype=dtype, name="text_in")(text)

        facts = (config, dtype, self.attention)
        double = _stack(DoubleBlock, config.num_layers)(*facts, name="double_blocks")
        (words, image), _ = double((words, image), conditioning, rotation, mask)
        single = _stack(SingleBlock, config.num_single_layers)(*facts, name="single_blocks")
        x, _ = single(jnp.concatenate([words, image], axis=1), conditioning, rotation, mask)

        image = x[:, length:]
        # Here the reference has the scale first, unlike in its blocks.
        scale, shift = modulation_vectors(conditioning, 2, dtype, "final_modulation")
        out = nn.Dense(channels, dtype=dtype, name="image_out")(modulate(image, shift, scale))
        out = out.astype(at_least_float32(dtype))
        return out if valid is None else jnp.where(valid[:, :, None], out, 0)


def _check(
    config: TransformerConfig,
    tokens: Array,
    positions: Array,
    text: Array,
    pooled: Array,
    sigma: Any,
    guidance: Any,
    valid: Array | None,
) -> None:
    """Raise one `ValueError` that names every argument that does not fit."""
    batch, count = tokens.shape[:2] if tokens.ndim >= 2 else ("b", "n")
    length = text.shape[1] if text.ndim >= 2 else "t"
    expected = {
        "tokens": (tokens.shape, (batch, count, config.in_channels)),
        "positions": (positions.shape, (batch, count, 3)),
        "text": (text.shape, (batch, length, config.joint_attention_dim)),
        "pooled": (pooled.shape, (batch, config.pooled_projection_dim)),
    }
    if valid is not None:
        expected["valid"] = (valid.shape, (batch, count))
    problems = [
        f"{name} has shape {got}, expected {wanted}"
        for name, (got, wanted) in expected.items()
        if got != wanted
    ]
    if valid is not None and valid.dtype != jnp.bool_:
        problems.append(f"valid has dtype {valid.dtype}, expected bool")
    if config.guidance_embeds and guidance is None:
        problems.append("guidance is None, but this model was trained with guidance embeddings")
    scalars = {"sigma": sigma, "guidance": guidance if config.guidance_embeds else None}
    for name, value in scalars.items():
        if value is not None and jnp.shape(value) not in ((), (1,), (batch,)):
            problems.append(f"{name} has shape {jnp.shape(value)}, expected () or ({batch},)")
    if problems:
        raise ValueError("FluxTransformer: " + "; ".join(problems))


def abstract_params(config: TransformerConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s of `dtype`: no memory, no computation."""

    def init() -> Any:
        tokens, positions = jnp.zeros((1, 1, config.in_channels)), jnp.zeros((1, 1, 3))
        text = jnp.zeros((1, 1, config.joint_attention_dim))
        pooled = jnp.zeros((1, config.pooled_projection_dim))
        arrays = (tokens, positions, text, pooled, jnp.ones(1), jnp.ones(1))
        return FluxTransformer(config).init(jax.random.key(0), *arrays)["params"]

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), jax.eval_shape(init))
