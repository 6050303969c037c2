"""Quantised weights: against NumPy, and against dequantised weights."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

import jitjax
from jitjax.checkpoint import abstract_params, quantise_params
from jitjax.config import FluxConfig
from jitjax.models import quantised
from jitjax.models.quantised import KINDS, Quantised, dequantise, multiply, quantise_stack
from jitjax.nested import flatten
from jitjax.sampler.grid import positions
from jitjax.velocity import FluxVelocity

RNG = np.random.default_rng(3)
GRID = (4, 4)


def random_kernel(*shape: int) -> np.ndarray:
    """Return a kernel whose channels have different magnitudes."""
    return (RNG.standard_normal(shape) * RNG.uniform(0.1, 3, shape[2:])).astype(np.float32)


@jax.jit
def restored(kernel: Quantised) -> jax.Array:
    """Return the weights of all blocks."""
    return jax.vmap(lambda block: dequantise(block, "float32"))(kernel)


def dequantised(tree):
    """Return a tree of parameters with plain kernels instead of quantised ones."""
    is_leaf = quantised.is_quantised
    return jax.tree.map(lambda x: restored(x) if is_leaf(x) else x, tree, is_leaf=is_leaf)


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "float8")]


@pytest.fixture(scope="module", params=["int4", *SLOW_KINDS])
def pair(request, small):
    """The small pipeline, quantised, and with the same weights dequantised."""
    params = quantise_params(small, request.param)
    plain = {part: dequantised(getattr(params, part)) for part in ("transformer", "t5")}
    return params, dataclasses.replace(params, **plain)


def test_int8_rounds_to_127_steps_per_output_channel_and_block():
    kernel = random_kernel(2, 48, 3, 5)
    got = quantise_stack(kernel, "int8")
    # XLA divides by 127 by a multiplication.
    scales = np.abs(kernel).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
    np.testing.assert_array_equal(got.values, np.rint(kernel / np.asarray(got.scales)))
    np.testing.assert_array_equal(restored(got), np.float32(got.values) * got.scales)


def test_int4_uses_16_steps_per_group_of_64_inputs():
    kernel = random_kernel(2, 192, 5)
    groups = kernel.reshape(2, 3, 64, 5)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(2)[:, :, None], axis=2)
    scales = (largest / -8).astype(jnp.bfloat16).astype(np.float32)
    values = np.clip(np.rint(groups / scales), -8, 7)
    assert {-8, 7} <= set(values.flatten())
    got = quantise_stack(kernel, "int4")
    assert got.values.shape == (2, 96, 5)
    assert got.scales.shape == (2, 3, 5)
    np.testing.assert_array_equal(restored(got), (values * scales).reshape(kernel.shape))


def test_float8_keeps_four_significant_bits():
    kernel = random_kernel(2, 48, 5)
    got = quantise_stack(kernel, "float8")
    # Half of the last of 4 bits; and half of e4m3's smallest number, of a largest of 448.
    step = 2.0**-10 / 448 * np.abs(kernel).max(axis=1, keepdims=True)
    error = np.abs(np.asarray(restored(got)) - kernel)
    assert (error <= 2.0**-4 * np.abs(kernel) + step).all()
    assert (error > 2.0**-6 * np.abs(kernel)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_an_exact_representation_is_exact(kind):
    values = {"int8": range(-127, 128), "int4": range(-8, 8), "float8": [0, 448, -288, 0.25]}[kind]
    kernel = np.resize(np.array(values, np.float32), (256 if kind == "int8" else 64))
    kernel = 0.125 * kernel[None, :, None]
    np.testing.assert_array_equal(restored(quantise_stack(kernel, kind)), kernel)
    zeros = np.zeros((1, 64, 3), np.float32)
    np.testing.assert_array_equal(restored(quantise_stack(zeros, kind)), zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_multiply_is_the_product_with_the_weights(kind, dtype):
    kernel = jax.tree.map(lambda x: x[0], quantise_stack(random_kernel(1, 128, 3, 4), kind))
    # In float16 the sums of int8's values, up to 127 per unit of x, would overflow.
    x = jnp.asarray(30 * RNG.standard_normal((2, 7, 128)), dtype)
    expected = np.einsum("bti,ihw->bthw", np.float64(x), np.float64(dequantise(kernel, "float32")))
    got = multiply(x, kernel)
    assert got.dtype == jnp.dtype(dtype)
    # Rounding of the result, and for int4 of each weight.
    tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.float64(got), expected, atol=tolerance)


def test_multiply_adds_a_low_rank_update():
    kernel = jax.tree.map(lambda x: x[0], quantise_stack(random_kernel(1, 16, 3, 4), "int8"))
    down, up = jnp.asarray(random_kernel(1, 16, 2)[0]), jnp.asarray(random_kernel(1, 2, 3, 4)[0])
    x = jnp.asarray(RNG.standard_normal((5, 16)), jnp.float32)
    weights = dequantise(kernel, "float32") + jnp.einsum("ir,rhw->ihw", down, up)
    got = multiply(x, dataclasses.replace(kernel, down=down, up=up))
    np.testing.assert_allclose(got, jnp.einsum("ti,ihw->thw", x, weights), atol=1e-4)


def inputs(params, batch: int = 1):
    """Return the tokens, and the conditioning, of a small picture."""
    config = params.config.transformer
    shapes = ((GRID[0] * GRID[1], 64), (12, config.joint_attention_dim))
    tokens, text = (jnp.asarray(RNG.standard_normal((batch, *s)), jnp.float32) for s in shapes)
    pooled = RNG.standard_normal((batch, config.pooled_projection_dim))
    return tokens, jitjax.Conditioning(text, jnp.asarray(pooled, jnp.float32))


@jax.jit
def velocity_of(params, tokens, conditioning):
    """Return the velocity at sigma 0.7."""
    shape = (len(tokens), tokens.shape[1], 3)
    where = jnp.broadcast_to(positions(jnp.arange(tokens.shape[1]), GRID), shape)
    args = (params, conditioning, jnp.full(len(tokens), 3.5))
    function = FluxVelocity(build.SMALL.transformer, "xla")
    return function(tokens, where, jnp.float32(0.7), None, args)


@jax.jit
def evaluate(params, tokens, conditioning):
    """Return the velocity at sigma 0.7, and the gradients of the sum of its squares."""

    def loss(tokens, conditioning):
        velocity = velocity_of(params, tokens, conditioning)
        return jnp.square(velocity).sum(), velocity

    (_, velocity), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(tokens, conditioning)
    return velocity, gradients


@pytest.mark.slow
def test_velocity_and_its_gradients_are_those_of_the_dequantised_weights(pair, small):
    tokens, conditioning = inputs(pair[0])
    got, expected = (
        list(map(np.asarray, jax.tree.leaves(evaluate(params.transformer, tokens, conditioning))))
        for params in pair
    )
    for a, b in zip(got, expected, strict=True):
        assert np.abs(b).max() > 0
        # float32 sums in another order: scales are multiplied after the sum.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    # The same comparison would hold for weights that were never quantised.
    exact = np.asarray(evaluate(small.transformer, tokens, conditioning)[0])
    relative = np.linalg.norm(got[0] - exact) / np.linalg.norm(exact)
    bounds = {"int8": (1e-3, 3e-2), "int4": (2e-2, 0.4), "float8": (5e-3, 0.1)}
    low, high = bounds[str(quantised.kind_of(pair[0].transformer))]
    assert low < relative < high


def test_t5_computes_with_the_dequantised_weights(pair):
    got, expected = (jitjax.encode_prompt(params, "a red circle").text for params in pair)
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_vmap_over_pictures_and_over_weights(small):
    params = quantise_params(small, "int4").transformer
    tokens, conditioning = inputs(small, batch=2)
    each = jax.tree.map(lambda x: x[:, None], (tokens, conditioning))
    expected = velocity_of(params, tokens, conditioning)
    got = jax.jit(jax.vmap(velocity_of, (None, 0, 0)))(params, *each)
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-4 * float(jnp.abs(expected).max()))
    kernel = quantise_stack(random_kernel(3, 64, 5), "int4")
    x = jnp.asarray(RNG.standard_normal((3, 2, 64)), jnp.float32)
    products = jax.vmap(multiply)(x, kernel)
    np.testing.assert_allclose(products, x @ restored(kernel), rtol=1e-4, atol=1e-3)


def test_what_is_quantised():
    params = abstract_params(FluxConfig(), "bfloat16", "int8")
    flat = {f"{part}/{path}": leaf for part in ("transformer", "t5", "clip", "autoencoder")
            for path, leaf in flatten(getattr(params, part)).items()}  # fmt: skip
    names = {path for path, leaf in flat.items() if quantised.is_quantised(leaf)}
    streams = [f"transformer/double_blocks/{s}" for s in ("text", "image")]
    assert names == {
        *(f"{s}_modulation/kernel" for s in streams),
        *(f"{s}_attention/qkv/kernel" for s in streams),
        *(f"{s}_attention_out/kernel" for s in streams),
        *(f"{s}_mlp/{layer}/kernel" for s in streams for layer in ("up", "down")),
        "transformer/single_blocks/modulation/kernel",
        "transformer/single_blocks/attention/qkv/kernel",
        "transformer/single_blocks/mlp_up/kernel",
        "transformer/single_blocks/out/kernel",
        "t5/blocks/attention/qkv/kernel",
        "t5/blocks/attention/out/kernel",
        "t5/blocks/mlp/gate_up/kernel",
        "t5/blocks/mlp/down/kernel",
    }
    assert {str(leaf.dtype) for path, leaf in flat.items() if path not in names} == {"bfloat16"}


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.51), ("int4", 0.28), ("float8", 0.51)])
def test_shapes_alone_have_the_bytes_of_full_size(kind, share):
    sizes = [
        sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params.transformer))
        for params in (
            abstract_params(FluxConfig(), "bfloat16"),
            abstract_params(FluxConfig(), "bfloat16", kind),
        )
    ]
    assert share - 0.02 < sizes[1] / sizes[0] < share


@pytest.mark.parametrize(
    "kind",
    [
        "int4",
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("float8", marks=pytest.mark.slow),
    ],
)
def test_shapes_alone_are_those_of_arrays(kind, small):
    arrays = quantise_params(small, kind)
    shapes = abstract_params(build.SMALL, quantise=kind)
    assert jax.tree.structure(arrays.transformer) == jax.tree.structure(shapes.transformer)
    for part in ("transformer", "t5"):
        pairs = zip(
            jax.tree.leaves(getattr(arrays, part)),
            jax.tree.leaves(getattr(shapes, part)),
            strict=True,
        )
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def test_summary_says_what_is_quantised(small):
    text = repr(quantise_params(small, "int4"))
    assert "float32/int4" in text
    plain = repr(small)
    count = re.search(r"transformer=([\d.]+ k)", plain)
    assert count
    assert f"transformer={count[1]}" in text


def test_errors(small):
    with pytest.raises(ValueError, match="quantise is 'int3'; expected one of int8, int4, float8"):
        quantise_params(small, "int3")
    int8 = quantise_params(small, "int8")
    with pytest.raises(ValueError, match="already quantised to int8; expected int8, not int4"):
        quantise_params(int8, "int4")
    assert quantise_params(int8, "int8").transformer == int8.transformer
    odd = dataclasses.replace(build.SMALL.t5, d_kv=3, num_heads=1)
    with pytest.raises(ValueError, match="3 inputs; int4 expects an even number"):
        abstract_params(dataclasses.replace(build.SMALL, t5=odd), quantise="int4")
