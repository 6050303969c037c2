"""`encode`: pictures to clean tokens with the autoencoder; the inverse of `decode`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jitjax.checkpoint import FluxParams
from jitjax.config import PATCH, AutoencoderConfig, FluxConfig
from jitjax.denoise import batch_keys
from jitjax.latents import LARGEST_SIDE, draw_noise, pack, token_grid, unpack
from jitjax.models.partitioning import over_batch
from jitjax.models.quantised import float_dtype
from jitjax.offload import with_parts_on_device
from jitjax.sampler.checks import as_array, check_finite, concrete
from jitjax.sampler.grid import Grid
from jitjax.sampler.meshes import with_auto_axes
from jitjax.text import check_params


@with_parts_on_device("autoencoder")
@with_auto_axes("images")
def encode(
    params: FluxParams,
    images: Float[Array, "b height width 3"] | Float[np.ndarray, "b height width 3"],
    *,
    key: Array | None = None,
) -> Float[Array, "b n d"]:
    """Encode pictures to clean tokens with the autoencoder.

    Args:
        params: parameters; only the autoencoder's are used.
        images: [b, height, width, 3], floating point numbers in [0, 1]; height and width are
            multiples of 16 from 16 to 8192.
        key: None for the mean of the autoencoder's distribution of latents; or a key for a sample
            of it: one `jax.random` key, or one per picture, as in `sample`.

    Returns:
        Clean tokens, float32 [b, n, d], in row-major order; n = height width / 256 and d = 64. They
        are what `denoise` returns and `decode` takes, on the grid (height / 16, width / 16).

    Raises:
        ValueError: the shape of `images` is another, a side is no multiple of 16, a known value is
            not finite or outside [0, 1], the key does not fit, or `params` has no autoencoder.
            Values of traced arrays are not checked.
        TypeError: `params` are no parameters, or `images` is no array of floating point numbers.

    Examples:
        >>> params = jitjax.load("tiny", parts=("autoencoder",))
        >>> images = jax.ShapeDtypeStruct((1, 32, 64, 3), jnp.float32)
        >>> tokens = jax.eval_shape(jitjax.encode, params, images)
        >>> tokens.shape  # a grid of 2 x 4 tokens
        (1, 8, 64)
    """
    check_params(params)
    grid = check_images("images", images, params.config)
    images = as_array("images", images)
    weights = params.part("autoencoder")
    keys = None if key is None else batch_keys(key, images.shape[0])
    return _encode(params.config.autoencoder, grid, weights, images, keys)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(
    config: AutoencoderConfig,
    grid: Grid,
    params: dict,
    images: Array,
    keys: Key[Array, " b"] | None,
) -> Array:
    from jitjax.models.autoencoder import to_latents
    from jitjax.models.strips import encode_images

    dtype = float_dtype(params)
    pixels = (2 * over_batch(images) - 1).astype(dtype)
    moments = encode_images(config, params, pixels, dtype)
    # The transformer's latents are float32 (or float64) for every dtype of the autoencoder.
    mean, logvar = (x.astype(jnp.promote_types(dtype, jnp.float32)) for x in moments)
    if keys is not None:
        noise = draw_noise(keys, grid, PATCH**2 * config.latent_channels)
        mean = mean + jnp.exp(logvar / 2) * unpack(noise, grid).astype(mean.dtype)
    return pack(to_latents(mean, config))


def check_images(name: str, images: Any, config: FluxConfig) -> Grid:
    """Check pictures, and return their token grid.

    Of traced arrays only the shape and the dtype are checked.

    Args:
        name: name of the argument, for the messages.
        images: the pictures; see `encode`.
        config: the model's configuration.

    Raises:
        ValueError, TypeError: as `encode`.
    """
    if not isinstance(images, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} is {type(images).__name__}; expected an array [batch, height, width, 3] of "
            "floating point numbers in [0, 1]"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        hint = ", such as x.astype(np.float32) / 255" if images.dtype == np.uint8 else ""
        raise TypeError(
            f"{name} has dtype {images.dtype}; expected floating point numbers in [0, 1]{hint}"
        )
    channels = config.autoencoder.in_channels
    if images.ndim != 4 or images.shape[3] != channels or not images.shape[0]:
        hint = f"; {name}[None] is a batch of one" if images.ndim == 3 else ""
        raise ValueError(
            f"{name} has shape {list(images.shape)}; expected [batch, height, width, {channels}]"
            f"{hint}"
        )
    height, width = images.shape[1:3]
    nearest = tuple(nearest_side(side, config) for side in (height, width))
    if (height, width) != nearest:
        multiple = config.pixels_per_token
        raise ValueError(
            f"{name} has {height} rows and {width} columns of pixels; expected multiples of "
            f"{multiple} from {multiple} to {LARGEST_SIDE}; the nearest size is {nearest[0]} rows "
            f"and {nearest[1]} columns"
        )
    check_finite(name, images)
    values = concrete(images)
    if values is not None and (values.min() < 0 or values.max() > 1):
        raise ValueError(
            f"{name} has values from {values.min():.6g} to {values.max():.6g}; expected [0, 1]"
        )
    return token_grid(height, width, config)


def nearest_side(side: int, config: FluxConfig) -> int:
    """Return the height or width nearest to `side` that a picture may have."""
    multiple = config.pixels_per_token
    return min(max((side + multiple // 2) // multiple, 1) * multiple, LARGEST_SIDE)
