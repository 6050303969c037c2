"""`encode`: the inverse of `decode`, keys, transformations and errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_runs import HEIGHT, WIDTH

import jitjax
from jitjax.denoise import batch_keys
from jitjax.latents import pack
from jitjax.models.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)


@pytest.mark.slow
def test_decode_inverts_encode_on_a_picture_of_the_trained_model():
    """`tiny` has an autoencoder that is trained: its own pictures come back."""
    params = jitjax.load("tiny")
    pictures = jitjax.sample(
        params,
        "a large red circle",
        key=jax.random.key(0),
        height=256,
        width=256,
        plan="multistep-7",
    )
    tokens = jitjax.encode(params, pictures)
    assert tokens.shape == (1, 256, 64)
    assert tokens.dtype == jnp.float32
    again = jitjax.decode(params, tokens, grid=(16, 16))
    # 0.014 was measured: the autoencoder is not exact. Another scale or shift gives above 0.05.
    assert float(jnp.sqrt(((again - pictures) ** 2).mean())) < 0.02
    assert float(pictures.std()) > 0.1


def moments(params, images):
    """Return the scaled mean, and the standard deviation, of the tokens' distribution."""
    config = params.config.autoencoder

    @jax.jit
    def tokens(weights, pixels):
        mean, logvar = Autoencoder(config).apply({"params": weights}, pixels, method="encode")
        scaled = (mean - config.shift_factor) * config.scaling_factor
        return pack(scaled), pack(config.scaling_factor * jnp.exp(logvar / 2))

    return tuple(map(np.asarray, tokens(params.autoencoder, 2 * images - 1)))


@pytest.mark.slow
def test_mean_and_samples_have_the_distribution_of_the_autoencoder(small, images):
    scaled, deviation = moments(small, images)
    np.testing.assert_allclose(jitjax.encode(small, images), scaled, rtol=1e-4, atol=1e-5)

    # Draws of one picture: mean and standard deviation within 5 standard errors.
    draws = 512
    many = np.broadcast_to(images[:1], (draws, *images.shape[1:]))
    samples = np.asarray(jitjax.encode(small, many, key=jax.random.key(0)))
    standard = (samples - scaled[0]) / deviation[0]
    assert np.abs(standard.mean(0)).max() < 5 / np.sqrt(draws)
    assert np.abs(standard.std(0) - 1).max() < 5 / np.sqrt(2 * draws)


def test_a_key_gives_the_same_sample_in_any_batch(small, images):
    key = jax.random.key(3)
    both = jitjax.encode(small, images, key=key)
    np.testing.assert_array_equal(both, jitjax.encode(small, jnp.asarray(images), key=key))
    keys = batch_keys(key, 2)
    np.testing.assert_array_equal(both, jitjax.encode(small, images, key=keys))
    alone = jitjax.encode(small, images[1:], key=keys[1:])
    np.testing.assert_allclose(alone[0], both[1], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(both - jitjax.encode(small, images)).max()) > 1e-3


@pytest.mark.slow
def test_encode_under_jit_vmap_and_grad(small, images):
    images, key = jnp.asarray(images), jax.random.key(1)
    expected = jitjax.encode(small, images, key=key)

    def loss(images, params, key):
        tokens = jitjax.encode(params, images, key=key)
        return (tokens**2).mean(), tokens

    gradient, jitted = jax.jit(jax.grad(loss, has_aux=True))(images, small, key)
    np.testing.assert_allclose(jitted, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max((1, 2, 3)) > 0).all()
    keys = batch_keys(key, 2)
    mapped = jax.vmap(lambda x, k: jitjax.encode(small, x[None], key=k[None])[0])(images, keys)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_parameters_give_float32_tokens(small, images):
    weights = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), small.autoencoder)
    half = dataclasses.replace(small, autoencoder=jax.tree.map(jnp.asarray, weights))
    got, expected = (np.asarray(jitjax.encode(params, images)) for params in (half, small))
    assert got.dtype == np.float32
    # bfloat16 has 8 bits.
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.uint8), TypeError, r"dtype uint8; .*float32\) / 255"),
        (np.zeros((1, 32, 32, 3), np.int32), TypeError, "images has dtype int32"),
        ("cat.png", TypeError, "images is str; expected an array"),
        (np.zeros((32, 32, 3)), ValueError, r"shape \[32, 32, 3\].*images\[None\] is a batch"),
        (np.zeros((1, 32, 32, 4)), ValueError, r"shape \[1, 32, 32, 4\]; expected .*3\]"),
        (np.zeros((0, 32, 32, 3)), ValueError, r"shape \[0, 32, 32, 3\]"),
        (np.zeros((1, 0, 32, 3)), ValueError, "0 rows .* nearest size is 16 rows and 32 columns"),
        (np.zeros((1, 41, 100, 3)), ValueError, "nearest size is 48 rows and 96 columns"),
        (np.full((1, 32, 32, 3), np.nan), ValueError, "3072 values that are not finite"),
        (np.full((1, 32, 32, 3), 1.5), ValueError, r"values from 1.5 to 1.5; expected \[0, 1\]"),
        (np.full((1, 32, 32, 3), -0.5), ValueError, "values from -0.5"),
    ],
)
def test_encode_rejects_other_pictures(small, images, error, message):
    with pytest.raises(error, match=message):
        jitjax.encode(small, images)


@pytest.mark.usefixtures("unchecked")
def test_encode_rejects_other_keys_and_parameters(small, images):
    with pytest.raises(ValueError, match=r"key has shape \[3\]; expected \[\] or \[2\]"):
        jitjax.encode(small, images, key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="autoencoder"):
        jitjax.encode(dataclasses.replace(small, autoencoder={}), images)
    with pytest.raises(TypeError, match="params"):
        jitjax.encode("tiny", images)
