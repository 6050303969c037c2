"""The autoencoder in strips: when they are used, and the memory of the full-size programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from jitjax.config import AutoencoderConfig
from jitjax.latents import unpack
from jitjax.models import param_shapes, strips
from jitjax.models.autoencoder import Autoencoder, from_latents
from jitjax.models.strips import decode_latents, encode_images
from jitjax.sampler.plan import Plan

OTHERS = ("cuda", "tpu", "rocm")
FULL = AutoencoderConfig()


def abstract_decode(decoder, height, width):
    latents = jax.ShapeDtypeStruct((1, height // 8, width // 8, 16), jnp.float32)
    return jax.jit(decoder), (param_shapes.autoencoder(FULL), latents)


@pytest.mark.parametrize(
    ("height", "width", "whole"),
    [
        (1024, 1024, True),
        pytest.param(512, 2048, True, marks=pytest.mark.slow),
        (1024, 1040, False),
        pytest.param(2064, 512, False, marks=pytest.mark.slow),
    ],
)
def test_images_up_to_1024_squared_are_decoded_by_the_same_program_as_before(height, width, whole):
    def before(params, latents):
        return Autoencoder(FULL).apply({"params": params}, latents, method="decode")

    def decode(params, latents):
        return decode_latents(FULL, params, latents, jnp.float32)

    decode.__name__ = before.__name__  # a part of the text
    texts = []
    for function in (decode, before):
        jitted, arguments = abstract_decode(function, height, width)
        texts.append(jitted.lower(*arguments).as_text())
    assert (texts[0] == texts[1]) == whole


@pytest.mark.parametrize("side", [2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_full_size_memory(side):
    """Untiled, 2048 x 2048 take 14 GiB; 1024 x 1024, the most that is decoded untiled, 3.5 GiB.

    In strips, the largest arrays are one with the last level's channels and the one of half its
    size from which it is made. The strips may take as much again as the latter.
    """
    jitted, arguments = abstract_decode(
        lambda p, x: decode_latents(FULL, p, x, jnp.float32), side, side
    )
    memory = jitted.lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * side**2 * FULL.block_out_channels[0] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "most"), [(1024, 1024, 392), (1024, 1040, 200)])
def test_full_size_memory_of_the_encoder(height, width, most):
    """Values of temporaries per pixel: the whole encoder holds three arrays of the first level."""
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    jitted = jax.jit(lambda p, x: encode_images(FULL, p, x, jnp.float32))
    memory = jitted.lower(param_shapes.autoencoder(FULL), images).compile().memory_analysis()
    assert memory is not None
    values = memory.temp_size_in_bytes / 4 / height / width
    assert 0.9 * most < values < 1.01 * most


@pytest.mark.parametrize(
    "platform", ["cpu", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_full_size_program_has_no_array_of_all_logits(platform):
    """The mid block attends over 65536 latent pixels at 2048 x 2048.

    A test of its own, because the memory analysis of a CPU leaves out what is fused with a product.
    """
    jitted, arguments = abstract_decode(
        lambda p, x: decode_latents(FULL, p, x, jnp.float32), 2048, 2048
    )
    program = jax.export.export(jitted, platforms=[platform])(*arguments).mlir_module()
    assert "65536x512" in program
    assert "65536x65536" not in program


@pytest.mark.slow
def test_decode_runs_in_strips_above_1024_squared(small):
    grid = (66, 64)  # 1056 x 1024 pixels
    config, params = small.config, small.part("autoencoder")
    tokens = jax.random.normal(jax.random.key(0), (1, 66 * 64, config.transformer.out_channels))
    got = jitjax.decode(small, tokens, grid=grid)

    def before(params, tokens):
        latents = from_latents(unpack(tokens, grid), config.autoencoder)
        model = Autoencoder(config.autoencoder)
        images = model.apply({"params": params}, latents, method="decode")
        assert isinstance(images, jax.Array)
        return jnp.clip(images / 2 + 0.5, 0, 1)

    expected = jax.jit(before)(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    jaxpr = jax.make_jaxpr(lambda x: jitjax.decode(small, x, grid=grid))(tokens)
    assert "scan" in str(jaxpr).partition("conv_general_dilated")[2]


def test_compile_runs_in_strips(small, monkeypatch):
    class Reached(Exception):
        pass

    def stop(*_):
        raise Reached

    monkeypatch.setattr(strips, "decode_in_strips", stop)
    with pytest.raises(Reached):
        jitjax.compile(small, plan=Plan(1, (1.0,), (1.0,)), height=1024, width=1040)
