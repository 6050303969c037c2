"""The parameters of every model by name and shape, computed from its configuration alone.

Flax knows them too, by tracing the model, which takes a second for all four, and ten times as long
as reading the bundled checkpoint. Loading and conversion need nothing but these shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config, TransformerConfig
from jitjax.nested import unflatten

SCALAR_WIDTH = 256
"""Width of the sinusoidal embedding of sigma and of the guidance scale."""

Shape = tuple[int, ...]


def transformer(config: TransformerConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Return the parameters of `FluxTransformer` as `jax.ShapeDtypeStruct`s, in nested dicts."""
    return _tree(config, dtype, _transformer)


def t5(config: T5Config, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Return the parameters of `T5Encoder` as `jax.ShapeDtypeStruct`s, in nested dicts."""
    return _tree(config, dtype, _t5)


def clip(config: CLIPConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Return the parameters of `CLIPText` as `jax.ShapeDtypeStruct`s, in nested dicts."""
    return _tree(config, dtype, _clip)


def autoencoder(config: AutoencoderConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Return the parameters of `Autoencoder` as `jax.ShapeDtypeStruct`s, in nested dicts."""
    return _tree(config, dtype, _autoencoder)


def _transformer(c: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    h, heads, width = c.hidden, c.num_attention_heads, c.attention_head_dim
    yield from _linear("image_in", (c.in_channels,), (h,))
    yield from _linear("text_in", (c.joint_attention_dim,), (h,))
    embedded = {"sigma_in": SCALAR_WIDTH, "pooled_in": c.pooled_projection_dim}
    if c.guidance_embeds:
        embedded["guidance_in"] = SCALAR_WIDTH
    for name, features in embedded.items():
        yield from _mlp(name, (features,), h, h)
    double, n = "double_blocks", (c.num_layers,)
    for stream in ("text", "image"):
        name = f"{double}/{stream}"
        yield from _linear(f"{name}_modulation", (*n, h), (6, h))
        yield from _qkv(f"{name}_attention", (*n, h), heads, width)
        yield from _linear(f"{name}_attention_out", (*n, h), (h,))
        yield from _mlp(f"{name}_mlp", (*n, h), 4 * h, h)
    single, n = "single_blocks", (c.num_single_layers,)
    yield from _linear(f"{single}/modulation", (*n, h), (3, h))
    yield from _qkv(f"{single}/attention", (*n, h), heads, width)
    yield from _linear(f"{single}/mlp_up", (*n, h), (4 * h,))
    yield from _linear(f"{single}/out", (*n, 5 * h), (h,))
    yield from _linear("final_modulation", (h,), (2, h))
    yield from _linear("image_out", (h,), (c.out_channels,))


def _t5(c: T5Config) -> Iterator[tuple[str, Shape]]:
    n, d = c.num_layers, c.d_model
    yield "token_embedding/embedding", (c.vocab_size, d)
    yield "relative_bias/embedding", (c.relative_attention_num_buckets, c.num_heads)
    yield "blocks/attention_norm/scale", (n, d)
    yield "blocks/attention/qkv/kernel", (n, d, 3, c.num_heads, c.d_kv)
    yield "blocks/attention/out/kernel", (n, c.num_heads * c.d_kv, d)
    yield "blocks/mlp_norm/scale", (n, d)
    yield "blocks/mlp/gate_up/kernel", (n, d, 2, c.d_ff)
    yield "blocks/mlp/down/kernel", (n, c.d_ff, d)
    yield "final_norm/scale", (d,)


def _clip(c: CLIPConfig) -> Iterator[tuple[str, Shape]]:
    n, d, heads = c.num_hidden_layers, c.hidden_size, c.num_attention_heads
    yield "token_embedding/embedding", (c.vocab_size, d)
    yield "position_embedding/embedding", (c.max_position_embeddings, d)
    yield from _norm("blocks/attention_norm", (n, d))
    yield from _linear("blocks/attention/qkv", (n, d), (3, heads, d // heads))
    yield from _linear("blocks/attention/out", (n, d), (d,))
    yield from _norm("blocks/mlp_norm", (n, d))
    yield from _mlp("blocks/mlp", (n, d), c.intermediate_size, d)
    yield from _norm("final_norm", (d,))


def _autoencoder(c: AutoencoderConfig) -> Iterator[tuple[str, Shape]]:
    widths = c.block_out_channels
    yield from _conv("encoder/conv_in", c.in_channels, widths[0])
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(c.layers_per_block):
            yield from _resnet(f"encoder/down_{i}/resnet_{j}", before, width)
            before = width
        if i + 1 < len(widths):
            yield from _conv(f"encoder/down_{i}/downsample", width, width)
    yield from _mid("encoder/mid", before)
    yield from _norm("encoder/norm_out", (before,))
    yield from _conv("encoder/conv_out", before, 2 * c.latent_channels)

    yield from _conv("decoder/conv_in", c.latent_channels, before)
    yield from _mid("decoder/mid", before)
    for i, width in enumerate(widths[::-1]):
        for j in range(c.layers_per_block + 1):
            yield from _resnet(f"decoder/up_{i}/resnet_{j}", before, width)
            before = width
        if i + 1 < len(widths):
            yield from _conv(f"decoder/up_{i}/upsample", width, width)
    yield from _norm("decoder/norm_out", (before,))
    yield from _conv("decoder/conv_out", before, c.out_channels)


def _linear(name: str, inputs: Shape, features: Shape) -> Iterator[tuple[str, Shape]]:
    """Kernel and bias; all but the last of `inputs` are the axis of stacked blocks, if any."""
    yield f"{name}/kernel", (*inputs, *features)
    yield f"{name}/bias", (*inputs[:-1], *features)


def _mlp(name: str, inputs: Shape, hidden: int, features: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}/up", inputs, (hidden,))
    yield from _linear(f"{name}/down", (*inputs[:-1], hidden), (features,))


def _qkv(name: str, inputs: Shape, heads: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}/qkv", inputs, (3, heads, width))
    yield f"{name}/query_norm/scale", (*inputs[:-1], width)
    yield f"{name}/key_norm/scale", (*inputs[:-1], width)


def _norm(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}/scale", shape
    yield f"{name}/bias", shape


def _conv(name: str, inputs: int, features: int, side: int = 3) -> Iterator[tuple[str, Shape]]:
    yield f"{name}/kernel", (side, side, inputs, features)
    yield f"{name}/bias", (features,)


def _resnet(name: str, inputs: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}/norm1", (inputs,))
    yield from _conv(f"{name}/conv1", inputs, width)
    yield from _norm(f"{name}/norm2", (width,))
    yield from _conv(f"{name}/conv2", width, width)
    if inputs != width:
        yield from _conv(f"{name}/shortcut", inputs, width, side=1)


def _mid(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _resnet(f"{name}/resnet_0", width, width)
    yield from _norm(f"{name}/attention/norm", (width,))
    yield from _linear(f"{name}/attention/qkv", (width,), (3, width))
    yield from _linear(f"{name}/attention/out", (width,), (width,))
    yield from _resnet(f"{name}/resnet_1", width, width)


def _tree(
    config: Any, dtype: DTypeLike, shapes: Callable[[Any], Iterator[tuple[str, Shape]]]
) -> dict[str, Any]:
    return unflatten({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes(config)})
