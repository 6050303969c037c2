"""Pipelines of diffusers that start from pictures, and the same parameters here."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import numpy_state, randomised, torch
from golden import build

import jitjax
from jitjax.convert.components import from_state
from jitjax.latents import pack
from jitjax.loading import BUNDLED

ROWS, COLUMNS = 8, 12
STEPS = 7
MODELS = ("small random", "tiny")
PROMPTS = ["a large red circle", "a small blue striped star on a plain grey background"]


class Pair(NamedTuple):
    """A pipeline, the same parameters here, and encoded prompts of both."""

    pipeline: Any
    params: jitjax.FluxParams
    text: Any
    pooled: Any

    @property
    def conditioning(self) -> jitjax.Conditioning:
        return jitjax.Conditioning(jnp.asarray(self.text.numpy()), jnp.asarray(self.pooled.numpy()))

    def encoded(self, pictures: np.ndarray):
        """The pipeline's latents of pictures, by the mean of the posterior."""
        pixels = torch.from_numpy(pictures.transpose(0, 3, 1, 2))
        with torch.no_grad():
            image = self.pipeline.image_processor.preprocess(pixels)
            mean = self.pipeline.vae.encode(image).latent_dist.mean
        config = self.pipeline.vae.config
        return (mean - config.shift_factor) * config.scaling_factor

    def latents(self, image, strength: float, **more) -> np.ndarray:
        """Run the pipeline from the latents of pictures."""
        with torch.no_grad():
            return self.pipeline(
                prompt_embeds=self.text,
                pooled_prompt_embeds=self.pooled,
                image=image,
                strength=strength,
                height=16 * ROWS,
                width=16 * COLUMNS,
                num_inference_steps=STEPS,
                guidance_scale=3.5,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                return_dict=False,
                **more,
            )[0].numpy()

    def denoised(self, image, strength: float, **more) -> jax.Array:
        """Run `denoise` with the same noise."""
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
        grid = (ROWS, COLUMNS)
        plan = jitjax.plan_at_strength(
            jitjax.Plan(STEPS, schedule="shifted"), strength, grid=grid, config=self.params.config
        )
        with jax.default_matmul_precision("highest"):
            return jitjax.denoise(
                self.params,
                self.conditioning,
                pack(jnp.asarray(to_numpy(noise))),
                plan=plan,
                grid=grid,
                **more,
            )


def to_numpy(latents) -> np.ndarray:
    """Latents of torch, [b, c, h, w], with the channels last."""
    return latents.numpy().transpose(0, 2, 3, 1)


def pair(pipeline_class: Any, model: str) -> Pair:
    """Return a pipeline and its parameters: one of `MODELS`."""
    if model == "tiny":
        pipeline = pipeline_class.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.float32)
        params = jitjax.load("tiny")
        with torch.no_grad():
            text, pooled, _ = pipeline.encode_prompt(
                prompt=PROMPTS, prompt_2=PROMPTS, max_sequence_length=params.config.text_length
            )
    else:
        pipeline, params = _random(pipeline_class)
        config = params.config
        generator = torch.Generator().manual_seed(1)
        width = config.transformer.joint_attention_dim
        text = torch.randn((2, config.text_length, width), generator=generator)
        pooled = torch.randn((2, config.transformer.pooled_projection_dim), generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    return Pair(pipeline, params, text, pooled)


def _random(pipeline_class: Any) -> tuple[Any, jitjax.FluxParams]:
    import diffusers

    config = build.SMALL
    transformer = diffusers.FluxTransformer2DModel(**dataclasses.asdict(config.transformer))
    levels = len(config.autoencoder.block_out_channels)
    vae = diffusers.AutoencoderKL(
        **dataclasses.asdict(config.autoencoder),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    models = {
        "transformer": randomised(transformer, seed=2),
        "autoencoder": randomised(vae, seed=3),
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=config.dynamic_shift,
        base_shift=config.base_shift,
        max_shift=config.max_shift,
        base_image_seq_len=config.base_seq,
        max_image_seq_len=config.max_seq,
        shift=config.shift,
    )
    no_text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = pipeline_class(scheduler=scheduler, vae=vae, transformer=transformer, **no_text)
    states = {
        name: from_state(name, numpy_state(model), getattr(config, name), jnp.float32)
        for name, model in models.items()
    }
    params = jitjax.FluxParams(t5={}, clip={}, config=config, tokenizer="", **states)
    return pipeline, jax.tree.map(jnp.asarray, params)
