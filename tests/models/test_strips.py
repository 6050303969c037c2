"""The autoencoder in strips: that it computes what the untiled one does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.build import random_tree

import jitjax
from jitjax.config import AutoencoderConfig
from jitjax.models import param_shapes, strips
from jitjax.models.autoencoder import Autoencoder
from jitjax.models.strips import decode_in_strips, encode_in_strips

# Three levels, of which one runs as a whole; resnets with and without a change of channels.
CONFIG = AutoencoderConfig(
    latent_channels=4, block_out_channels=(4, 8, 12), layers_per_block=1, norm_num_groups=2
)
TWO_LEVELS = AutoencoderConfig(
    latent_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2
)


def untiled(config, params, latents, dtype=jnp.float32):
    model = Autoencoder(config, dtype)
    return model.apply({"params": {"decoder": params}}, latents, method="decode")


def decoder_params(config, dtype=jnp.float32):
    return random_tree(param_shapes.autoencoder(config, dtype)["decoder"], 0)


def random_latents(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def in_float32(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def assert_close_trees(got, expected):
    """Check that no leaf differs by more than 1e-5 of the largest value of all."""
    got, expected = (list(map(np.asarray, jax.tree.leaves(x))) for x in (got, expected))
    largest = max(np.abs(leaf).max() for leaf in expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


# One function for all tests, so that a configuration and shape is compiled once.
jit_untiled = jax.jit(untiled, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def tiny():
    return jitjax.load("tiny")


@pytest.mark.parametrize(
    ("config", "shape", "pixels"),
    [
        (TWO_LEVELS, (2, 9, 7, 4), 2**9),  # a last strip of fewer rows than the others
        # A picture that is lower than a strip:
        pytest.param(TWO_LEVELS, (1, 1, 8, 4), 1, marks=pytest.mark.slow),
        pytest.param(CONFIG, (2, 9, 7, 4), 1, marks=pytest.mark.slow),  # the lowest possible strips
        pytest.param(CONFIG, (2, 9, 7, 4), 2**9, marks=pytest.mark.slow),
        pytest.param(CONFIG, (2, 9, 7, 4), 2**20, marks=pytest.mark.slow),  # one strip
        pytest.param(CONFIG, (1, 1, 8, 4), 1, marks=pytest.mark.slow),
    ],
)
def test_image_is_that_of_the_untiled_decoder(config, shape, pixels, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", pixels)
    params, latents = decoder_params(config), random_latents(*shape)
    got = jax.jit(lambda p, x: decode_in_strips(config, p, x, jnp.float32))(params, latents)
    expected = jit_untiled(config, params, latents)
    assert got.shape == expected.shape
    assert np.std(expected) > 0.1
    # Rounding of float32, in sums of other orders.
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
def test_bundled_decoder(tiny, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", 2**12)
    config, params = tiny.config.autoencoder, tiny.part("autoencoder")["decoder"]
    params = in_float32(params)
    latents = random_latents(2, 14, 21, config.latent_channels)
    got = jax.jit(lambda p, x: decode_in_strips(config, p, x, jnp.float32))(params, latents)
    expected = jit_untiled(config, params, latents)
    np.testing.assert_allclose(got, expected, atol=2e-5)

    # Both are as far from float32 in bfloat16. The largest difference is no measure of it: it is 9
    # times 1/255 between two compilations of the same decoder.
    half, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, latents))
    exact = np.asarray(jit_untiled(config, *in_float32((half, x))))
    errors = {}
    for decoder in (decode_in_strips, untiled):
        image = jax.jit(lambda p, x, f=decoder: f(config, p, x, jnp.bfloat16))(half, x)
        assert image.dtype == jnp.bfloat16
        errors[decoder] = np.sqrt(np.mean((np.asarray(image, np.float32) - exact) ** 2))
    assert errors[decode_in_strips] < 1.1 * errors[untiled]
    assert errors[untiled] / 2 < 1 / 255  # images are in [-1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives(mode, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", 2**5)
    params, latents = decoder_params(TWO_LEVELS), random_latents(2, 6, 5, 4)
    weights = np.random.default_rng(2).normal(size=(2, 12, 10, 3)).astype(np.float32)

    def derivatives(decoder):
        def decode(params, latents):
            return decoder(TWO_LEVELS, params, latents, jnp.float32)

        inputs = (params, latents)
        if mode == "forward":
            tangents = jax.tree.map(np.cos, inputs)
            return jax.jit(lambda x, t: jax.jvp(decode, x, t))(inputs, tangents)
        return jax.jit(jax.grad(lambda *x: (decode(*x) * weights).sum(), (0, 1)))(*inputs)

    assert_close_trees(derivatives(decode_in_strips), derivatives(untiled))


@pytest.mark.slow
def test_vmap_is_a_batch(monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", 2**8)
    params, latents = decoder_params(TWO_LEVELS), random_latents(3, 2, 6, 5, 4)

    def decode(x):
        return decode_in_strips(TWO_LEVELS, params, x, jnp.float32)

    images = jax.jit(jax.vmap(decode))(latents)
    flat = jax.jit(decode)(latents.reshape(6, 6, 5, 4))
    np.testing.assert_allclose(images.reshape(flat.shape), flat, atol=1e-5)


def untiled_encoder(config, params, images, dtype=jnp.float32):
    model = Autoencoder(config, dtype)
    return model.apply({"params": {"encoder": params}}, images, method="encode")


jit_untiled_encoder = jax.jit(untiled_encoder, static_argnums=(0, 3))


def encoder_params(config):
    return random_tree(param_shapes.autoencoder(config)["encoder"], 0)


@pytest.mark.parametrize(
    ("config", "shape", "pixels"),
    [
        (TWO_LEVELS, (2, 36, 28, 3), 2**9),  # a last strip of fewer rows than the others
        # One row of the result:
        pytest.param(TWO_LEVELS, (1, 4, 8, 3), 1, marks=pytest.mark.slow),
        pytest.param(CONFIG, (2, 36, 28, 3), 2**9, marks=pytest.mark.slow),
        pytest.param(CONFIG, (1, 4, 8, 3), 1, marks=pytest.mark.slow),
        # The lowest possible strips, and one strip.
        pytest.param(CONFIG, (2, 36, 28, 3), 1, marks=pytest.mark.slow),
        pytest.param(CONFIG, (2, 36, 28, 3), 2**20, marks=pytest.mark.slow),
    ],
)
def test_latents_are_those_of_the_untiled_encoder(config, shape, pixels, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", pixels)
    params, images = encoder_params(config), random_latents(*shape)
    got = jax.jit(lambda p, x: encode_in_strips(config, p, x, jnp.float32))(params, images)
    expected = jit_untiled_encoder(config, params, images)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert np.std(b) > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_bundled_encoder(tiny, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", 2**12)
    config, params = tiny.config.autoencoder, tiny.part("autoencoder")["encoder"]
    params = in_float32(params)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 112, 176, 3)).astype(np.float32)
    got = jax.jit(lambda p, x: encode_in_strips(config, p, x, jnp.float32))(params, images)
    expected = jit_untiled_encoder(config, params, images)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_gradient_of_the_encoder(monkeypatch):
    monkeypatch.setattr(strips, "STRIP_PIXELS", 2**5)
    params, images = encoder_params(TWO_LEVELS), random_latents(2, 12, 10, 3)

    def gradient(encoder):
        def loss(params, images):
            mean, logvar = encoder(TWO_LEVELS, params, images, jnp.float32)
            return (jnp.sin(mean) + logvar).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(params, images)

    assert_close_trees(gradient(encode_in_strips), gradient(untiled_encoder))


def test_statistics_do_not_cancel():
    """A mean 1000 times the standard deviation: E[x^2] - E[x]^2 has no correct digit in float32."""
    x = 1000 + np.random.default_rng(0).normal(size=(2, 23, 8, 6)).astype(np.float32)
    picture = strips.Picture(strips._split(jnp.asarray(x), 5), 23, None, jnp.float32)
    assert picture.strips.shape == (5, 2, 5, 8, 6)
    mean, variance = jax.jit(lambda: picture.statistics(lambda x: x, 0, 3))()
    grouped = x.astype(np.float64).reshape(2, 23, 8, 3, 2)
    np.testing.assert_allclose(mean, grouped.mean((1, 2, 4)), rtol=1e-6)
    np.testing.assert_allclose(variance, grouped.var((1, 2, 4)), rtol=1e-4)
