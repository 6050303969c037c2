"""Models that take pictures against diffusers' pipelines: Kontext, control (Canny, Depth), Fill.

The transformers are small and random; Kontext's also is `tiny`'s, whose shapes are those of a
Kontext. Text encoders and autoencoder are `tiny`'s.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from common import numpy_state, randomised, relative_error  # noqa: E402
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: E402

import jitjax  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.fill import fill_tokens  # noqa: E402
from jitjax.latents import pack  # noqa: E402
from jitjax.loading import BUNDLED  # noqa: E402
from jitjax.sampler.plan import Plan  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS = ["a large red circle", "a small blue striped star on a plain grey background"]
ROWS, COLUMNS = GRID = 6, 10
HEIGHT, WIDTH = 16 * ROWS, 16 * COLUMNS
STEPS = 4


@pytest.fixture(scope="module")
def base():
    pipeline = diffusers.FluxPipeline.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tiny():
    return jitjax.load("tiny")


@pytest.fixture(scope="module")
def text(base, tiny):
    with torch.no_grad():
        return base.encode_prompt(
            prompt=PROMPTS, prompt_2=PROMPTS, max_sequence_length=tiny.config.text_length
        )[:2]


@pytest.fixture(autouse=True)
def mean_of_the_posterior(monkeypatch):
    """Let the pipelines that draw from the encoder's distribution take its mean, as `sample`."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator: self.mean)


def pictures(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (2, *size, 3)).astype(np.float32)


def random_model(base, tiny, channels: int):
    """A small random transformer of so many input channels, in torch and with `tiny`'s rest."""
    config = dataclasses.replace(
        tiny.config.transformer,
        in_channels=channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=2,
    )
    model = randomised(diffusers.FluxTransformer2DModel(**dataclasses.asdict(config)), seed=3)
    params = dataclasses.replace(
        tiny,
        transformer=jax.tree.map(
            jnp.asarray, from_state("transformer", numpy_state(model), config)
        ),
        config=dataclasses.replace(tiny.config, transformer=config),
    )
    return model, params


def run_pipeline(kind, base, transformer, text, noise, **options) -> np.ndarray:
    parts = {name: part for name, part in base.components.items() if part is not None}
    pipeline = kind(**parts | {"transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    latents = {} if noise is None else {"latents": torch.from_numpy(np.array(noise))}
    with torch.no_grad():
        return pipeline(
            prompt_embeds=text[0],
            pooled_prompt_embeds=text[1],
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            output_type="latent",
            return_dict=False,
            **latents,
            **options,
        )[0].numpy()


def run_denoise(params, text, noise, plan=None, **options: Any) -> jax.Array:
    conditioning = jitjax.Conditioning(*(jnp.asarray(x.numpy()) for x in text))
    plan = Plan(STEPS, schedule="shifted") if plan is None else plan
    return jitjax.denoise(params, conditioning, noise, plan=plan, grid=GRID, **options)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (2, ROWS * COLUMNS, 64))


@pytest.mark.parametrize("weights", ["tiny", "random"])
def test_kontext(base, tiny, text, noise, weights):
    if weights == "tiny":
        transformer, params = base.transformer, tiny
    else:
        transformer, params = random_model(base, tiny, 64)
    given = pictures(1, 96, 64)  # of another size than the result
    expected = run_pipeline(
        diffusers.FluxKontextPipeline,
        base,
        transformer,
        text,
        noise,
        image=torch.from_numpy(given.transpose(0, 3, 1, 2)),
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
    )
    got = run_denoise(
        params, text, noise, reference=jitjax.encode(params, given), reference_grid=(6, 4)
    )
    error = relative_error(got, expected)
    print(f"Kontext, {weights}: latents {error:.1e} relative")
    assert error < 1e-3
    assert relative_error(run_denoise(params, text, noise), expected) > 0.01


def test_control(base, tiny, text, noise):
    transformer, params = random_model(base, tiny, 128)
    given = pictures(2, HEIGHT, WIDTH)
    expected = run_pipeline(
        diffusers.FluxControlPipeline, base, transformer, text, noise, control_image=given
    )
    control = jitjax.encode(params, given)
    error = relative_error(run_denoise(params, text, noise, control=control), expected)
    print(f"control: latents {error:.1e} relative")
    assert error < 1e-3
    other = run_denoise(params, text, noise, control=control[::-1])
    assert relative_error(other, expected) > 0.01


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_fill(base, tiny, text, strength):
    transformer, params = random_model(base, tiny, 384)
    given = pictures(3, HEIGHT, WIDTH)
    mask = np.zeros((2, HEIGHT, WIDTH), np.float32)
    mask[0, 13:60, 21:90] = 1
    mask[1, 40:, :35] = 0.7  # both round it to 1
    noise = torch.randn(2, 16, 2 * ROWS, 2 * COLUMNS, generator=torch.Generator().manual_seed(0))
    expected = run_pipeline(
        diffusers.FluxFillPipeline,
        base,
        transformer,
        text,
        None,
        image=given,
        mask_image=mask,
        strength=strength,
        generator=torch.Generator().manual_seed(0),
    )
    plan = jitjax.plan_at_strength(
        Plan(STEPS, schedule="shifted"), strength, grid=GRID, config=params.config
    )
    got = run_denoise(
        params,
        text,
        pack(jnp.asarray(noise.numpy().transpose(0, 2, 3, 1))),
        plan,
        clean=jitjax.encode(params, given),
        control=fill_tokens(params, given, mask),
    )
    error = relative_error(got, expected)
    print(f"Fill, strength {strength}: latents {error:.1e} relative")
    assert error < 1e-3
