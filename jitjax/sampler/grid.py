"""The grid of tokens, and where each token is on it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

Grid = tuple[int, int]
"""Rows and columns of tokens."""


def positions(index: Int[Array, "*b m"], grid: Grid) -> Int[Array, "*b m 3"]:
    """FLUX position ids (0, row, column) of the tokens at `index` of a row-major grid."""
    row, column = index // grid[1], index % grid[1]
    return jnp.stack([jnp.zeros_like(index), row, column], axis=-1)
