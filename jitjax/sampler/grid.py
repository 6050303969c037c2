"""The token grid, and the position of each token on it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

Grid = tuple[int, int]
"""Rows and columns of tokens."""


def positions(index: Int[Array, "*b m"], grid: Grid) -> Int[Array, "*b m 3"]:
    """Return the positions of tokens on the grid.

    Args:
        index: token indices on the row-major grid.
        grid: rows and columns of tokens.

    Returns:
        (0, row, column) for each index. The leading 0 follows the convention of FLUX's position
        ids.
    """
    row, column = index // grid[1], index % grid[1]
    return jnp.stack([jnp.zeros_like(index), row, column], axis=-1)
