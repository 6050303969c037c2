"""The bundled checkpoint against diffusers' pipeline: token ids, embeddings, latents, images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from jitjax.latents import pack
from jitjax.loading import BUNDLED
from jitjax.models.autoencoder import Autoencoder, to_latents
from jitjax.sampler.plan import Plan
from jitjax.text import tokenize

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity

PROMPTS = ["a large red circle", "a small blue striped star on a plain grey background"]
ROWS, COLUMNS = 8, 12
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def llvm_optimises():
    """Programs are optimised, as for users; the other tests compile in less time."""
    jax.clear_caches()
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import FluxPipeline

    torch.set_num_threads(1)
    pipeline = FluxPipeline.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def params():
    return jitjax.load("tiny")


@pytest.fixture(scope="module")
def embeddings(pipeline, params):
    length = params.config.text_length
    with torch.no_grad():
        text, pooled, _ = pipeline.encode_prompt(
            prompt=PROMPTS, prompt_2=PROMPTS, max_sequence_length=length
        )
    return text.numpy(), pooled.numpy()


def relative_error(got, expected) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def test_token_ids_equal_the_pipelines(pipeline, params):
    t5_ids, clip_ids = tokenize(params.tokenizer, PROMPTS, params.config)
    for got, tokenizer, length in (
        (t5_ids, pipeline.tokenizer_2, params.config.text_length),
        (clip_ids, pipeline.tokenizer, pipeline.tokenizer_max_length),
    ):
        expected = tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True)
        np.testing.assert_array_equal(got, expected["input_ids"])


def test_conditioning_equals_the_pipelines(params, embeddings):
    with jax.default_matmul_precision("highest"):
        conditioning = jitjax.encode_prompt(params, PROMPTS)
    assert relative_error(conditioning.text, embeddings[0]) < 1e-4
    assert relative_error(conditioning.pooled, embeddings[1]) < 1e-4


def test_dense_latents_and_images_equal_the_pipelines(pipeline, params, embeddings):
    noise = np.random.default_rng(0).normal(size=(2, 16, 2 * ROWS, 2 * COLUMNS)).astype(np.float32)
    tokens = np.asarray(pack(jnp.asarray(noise.transpose(0, 2, 3, 1))))
    common = {
        "prompt_embeds": torch.from_numpy(embeddings[0]),
        "pooled_prompt_embeds": torch.from_numpy(embeddings[1]),
        "height": 16 * ROWS,
        "width": 16 * COLUMNS,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
    }
    with torch.no_grad():
        expected_tokens = pipeline(
            **common, latents=torch.from_numpy(tokens), output_type="latent", return_dict=False
        )[0].numpy()
        expected_images = pipeline(
            **common, latents=torch.from_numpy(tokens), output_type="np", return_dict=False
        )[0]
    conditioning = jitjax.Conditioning(*map(jnp.asarray, embeddings))
    with jax.default_matmul_precision("highest"):
        got = jitjax.denoise(
            params,
            conditioning,
            jnp.asarray(tokens),
            plan=Plan(STEPS, schedule="shifted"),
            grid=(ROWS, COLUMNS),
        )
        images = jitjax.decode(params, got, grid=(ROWS, COLUMNS))
    token_error = relative_error(got, expected_tokens)
    image_error = float(np.abs(images - expected_images).max())
    print(f"latents {token_error:.1e} relative, images {image_error:.1e} absolute")
    assert token_error < 1e-3
    assert image_error < 1e-3


def test_encoded_images_equal_the_pipelines(pipeline, params):
    image = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    with torch.no_grad():
        mean = pipeline.vae.encode(torch.from_numpy(image)).latent_dist.mean
        expected = (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    config = params.config.autoencoder
    with jax.default_matmul_precision("highest"):
        mean, _ = Autoencoder(config).apply(
            {"params": params.autoencoder},
            jnp.asarray(image.transpose(0, 2, 3, 1)),
            method="encode",
        )
    latents = to_latents(mean, config).transpose(0, 3, 1, 2)
    assert relative_error(latents, expected.numpy()) < 1e-4
