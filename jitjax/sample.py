"""`sample`, which encodes the prompt, denoises and decodes; and `decode`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from tqdm import tqdm

from jitjax.checkpoint import FluxParams
from jitjax.config import AutoencoderConfig
from jitjax.denoise import batch_keys, denoise
from jitjax.latents import draw_noise, token_grid, unpack
from jitjax.models.autoencoder import Autoencoder, from_latents
from jitjax.sampler.grid import Grid
from jitjax.sampler.keys import split
from jitjax.sampler.meshes import to_auto_axes
from jitjax.sampler.plan import Plan, get_plan
from jitjax.text import Conditioning, encode_prompt


def sample(
    params: FluxParams,
    prompt: str | Sequence[str] | Conditioning,
    *,
    key: Array,
    height: int | None = None,
    width: int | None = None,
    plan: str | Plan = "4x",
    guidance: float = 3.5,
    progress: bool = False,
) -> Float[Array, "b height width 3"]:
    """Generate images from prompts.

    Args:
        params: parameters, from `load`.
        prompt: a string, a sequence of strings for one image each, or a `Conditioning`.
        key: one `jax.random` key for the batch, from which `batch_keys` derives one per image, or
            one key per image. The same key gives the same image in any batch.
        height, width: size in pixels, multiples of 16; by default `params.config.image_size`.
        plan: a name in `PLANS` ("4x", "7x" or "dense") or a `Plan`.
        guidance: guidance scale; larger values follow the prompt more closely. Models without
            guidance embeddings ignore it.
        progress: show a progress bar of the steps on standard error.

    Returns:
        Images, float32 [b, height, width, 3] in [0, 1].

    Raises:
        ValueError: the plan is unknown, the height or width is not supported, there are no prompts,
            or the key or the conditioning does not fit (all raised before denoising starts); or
            `params` has no parameters for a model that is needed.
        TypeError: a prompt is not a string.
        FileNotFoundError: a tokenizer is missing.
    """
    params, prompt, key = to_auto_axes((params, prompt, key))
    config = params.config
    plan = get_plan(plan)
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
    grid = token_grid(height, width, config)
    conditioning = prompt if isinstance(prompt, Conditioning) else encode_prompt(params, prompt)
    noise_keys, denoise_keys = split(batch_keys(key, conditioning.text.shape[0]))
    noise = draw_noise(noise_keys, grid, config.transformer.in_channels)
    with tqdm(total=plan.steps, unit="step", disable=not progress) as bar:
        tokens = denoise(
            params,
            conditioning,
            noise,
            plan=plan,
            grid=grid,
            guidance=guidance,
            key=denoise_keys,
            progress=bar.update if progress else None,
        )
    return decode(params, tokens, grid=grid)


def decode(
    params: FluxParams, tokens: Float[Array, "b n d"], *, grid: Grid
) -> Float[Array, "b height width 3"]:
    """Decode clean tokens to images with the autoencoder.

    Args:
        params: parameters; only the autoencoder's are used.
        tokens: [b, n, d] clean tokens, from `denoise`.
        grid: rows and columns of tokens; n is their product.

    Returns:
        Images, float32 [b, height, width, 3] in [0, 1]; 16 pixels per token and side.

    Raises:
        ValueError: the shape of `tokens` does not fit, or `params` has no autoencoder.
    """
    params, tokens = to_auto_axes((params, tokens))
    expected = (grid[0] * grid[1], params.config.transformer.in_channels)
    if tokens.ndim != 3 or tokens.shape[1:] != expected:
        raise ValueError(
            f"tokens has shape {list(tokens.shape)}; expected [batch, {expected[0]}, "
            f"{expected[1]}] for a grid of {grid[0]} x {grid[1]} tokens"
        )
    return _decode(params.config.autoencoder, grid, params.part("autoencoder"), tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(config: AutoencoderConfig, grid: Grid, params: dict, tokens: Array) -> Array:
    model = Autoencoder(config, dtype=jax.tree.leaves(params)[0].dtype)
    latents = from_latents(unpack(tokens, grid), config)
    images = model.apply({"params": params}, latents, method="decode")
    assert isinstance(images, jax.Array)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
