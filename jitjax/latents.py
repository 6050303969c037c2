"""Latents as tokens: noise, packing.

    image [H, W, 3] -- autoencoder --> latents [H/8, W/8, 16] -- pack 2 x 2 --> tokens [N, 64]

A token is channel-major: (channel, row in patch, column in patch), as in FLUX.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jitjax.config import PATCH, FluxConfig
from jitjax.sampler.grid import Grid

LARGEST_SIDE = 8192
"""Pixels; a larger picture is taken for a slip of the hand."""


def token_grid(height: int, width: int, config: FluxConfig) -> Grid:
    """Rows and columns of tokens of an image of `height` x `width` pixels.

    Raises:
        ValueError: a side is not a whole number, or not a positive multiple of the token size
            (16 pixels), or above `LARGEST_SIDE`.
    """
    unit = config.pixels_per_token
    for name, side in (("height", height), ("width", width)):
        whole = isinstance(side, int) and not isinstance(side, bool)
        if not whole or side < 1 or side % unit or side > LARGEST_SIDE:
            raise ValueError(
                f"{name} is {side!r} pixels; expected a multiple of {unit} "
                f"from {unit} to {LARGEST_SIDE}"
            )
    return height // unit, width // unit


def draw_noise(keys: Key[Array, " b"], grid: Grid, channels: int) -> Float[Array, "b n d"]:
    """Standard normal tokens, float32, one sample per key, so that it does not depend on b."""
    shape = (grid[0] * grid[1], channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def pack(latents: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Latents to tokens, row-major; d = 4 c. `h` and `w` are even."""
    b, h, w, c = latents.shape
    patches = latents.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, c * PATCH**2)


def unpack(tokens: Float[Array, "b n d"], grid: Grid) -> Float[Array, "b h w c"]:
    """Tokens to latents: the inverse of `pack`."""
    b, _, d = tokens.shape
    rows, columns = grid
    patches = tokens.reshape(b, rows, columns, d // PATCH**2, PATCH, PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(b, rows * PATCH, columns * PATCH, -1)
