"""Anchors: which tokens the transformer runs on, and which it takes up next.

An anchor set has a static size; slots that hold no token point past the end of the grid, so
that gathers fill them and scatters drop them.

    slot      0   1   2   3   4   5
    index     0   5   9  12  16  16      (16 tokens: the last two slots are padding)
    valid     y   y   y   y   n   n
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jitjax.latents import Grid


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


def first_anchors(key: Key[Array, ""], grid: Grid, budget: int) -> Int[Array, " k"]:
    """The first stage's anchors of one sample: an even grid and the border, fitted to `budget`.

    Tokens on even rows and even columns and all border tokens come first; tokens drawn from
    `key` are added, or dropped, until there are `budget`. Corners are dropped last, so that
    the anchors always span the grid. Sorted by position.

    Source: the authors' program (there the draw is not reproducible).
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    edge_row = (rows == 0) | (rows == grid[0] - 1)
    edge_column = (columns == 0) | (columns == grid[1] - 1)
    even = (rows % 2 == 0) & (columns % 2 == 0)
    rank = (even | edge_row | edge_column).astype(np.float32) + (edge_row & edge_column)
    # `uniform` is below 1, so that it only decides among tokens of one rank.
    score = rank + jax.random.uniform(key, rank.shape)
    return jnp.sort(jax.lax.top_k(score, budget)[1])


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


def activate(
    anchors: AnchorSet, importance: Float[Array, "b n"], known: int, budget: int
) -> tuple[Int[Array, "b k"], Int[Array, "b new"]]:
    """The next stage's anchors: the `known` old ones, then the most important others.

    Args:
        anchors: the old set; its first `known` slots are valid.
        importance: one value per token; higher is taken up first, ties by position.
        known: number of old anchors.
        budget: number of anchors wanted.

    Returns:
        all anchors [b, budget], old ones first, and the new ones alone [b, budget - known].
    """
    take_out = jax.vmap(lambda score, index: score.at[index].set(-jnp.inf, mode="drop"))
    _, new = jax.lax.top_k(take_out(importance, anchors.index), budget - known)
    return jnp.concatenate([anchors.index[:, :known], new], axis=1), new
