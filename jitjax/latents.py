"""Packing of latents into tokens, and noise.

    image [H, W, 3] -- autoencoder --> latents [H/8, W/8, 16] -- pack 2 x 2 --> tokens [N, 64]

The channels of a token are ordered (latent channel, row in patch, column in patch), as in FLUX.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Key

from jitjax.config import PATCH, FluxConfig
from jitjax.sampler.grid import Grid, as_integer
from jitjax.sampler.keys import normal, threefry_keys

LARGEST_SIDE = 8192
"""Largest height or width in pixels; anything larger is taken for a typing error."""


def token_grid(height: int, width: int, config: FluxConfig) -> Grid:
    """Return the token grid of an image.

    Args:
        height, width: size of the image in pixels.
        config: gives the pixels per token, 16 for FLUX.

    Returns:
        Rows and columns of tokens.

    Raises:
        ValueError: the height or width is not an integer, not a positive multiple of the pixels
            per token, or above `LARGEST_SIDE`.
    """
    multiple = config.pixels_per_token
    for name, side in (("height", height), ("width", width)):
        pixels = as_integer(side)
        if pixels is None or pixels < 1 or pixels % multiple or pixels > LARGEST_SIDE:
            raise ValueError(
                f"{name} is {side!r} pixels; expected a multiple of {multiple} "
                f"from {multiple} to {LARGEST_SIDE}"
            )
    return int(height) // multiple, int(width) // multiple


def draw_noise(keys: Key[Array, " b"], grid: Grid, channels: int) -> Float[Array, "b n d"]:
    """Draw standard normal tokens.

    Args:
        keys: [b], one key per sample. A sample depends on its own key alone, not on the batch.
        grid: rows and columns of tokens; n is their product.
        channels: d, the channels of a token.

    Returns:
        float32 [b, n, d].
    """
    shape = (grid[0] * grid[1], channels)
    return jax.vmap(lambda key: normal(key, shape))(threefry_keys(keys))


def pack(latents: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Pack latents, with even h and w, into row-major tokens; n = h w / 4 and d = 4 c."""
    b, h, w, c = latents.shape
    patches = latents.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, c * PATCH**2)


def unpack(tokens: Float[Array, "b n d"], grid: Grid) -> Float[Array, "b h w c"]:
    """Undo `pack`: turn the tokens of a grid into latents."""
    b, _, d = tokens.shape
    rows, columns = grid
    patches = tokens.reshape(b, rows, columns, d // PATCH**2, PATCH, PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(b, rows * PATCH, columns * PATCH, -1)
