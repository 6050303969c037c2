"""The token grid, and the position of each token on it."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

Grid = tuple[int, int]
"""Rows and columns of tokens: two positive integers. FLUX.1 has a token per 16 x 16 pixels."""


def positions(index: Int[Array, "*b m"], grid: Grid) -> Int[Array, "*b m 3"]:
    """Return the positions of tokens on the grid.

    Args:
        index: token indices on the row-major grid, from 0 to rows * columns - 1.
        grid: rows and columns of tokens.

    Returns:
        (0, row, column) for each index. The leading 0 follows the convention of FLUX's position
        ids.

    Examples:
        >>> jitjax.sampler.positions(jnp.array([0, 5]), (2, 4))
        Array([[0, 0, 0],
               [0, 1, 1]], dtype=int32)
    """
    row, column = index // grid[1], index % grid[1]
    return jnp.stack([jnp.zeros_like(index), row, column], axis=-1)


def as_integer(value: Any) -> int | None:
    """Return an integer of any type (Python, NumPy, JAX) as an `int`; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_grid(grid: Any) -> Grid:
    """Return a grid, given as a pair of integers of any type, as a tuple of two `int`.

    Raises:
        ValueError: `grid` is no pair of positive integers.
    """
    try:
        sides = tuple(as_integer(side) for side in grid)
    except TypeError:
        sides = ()
    if len(sides) == 2 and all(side is not None and side >= 1 for side in sides):
        return sides  # type: ignore[return-value]
    raise ValueError(f"grid is {grid!r}; expected (rows, columns), two positive integers")
