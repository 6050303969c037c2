"""The written-out shapes of parameters are those that Flax finds by tracing the models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config, TransformerConfig
from jitjax.models import param_shapes
from jitjax.models.autoencoder import Autoencoder
from jitjax.models.clip import CLIPText
from jitjax.models.flux import FluxTransformer
from jitjax.models.t5 import T5Encoder

SCHNELL = TransformerConfig(guidance_embeds=False, num_layers=1, in_channels=128)
NARROW = AutoencoderConfig(
    in_channels=4,
    out_channels=5,
    latent_channels=6,
    block_out_channels=(8, 24),
    layers_per_block=3,
    norm_num_groups=4,
)


def ids(length: int = 3) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def transformer_inputs(c: TransformerConfig) -> list[jax.ShapeDtypeStruct]:
    widths = (c.in_channels, 3, c.joint_attention_dim)
    tokens = [floats(1, 2, width) for width in widths]
    return [*tokens, floats(1, c.pooled_projection_dim), floats(1), floats(1)]


CASES = {
    "transformer": (FluxTransformer, TransformerConfig()),
    "without guidance": (FluxTransformer, SCHNELL),
    "canny": (FluxTransformer, TransformerConfig(in_channels=128, out_channels=64)),
    "fill": (FluxTransformer, TransformerConfig(in_channels=384, out_channels=64)),
    "t5": (T5Encoder, T5Config()),
    "wide heads": (T5Encoder, T5Config(num_heads=3, d_kv=7, d_ff=9, num_layers=1)),
    "clip": (CLIPText, CLIPConfig()),
    "short clip": (CLIPText, CLIPConfig(max_position_embeddings=9, intermediate_size=10)),
    "autoencoder": (Autoencoder, AutoencoderConfig()),
    "narrow autoencoder": (Autoencoder, NARROW),
}
SHAPES = {
    FluxTransformer: param_shapes.transformer,
    T5Encoder: param_shapes.t5,
    CLIPText: param_shapes.clip,
    Autoencoder: param_shapes.autoencoder,
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_those_of_flax(name):
    model, config = CASES[name]
    if model is FluxTransformer:
        inputs = transformer_inputs(config)
    elif model is Autoencoder:
        inputs = [floats(1, config.factor, config.factor, config.in_channels)]
    else:
        inputs = [ids()]
    traced = jax.eval_shape(model(config).init, jax.random.key(0), *inputs)["params"]
    assert SHAPES[model](config) == traced


def test_dtype_is_that_of_every_leaf():
    leaves = jax.tree.leaves(param_shapes.clip(CLIPConfig(), jnp.bfloat16))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
