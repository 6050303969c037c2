"""The text encoders and the autoencoder: parameter counts, shapes, dtypes, masks, rule tables.

`tests/parity` compares their outputs with PyTorch.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.build import random_tree

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config
from jitjax.convert.tables.autoencoder import autoencoder_rules
from jitjax.convert.tables.engine import (
    ConversionError,
    apply_rule,
    check_keys,
    invert_rule,
    leaf_shapes,
)
from jitjax.convert.tables.text import (
    CLIP_ALIASES,
    T5_ALIASES,
    T5_IGNORED,
    canonical_names,
    clip_rules,
    t5_rules,
)
from jitjax.models import autoencoder, clip, param_shapes, t5
from jitjax.nested import flatten

T5 = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)
CLIP = CLIPConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
)
AUTOENCODER = AutoencoderConfig(
    latent_channels=4, block_out_channels=(4, 6), layers_per_block=1, norm_num_groups=2
)
MODELS = {
    "t5": (param_shapes.t5, T5),
    "clip": (param_shapes.clip, CLIP),
    "autoencoder": (param_shapes.autoencoder, AUTOENCODER),
}
RULES = {"t5": t5_rules, "clip": clip_rules, "autoencoder": autoencoder_rules}


def random_params(name: str, dtype=jnp.float32, seed: int = 0):
    shapes, config = MODELS[name]
    return random_tree(shapes(config, dtype), seed)


@pytest.mark.parametrize(
    ("shapes", "config", "count"),
    [
        (param_shapes.t5, T5Config(), 4_762_310_656),
        (param_shapes.clip, CLIPConfig(), 123_060_480),
        (param_shapes.autoencoder, AutoencoderConfig(), 83_819_683),
    ],
)
def test_full_size_parameter_count(shapes, config, count: int):
    tree = shapes(config, jnp.bfloat16)
    leaves = jax.tree.leaves(tree)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_full_size_shapes():
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    variables = {"params": param_shapes.t5(T5Config(), jnp.bfloat16)}
    text = jax.eval_shape(t5.T5Encoder(T5Config(), jnp.bfloat16).apply, variables, ids)
    assert (text.shape, text.dtype) == ((2, 512, 4096), jnp.bfloat16)

    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    variables = {"params": param_shapes.clip(CLIPConfig())}
    hidden, pooled = jax.eval_shape(clip.CLIPText(CLIPConfig()).apply, variables, ids)
    assert (hidden.shape, pooled.shape) == ((2, 77, 768), (2, 768))

    images = jax.ShapeDtypeStruct((1, 1024, 512, 3), jnp.float32)
    model = autoencoder.Autoencoder(AutoencoderConfig())
    variables = {"params": param_shapes.autoencoder(AutoencoderConfig())}
    mean, logvar = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="encode"), variables, images
    )
    assert mean.shape == logvar.shape == (1, 128, 64, 16)
    decoded = jax.eval_shape(lambda v, x: model.apply(v, x, method="decode"), variables, mean)
    assert decoded.shape == images.shape


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_jit_and_dtype(dtype):
    ids = jnp.array([[3, 4, 29], [5, 29, 29]])
    text = jax.jit(t5.T5Encoder(T5, dtype).apply)({"params": random_params("t5", dtype)}, ids)
    apply_clip = jax.jit(clip.CLIPText(CLIP, dtype).apply)
    hidden, pooled = apply_clip({"params": random_params("clip", dtype)}, ids)
    images = jax.jit(autoencoder.Autoencoder(AUTOENCODER, dtype).apply)(
        {"params": random_params("autoencoder", dtype)}, jnp.ones((2, 6, 4, 3), dtype)
    )
    for value, shape in (
        (text, (2, 3, 16)),
        (hidden, (2, 3, 16)),
        (pooled, (2, 16)),
        (images, (2, 6, 4, 3)),
    ):
        assert value.shape == shape
        assert value.dtype == dtype
        assert np.isfinite(np.asarray(value, np.float32)).all()


def test_t5_mask_hides_padding():
    variables = {"params": random_params("t5")}
    ids = jnp.array([[3, 4, 5, 0, 0], [3, 4, 5, 9, 8]])
    mask = jnp.arange(5)[None].repeat(2, 0) < 3
    encode = jax.jit(t5.T5Encoder(T5).apply)
    first, second = encode(variables, ids, mask)
    np.testing.assert_allclose(first[:3], second[:3], rtol=1e-6, atol=1e-6)
    first, second = encode(variables, ids)
    assert np.abs(first[:3] - second[:3]).max() > 1e-3


def test_clip_attention_is_causal():
    variables = {"params": random_params("clip")}
    encode = jax.jit(clip.CLIPText(CLIP).apply)
    hidden, _ = encode(variables, jnp.array([[3, 4, 5, 29], [3, 4, 9, 8]]))
    np.testing.assert_allclose(hidden[0, :2], hidden[1, :2], rtol=1e-6, atol=1e-6)
    assert np.abs(hidden[0, 2:] - hidden[1, 2:]).max() > 1e-3


@pytest.mark.parametrize(
    ("eos", "expected"), [(2, [2, 0]), (7, [1, 0]), (9, [2, 0])], ids=["old", "first", "new"]
)
def test_end_of_text(eos: int, expected: list[int]):
    ids = jnp.array([[1, 7, 9, 7], [8, 3, 3, 3]])
    np.testing.assert_array_equal(clip.end_of_text(ids, eos), expected)


def test_from_latents_inverts_to_latents():
    config = AutoencoderConfig()
    mean = jnp.linspace(-3, 3, 16).reshape(1, 1, 1, 16)
    latents = autoencoder.to_latents(mean, config)
    np.testing.assert_allclose(latents, (np.asarray(mean) - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(autoencoder.from_latents(latents, config), mean, atol=1e-6)


def test_inputs_of_unsupported_sizes_are_errors():
    with pytest.raises(ValueError, match=r"13 tokens per prompt; expected at most .* = 12"):
        clip.CLIPText(CLIP).apply({"params": random_params("clip")}, jnp.zeros((1, 13), int))
    with pytest.raises(ValueError, match=r"images are 6 x 5 pixels; expected multiples of 2"):
        autoencoder.Autoencoder(AUTOENCODER).apply(
            {"params": random_params("autoencoder")}, jnp.zeros((1, 6, 5, 3)), method="encode"
        )


@pytest.mark.parametrize("name", MODELS)
def test_apply_inverts_invert(name: str):
    shapes_of, config = MODELS[name]
    leaves = flatten(jax.tree.map(np.asarray, random_params(name)))
    rules = RULES[name](config)
    tensors: dict[str, np.ndarray] = {}
    for rule in rules:
        tensors |= invert_rule(rule, leaves[rule.target])
    shapes = leaf_shapes(shapes_of(config))
    check_keys(rules, shapes, {key: tensor.shape for key, tensor in tensors.items()}, label=name)
    for rule in rules:
        leaf = apply_rule(rule, tensors.__getitem__, shapes[rule.target], np.float32)
        np.testing.assert_array_equal(leaf, leaves[rule.target], err_msg=rule.target)


def test_aliases_of_tensor_names():
    published = "text_model.encoder.layers.0.mlp.fc1.bias"
    short = published.removeprefix("text_model.")
    assert canonical_names([short], CLIP_ALIASES) == {published: short}
    assert canonical_names([published], CLIP_ALIASES) == {published: published}
    names = canonical_names([short, published], CLIP_ALIASES)
    assert names == {published: published, short: short}

    shared, tied = "shared.weight", "encoder.embed_tokens.weight"
    assert canonical_names([tied], T5_ALIASES) == {shared: tied}
    assert canonical_names([shared], T5_ALIASES) == {shared: shared}
    assert set(canonical_names([shared, tied], T5_ALIASES)) - {shared} <= set(T5_IGNORED)


def test_missing_and_unknown_tensors_are_errors():
    rules, shapes = clip_rules(CLIP), leaf_shapes(param_shapes.clip(CLIP))
    with pytest.raises(ConversionError, match=r"unmatched key: text_projection.weight") as error:
        check_keys(rules, shapes, {"text_projection.weight": (16, 16)}, label="clip")
    (problems,) = error.value.lists.values()
    assert "missing key: text_model.final_layer_norm.bias [16]" in problems
    assert "... and 17 more" in str(error.value)
