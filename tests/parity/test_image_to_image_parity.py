"""`encode` and image to image against diffusers' `FluxImg2ImgPipeline`, on the bundled model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from common import TOLERANCE, relative_error  # noqa: E402

import jitjax  # noqa: E402
from jitjax.latents import pack, unpack  # noqa: E402
from jitjax.loading import BUNDLED  # noqa: E402
from jitjax.sampler.plan import Plan  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS = ["a large red circle", "a small blue striped star on a plain grey background"]
ROWS, COLUMNS = 8, 12
STEPS = 7


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import FluxImg2ImgPipeline

    pipeline = FluxImg2ImgPipeline.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def params():
    return jitjax.load("tiny")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    shape = (2, 16 * ROWS, 16 * COLUMNS, 3)
    return np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)


def to_numpy(latents) -> np.ndarray:
    """Latents of torch, [b, c, h, w], with the channels last."""
    return latents.numpy().transpose(0, 2, 3, 1)


def encoded(pipeline, pictures):
    """The pipeline's latents of pictures, by the mean of the posterior."""
    image = pipeline.image_processor.preprocess(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        mean = pipeline.vae.encode(image).latent_dist.mean
    return (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor


def test_encode_equals_the_pipelines_mean(pipeline, params, pictures):
    expected = pack(jnp.asarray(to_numpy(encoded(pipeline, pictures))))
    with jax.default_matmul_precision("highest"):
        error = relative_error(jitjax.encode(params, pictures), expected)
    print(f"encode: {error:.1e}")
    assert error < TOLERANCE


def test_a_sample_with_the_same_noise_equals_the_pipelines(pipeline, params, pictures):
    """The pipeline's own encoder samples; with the noise of our key it is ours."""
    from jitjax.denoise import batch_keys
    from jitjax.latents import draw_noise

    key = jax.random.key(2)
    with jax.default_matmul_precision("highest"):
        got = jitjax.encode(params, pictures, key=key)
    noise = unpack(draw_noise(batch_keys(key, 2), (ROWS, COLUMNS), 64), (ROWS, COLUMNS))
    image = pipeline.image_processor.preprocess(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        posterior = pipeline.vae.encode(image).latent_dist
        sample = posterior.mean + posterior.std * torch.from_numpy(
            np.array(noise).transpose(0, 3, 1, 2)
        )
    config = pipeline.vae.config
    expected = pack(jnp.asarray(to_numpy((sample - config.shift_factor) * config.scaling_factor)))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("strength", [0.2, 0.6, 0.95, 1.0])
def test_dense_latents_equal_the_pipelines(pipeline, params, pictures, strength):
    latents, length = encoded(pipeline, pictures), params.config.text_length
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, pooled, _ = pipeline.encode_prompt(
            prompt=PROMPTS, prompt_2=PROMPTS, max_sequence_length=length
        )
        expected = pipeline(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            image=latents,
            strength=strength,
            height=16 * ROWS,
            width=16 * COLUMNS,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )[0].numpy()
    grid = (ROWS, COLUMNS)
    plan = jitjax.plan_at_strength(
        Plan(STEPS, schedule="shifted"), strength, grid=grid, config=params.config
    )
    with jax.default_matmul_precision("highest"):
        got = jitjax.denoise(
            params,
            jitjax.Conditioning(jnp.asarray(text.numpy()), jnp.asarray(pooled.numpy())),
            pack(jnp.asarray(to_numpy(noise))),
            plan=plan,
            grid=grid,
            clean=jitjax.encode(params, pictures),
        )
    error = relative_error(got, expected)
    print(f"strength {strength}: {plan.steps} steps, latents {error:.1e} relative")
    assert error < 1e-3
