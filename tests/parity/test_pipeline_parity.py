"""The bundled checkpoint under diffusers' own pipeline: same ids, embeddings, latents, picture."""

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


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import FluxPipeline

    torch.set_num_threads(1)
    pipe = FluxPipeline.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def relative(got, expected) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def test_token_ids_are_the_pipelines(pipeline, params):
    t5, clip = tokenize(params.tokenizer, PROMPTS, params.config)
    for ours, tokenizer, length in (
        (t5, pipeline.tokenizer_2, params.config.text_length),
        (clip, pipeline.tokenizer, pipeline.tokenizer_max_length),
    ):
        theirs = tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True)
        np.testing.assert_array_equal(ours, theirs["input_ids"])


def test_conditioning_is_the_pipelines(params, embeddings):
    with jax.default_matmul_precision("highest"):
        ours = jitjax.encode_prompt(params, PROMPTS)
    assert relative(ours.text, embeddings[0]) < 1e-4
    assert relative(ours.pooled, embeddings[1]) < 1e-4


def test_dense_latents_and_picture_are_the_pipelines(pipeline, params, embeddings):
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
        latents = pipeline(
            **common, latents=torch.from_numpy(tokens), output_type="latent", return_dict=False
        )[0].numpy()
        pictures = pipeline(
            **common, latents=torch.from_numpy(tokens), output_type="np", return_dict=False
        )[0]
    conditioning = jitjax.Conditioning(*map(jnp.asarray, embeddings))
    with jax.default_matmul_precision("highest"):
        ours = jitjax.denoise(
            params,
            conditioning,
            jnp.asarray(tokens),
            plan=Plan(STEPS, schedule="shifted"),
            grid=(ROWS, COLUMNS),
        )
        images = jitjax.decode(params, ours, grid=(ROWS, COLUMNS))
    error, picture_error = relative(ours, latents), float(np.abs(images - pictures).max())
    print(f"latents {error:.1e} relative, picture {picture_error:.1e} absolute")
    assert error < 1e-3
    assert picture_error < 1e-3


def test_encoding_a_picture_is_the_autoencoders(pipeline, params):
    image = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    with torch.no_grad():
        mean = pipeline.vae.encode(torch.from_numpy(image)).latent_dist.mean
        theirs = (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    config = params.config.autoencoder
    with jax.default_matmul_precision("highest"):
        mean, _ = Autoencoder(config).apply(
            {"params": params.autoencoder},
            jnp.asarray(image.transpose(0, 2, 3, 1)),
            method="encode",
        )
    assert relative(to_latents(mean, config).transpose(0, 3, 1, 2), theirs.numpy()) < 1e-4
