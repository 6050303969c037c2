"""`encode`, image to image and inpainting against diffusers' pipelines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from common import TOLERANCE, relative_error  # noqa: E402
from pipelines import COLUMNS, MODELS, ROWS, Pair, pair, to_numpy  # noqa: E402

import jitjax  # noqa: E402
from jitjax.latents import pack, unpack  # noqa: E402
from jitjax.masks import mask_tokens  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=MODELS)
def both(request) -> Pair:
    return pair(diffusers.FluxImg2ImgPipeline, request.param)


@pytest.fixture(scope="module", params=MODELS)
def inpainting(request) -> Pair:
    return pair(diffusers.FluxInpaintPipeline, request.param)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    shape = (2, 16 * ROWS, 16 * COLUMNS, 3)
    return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


def test_encode_equals_the_pipelines_mean(both, pictures):
    expected = pack(jnp.asarray(to_numpy(both.encoded(pictures))))
    with jax.default_matmul_precision("highest"):
        error = relative_error(jitjax.encode(both.params, pictures), expected)
    print(f"encode: {error:.1e}")
    assert error < TOLERANCE


def test_a_sample_with_the_same_noise_equals_the_pipelines(both, pictures):
    """The pipeline's own encoder samples; with the noise of our key it is ours."""
    from jitjax.denoise import batch_keys
    from jitjax.latents import draw_noise

    key, vae = jax.random.key(2), both.pipeline.vae
    with jax.default_matmul_precision("highest"):
        got = jitjax.encode(both.params, pictures, key=key)
    noise = unpack(draw_noise(batch_keys(key, 2), (ROWS, COLUMNS), 64), (ROWS, COLUMNS))
    pixels = torch.from_numpy(pictures.transpose(0, 3, 1, 2))
    with torch.no_grad():
        posterior = vae.encode(both.pipeline.image_processor.preprocess(pixels)).latent_dist
        noise = torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2))
        sample = posterior.mean + posterior.std * noise
    sample = (sample - vae.config.shift_factor) * vae.config.scaling_factor
    expected = pack(jnp.asarray(to_numpy(sample)))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("strength", [0.2, 0.6, 0.95, 1.0])
def test_dense_latents_equal_the_pipelines(both, pictures, strength):
    image = both.encoded(pictures)
    expected = both.latents(image, strength)
    got = both.denoised(image, strength, clean=jitjax.encode(both.params, pictures))
    error = relative_error(got, expected)
    print(f"strength {strength}: latents {error:.1e} relative")
    assert error < 1e-3


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainted_latents_equal_the_pipelines(inpainting, pictures, strength):
    """Of masks of whole latents, which the pipeline reads at one pixel each, and without grey."""
    mask = np.zeros((2, 16 * ROWS, 16 * COLUMNS), np.float32)
    mask[0, 24:72, 40:120] = 1  # borders through the middle of tokens
    mask[1, :, 64:] = 1
    image = inpainting.encoded(pictures)
    expected = inpainting.latents(
        image,
        strength,
        mask_image=torch.from_numpy(mask[:, None]),
        masked_image_latents=image,  # of which the pipeline makes nothing
    )
    params = inpainting.params
    with jax.default_matmul_precision("highest"):
        clean = jitjax.encode(params, pictures)
    tokens = mask_tokens(mask, params.config)
    got = np.asarray(inpainting.denoised(image, strength, clean=clean, mask=tokens))
    error = relative_error(got, expected)
    free = inpainting.denoised(image, strength, clean=clean)
    effect = relative_error(np.where(tokens, free, clean), expected)
    print(f"strength {strength}: latents {error:.1e} relative; without what is known {effect:.1e}")
    assert error < 1e-3
    assert effect > 1e-2
