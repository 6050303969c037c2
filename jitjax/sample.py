"""`sample`, which encodes the prompt, denoises and decodes; and `decode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from jitjax.checkpoint import TEXT_ENCODERS, FluxParams
from jitjax.config import AutoencoderConfig
from jitjax.denoise import batch_keys, check_guidance, denoise
from jitjax.latents import draw_noise, token_grid, unpack
from jitjax.models.attention import check_implementation
from jitjax.models.quantised import float_dtype
from jitjax.sampler.grid import Grid, as_grid
from jitjax.sampler.keys import split
from jitjax.sampler.meshes import with_auto_axes
from jitjax.sampler.plan import DEFAULT_PLAN, Plan, get_plan
from jitjax.sampler.progress import StepReports
from jitjax.text import Conditioning, as_prompts, check_params, encode_prompt


@with_auto_axes("prompt", "key")
def sample(
    params: FluxParams,
    prompt: str | Sequence[str] | Conditioning,
    *,
    key: Array,
    height: int | None = None,
    width: int | None = None,
    plan: str | Plan = DEFAULT_PLAN,
    guidance: float | Float[Array, ""] | Float[Array, " b"] = 3.5,
    attention: str = "auto",
    progress: bool = False,
) -> Float[Array, "b height width 3"]:
    """Generate images from prompts.

    Args:
        params: parameters, from `load`.
        prompt: a string, a sequence of strings for one image each, or a `Conditioning`.
        key: one `jax.random` key for the batch, from which `batch_keys` derives one per image, or
            one key per image. The same key gives the same image in any batch, up to rounding:
            programs of other batch sizes round differently, by 1e-5 of the range in float32.
        height, width: size in pixels, multiples of 16; by default `params.config.image_size`.
        plan: a name in `PLANS`, such as "multistep-12", "4x" or "dense", or a `Plan`.
        guidance: guidance scale, one number or one per image; larger values follow the prompt
            more closely. Models without guidance embeddings ignore it.
        attention: how the transformer computes attention: "auto" (the fastest on the platform),
            "xla", "cudnn" or "pallas"; see `jitjax.models.attention`.
        progress: show a progress bar of the steps on standard error.

    Returns:
        Images, float32 [b, height, width, 3] in [0, 1]. Values that are not finite are NaN.

    Raises:
        ValueError: the plan or `attention` is unknown, the height or width is not supported, there
            are no prompts, the guidance or the conditioning is not finite, the key or the
            conditioning does not fit, or `params` has no parameters for a model that is needed.
            Raised before any model runs, except for a conditioning that the text encoders made.
        TypeError: an argument has another type, for example a prompt that is not a string.
        FileNotFoundError: a tokenizer is missing.
    """
    check_params(params)
    config = params.config
    plan = get_plan(plan)
    check_implementation(attention)
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
    grid = token_grid(height, width, config)
    if isinstance(prompt, Conditioning):
        prompt.check(config)
        prompts, batch = [], prompt.text.shape[0]
    else:
        prompts = as_prompts(prompt)
        batch = len(prompts)
    for part in ("transformer", "autoencoder", *(TEXT_ENCODERS if prompts else ())):
        params.part(part)
    if batch == 0:
        raise ValueError("the conditioning has batch size 0; expected 1 or more")
    check_guidance(guidance, batch)
    noise, denoise_keys = _start(grid, config.transformer.in_channels, batch_keys(key, batch))
    conditioning = prompt if isinstance(prompt, Conditioning) else encode_prompt(params, prompts)
    with tqdm(total=plan.steps, unit="step", disable=not progress or sys.stderr is None) as bar:
        reports = StepReports(bar.update)
        tokens = denoise(
            params,
            conditioning,
            noise,
            plan=plan,
            grid=grid,
            guidance=guidance,
            key=denoise_keys,
            attention=attention,
            progress=reports if progress else None,
        )
        # Before the last steps are finished, so that they run while Python traces the decoder.
        images = decode(params, tokens, grid=grid)
        reports.finish()
    return images


@partial(jax.jit, static_argnums=(0, 1))
def _start(
    grid: Grid, channels: int, keys: Key[Array, " b"]
) -> tuple[Float[Array, "b n d"], Key[Array, " b"]]:
    """Draw the noise; return it, and the keys of all other draws."""
    noise_keys, denoise_keys = split(keys)
    return draw_noise(noise_keys, grid, channels), denoise_keys


@with_auto_axes("tokens")
def decode(
    params: FluxParams, tokens: Float[Array, "b n d"], *, grid: Grid
) -> Float[Array, "b height width 3"]:
    """Decode clean tokens to images with the autoencoder.

    Args:
        params: parameters; only the autoencoder's are used.
        tokens: [b, n, d] clean tokens, from `denoise`.
        grid: rows and columns of tokens; n is their product.

    Returns:
        Images, float32 [b, height, width, 3] in [0, 1]; 16 pixels per token and side. Values that
        are not finite are NaN.

    Raises:
        ValueError: `grid` is not two positive integers, the shape of `tokens` does not fit, or
            `params` has no autoencoder.
        TypeError: `params` are no parameters, or `tokens` is no array.
    """
    check_params(params)
    if not isinstance(tokens, (jax.Array, np.ndarray)):
        raise TypeError(f"tokens is {type(tokens).__name__}; expected an array, from denoise")
    grid = as_grid(grid)
    expected = (grid[0] * grid[1], params.config.transformer.in_channels)
    if tokens.ndim != 3 or tokens.shape[1:] != expected:
        raise ValueError(
            f"tokens has shape {list(tokens.shape)}; expected [batch, {expected[0]}, "
            f"{expected[1]}] for a grid of {grid[0]} x {grid[1]} tokens"
        )
    return _decode(params.config.autoencoder, grid, params.part("autoencoder"), tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(config: AutoencoderConfig, grid: Grid, params: dict, tokens: Array) -> Array:
    from jitjax.models.autoencoder import from_latents
    from jitjax.models.strips import decode_latents

    latents = from_latents(unpack(tokens, grid), config)
    images = decode_latents(config, params, latents, float_dtype(params))
    images = images.astype(jnp.float32)
    # Clipped, an infinity would be a white or black pixel that nobody notices.
    return jnp.where(jnp.isfinite(images), jnp.clip(images / 2 + 0.5, 0, 1), jnp.nan)
