"""Anchors: which tokens the transformer runs on, and which it takes up next.

An anchor set has a static size; slots that hold no token point past the end of the grid, so
that gathers fill them and scatters drop them.

    slot      0   1   2   3   4   5
    index     0   5   9  12  16  16      (16 tokens: the last two slots are padding)
    valid     y   y   y   y   n   n

Every way of choosing anchors is a score per token, of which the highest are taken: a whole number
says how much a token is wanted, a fraction below 1 decides among equals.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jitjax.sampler.grid import Grid


class AnchorSet(eqx.Module):
    """The anchors of a batch, one set per sample, padding last.

    Attributes:
        index: position of each slot's token on the row-major grid; N for padding.
        valid: whether the slot holds a token.
    """

    index: Int[Array, "b m"]
    valid: Bool[Array, "b m"]

    @classmethod
    def padded(cls, index: Int[Array, "b k"], slots: int, tokens: int) -> AnchorSet:
        """The set of the k anchors `index`, padded to `slots` slots on a grid of `tokens`."""
        b, k = index.shape
        index = jnp.pad(index, ((0, 0), (0, slots - k)), constant_values=tokens)
        return cls(index.astype(jnp.int32), jnp.broadcast_to(jnp.arange(slots) < k, (b, slots)))

    def gather(self, values: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """The anchors' values (S^T y in the paper); zero in padded slots."""
        take = jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=0))
        return take(values, self.index)

    def scatter(
        self, into: Float[Array, "b n d"], values: Float[Array, "b m d"]
    ) -> Float[Array, "b n d"]:
        """`into` with the anchors' values replaced; padded slots are dropped."""
        put = jax.vmap(lambda y, i, v: y.at[i].set(v, mode="drop"))
        return put(into, self.index, values)


def dither(grid: Grid) -> np.ndarray:
    """A fraction in [0, 1) for each token; those above any threshold are evenly spread.

    Source: Roberts, "The unreasonable effectiveness of quasirandom sequences" (R2 dither).
    """
    plastic = 1.32471795724474602596  # the real root of x^3 = x + 1
    rows, columns = np.indices(grid).reshape(2, -1)
    return np.mod(0.5 + rows / plastic + columns / plastic**2, 1)


def wanted(grid: Grid, stride: int | None = None) -> np.ndarray:
    """How much each token is wanted as a first anchor: 0 not, 1 by the layout, 2 as a corner.

    The layout is even rows and columns and the border; with `stride`, every stride-th row and
    column, and the last ones. Corners are wanted most, so that anchors always span the grid.
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    edge_row = (rows == 0) | (rows == grid[0] - 1)
    edge_column = (columns == 0) | (columns == grid[1] - 1)
    if stride is None:
        layout = (rows % 2 == 0) & (columns % 2 == 0) | edge_row | edge_column
    else:
        layout = ((rows % stride == 0) | (rows == grid[0] - 1)) & (
            (columns % stride == 0) | (columns == grid[1] - 1)
        )
    return layout.astype(np.int32) + (edge_row & edge_column)


def first_anchors(
    key: Key[Array, ""],
    grid: Grid,
    budget: int,
    *,
    layout: str = "even",
    fill: str = "random",
) -> Int[Array, " k"]:
    """The first stage's anchors of one sample: a layout, filled up or thinned to `budget`.

    Args:
        key: decides what is added or dropped.
        grid: rows and columns.
        budget: number of anchors.
        layout: "even" rows and even columns and the border; or "strided", every s-th row and
            column and the last ones, s = floor(sqrt(tokens / budget)).
        fill: add or drop "random" tokens, or evenly spread ones ("dither"). Corners go last.

    Returns:
        distinct positions, rising.

    Source: the authors' program, where the draw is not reproducible and may drop corners.
    """
    n = grid[0] * grid[1]
    stride = max(1, int(math.sqrt(n / budget))) if layout == "strided" else None
    if fill == "dither":
        # The key shifts the pattern. On top of it the mean is kept away from 1, where float32
        # would round up to the next rank.
        tie = jnp.mod(jnp.asarray(dither(grid), jnp.float32) + jax.random.uniform(key), 1) * 0.999
    else:
        tie = jax.random.uniform(key, (n,))
    return jnp.sort(jax.lax.top_k(wanted(grid, stride).astype(np.float32) + tie, budget)[1])


def local_variance(velocity: Float[Array, "b n d"], grid: Grid) -> Float[Array, "b n"]:
    """Importance of each token: E_W[u^2] - (E_W[u])^2 over 3 x 3 windows, mean over channels.

    Windows reach over the edge, where u counts as 0 (paper, importance-guided activation).
    """
    b, _, d = velocity.shape
    field = velocity.reshape(b, *grid, d)

    def mean(x: Array) -> Array:
        window = (1, 3, 3, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME") / 9

    variance = mean(field**2) - mean(field) ** 2
    return variance.mean(-1).reshape(b, -1)


def fixed_grid_scores(batch: int, grid: Grid) -> Float[Array, "b n"]:
    """Scores that ignore the picture: even rows and columns first, then evenly spread tokens."""
    scores = jnp.asarray(np.minimum(wanted(grid), 1) + dither(grid), jnp.float32)
    return jnp.broadcast_to(scores, (batch, scores.shape[0]))


def activate(
    anchors: AnchorSet, scores: Float[Array, "b n"], known: int, budget: int
) -> tuple[Int[Array, "b k"], Int[Array, "b new"]]:
    """The next stage's anchors: the `known` old ones, then the others with the highest scores.

    Args:
        anchors: the old set; its first `known` slots are valid.
        scores: one value per token; higher is taken up first, ties by position.
        known: number of old anchors.
        budget: number of anchors wanted.

    Returns:
        all anchors [b, budget], old ones first, and the new ones alone [b, budget - known].
    """
    take_out = jax.vmap(lambda score, index: score.at[index].set(-jnp.inf, mode="drop"))
    _, new = jax.lax.top_k(take_out(scores, anchors.index), budget - known)
    return jnp.concatenate([anchors.index[:, :known], new], axis=1), new
