"""`sample` = encode the prompt, denoise, decode."""

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
    """Pictures of what `prompt` says, float32 in [0, 1].

    Args:
        params: what `load` returns.
        prompt: a string, a list of strings (one picture each) or a `Conditioning`.
        key: one `jax.random` key, or one per picture. The same key makes the same picture,
            also in a larger batch (`batch_keys` says which key picture i is made from).
        height, width: pixels, multiples of 16; by default the size the model was trained for.
        plan: "4x", "7x", "dense" (see `PLANS`) or a `Plan`.
        guidance: how closely to follow the prompt; ignored by models without guidance.
        progress: show a bar of the steps on standard error.

    Raises:
        ValueError, TypeError: a plan, size, prompt or key that no picture could be made from;
            said before any long work.
    """
    config = params.config
    plan = get_plan(plan)
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
    grid = token_grid(height, width, config)
    conditioning = prompt if isinstance(prompt, Conditioning) else encode_prompt(params, prompt)
    keys = jax.vmap(jax.random.split)(batch_keys(key, conditioning.text.shape[0]))
    noise = draw_noise(keys[:, 0], grid, config.transformer.in_channels)
    with tqdm(total=plan.steps, unit="step", disable=not progress) as bar:
        tokens = denoise(
            params,
            conditioning,
            noise,
            plan=plan,
            grid=grid,
            guidance=guidance,
            key=keys[:, 1],
            progress=bar.update if progress else None,
        )
    return decode(params, tokens, grid=grid)


def decode(
    params: FluxParams, tokens: Float[Array, "b n d"], *, grid: Grid
) -> Float[Array, "b height width 3"]:
    """Clean tokens to pictures, float32 in [0, 1], by the autoencoder.

    Args:
        params: parameters; only the autoencoder's are used.
        tokens: what `denoise` returns.
        grid: rows and columns of tokens.

    Raises:
        ValueError: `tokens` do not fit the grid or the autoencoder, or `params` has none.
    """
    expected = (grid[0] * grid[1], params.config.transformer.in_channels)
    if tokens.ndim != 3 or tokens.shape[1:] != expected:
        raise ValueError(f"tokens is {list(tokens.shape)}; expected [batch, {expected[0]}, "
                         f"{expected[1]}] for a token grid of {grid[0]} x {grid[1]}")  # fmt: skip
    return _decode(params.config.autoencoder, grid, params.part("autoencoder"), tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(config: AutoencoderConfig, grid: Grid, params: dict, tokens: Array) -> Array:
    model = Autoencoder(config, dtype=jax.tree.leaves(params)[0].dtype)
    latents = from_latents(unpack(tokens, grid), config)
    images = model.apply({"params": params}, latents, method="decode")
    assert isinstance(images, jax.Array)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
