"""Anchors: the tokens that the network runs on, and the choice of new ones.

An anchor set has a static number of slots. The index of a padded slot points past the end of the
grid, so that gathers fill it and scatters drop it.

    slot      0   1   2   3   4   5
    index     0   5   9  12  16  16      (16 tokens: the last two slots are padding)
    valid     y   y   y   y   n   n

Anchors are chosen by the highest scores, one score per token. In the scores of `first_anchors` and
`fixed_grid_scores` the integer part is a priority and the fraction breaks ties.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jitjax.sampler import keys as draws
from jitjax.sampler.grid import Grid


class AnchorSet(eqx.Module):
    """The anchors of a batch: one set per sample, with padded slots last.

    Attributes:
        index: token index of each slot on the row-major grid; N, the number of tokens, in padded
            slots.
        valid: True for slots that hold a token, False for padded slots.

    Examples:
        >>> anchors = jitjax.sampler.AnchorSet.padded(jnp.array([[0, 3]]), slots=3, tokens=4)
        >>> anchors.index
        Array([[0, 3, 4]], dtype=int32)
        >>> anchors.gather(jnp.arange(4.0)[None, :, None])[0, :, 0]
        Array([0., 3., 0.], dtype=float32)
    """

    index: Int[Array, "b m"]
    valid: Bool[Array, "b m"]

    @classmethod
    def padded(cls, index: Int[Array, "b k"], slots: int, tokens: int) -> AnchorSet:
        """Build an anchor set from token indices, padded to a number of slots.

        Args:
            index: token indices of the anchors, from 0 to `tokens` - 1; distinct.
            slots: number of slots, at least k.
            tokens: number of tokens of the grid.

        Returns:
            The anchor set, with `slots` slots.
        """
        b, k = index.shape
        index = jnp.pad(index, ((0, 0), (0, slots - k)), constant_values=tokens)
        return cls(index.astype(jnp.int32), jnp.broadcast_to(jnp.arange(slots) < k, (b, slots)))

    def gather(self, values: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """Return the values on the anchors (S^T y in the paper); zeros in padded slots.

        Args:
            values: one row per token.
        """
        take = jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=0))
        return take(values, self.index)

    def scatter(
        self, into: Float[Array, "b n d"], values: Float[Array, "b m d"]
    ) -> Float[Array, "b n d"]:
        """Return `into` with `values` written to the anchors; padded slots are ignored.

        Args:
            into: one row per token.
            values: one row per slot.
        """
        put = jax.vmap(lambda y, i, v: y.at[i].set(v, mode="drop"))
        return put(into, self.index, values)


def dither(grid: Grid) -> np.ndarray:
    """Compute a dither value in [0, 1) per token.

    For any threshold, the tokens whose value is above it are evenly spread over the grid.

    Source: Roberts, "The unreasonable effectiveness of quasirandom sequences" (R2 dither).
    """
    plastic = 1.32471795724474602596  # the real root of x^3 = x + 1
    rows, columns = np.indices(grid).reshape(2, -1)
    return np.mod(0.5 + rows / plastic + columns / plastic**2, 1)


def layout_priority(grid: Grid, stride: int | None = None) -> np.ndarray:
    """Compute the priority of each token as a first anchor.

    Corners have the highest priority, so that the anchors always span the grid.

    Args:
        grid: rows and columns of tokens.
        stride: None for the layout of tokens on even rows and even columns and on the border;
            otherwise the layout of tokens on every stride-th row and column and the last ones.

    Returns:
        Integers, [tokens]: 2 for corners, 1 for other tokens of the layout, 0 elsewhere.
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
    """Draw the first stage's anchors of one sample: a layout, filled or thinned to `budget`.

    Source: the authors' program, whose draw is not reproducible and may drop corners.

    Args:
        key: `jax.random` key of the tokens that are added or dropped.
        grid: rows and columns of tokens.
        budget: number of anchors, from 1 to the number of tokens.
        layout: "even" for the tokens on even rows and even columns and on the border, or "strided"
            for those on every s-th row and column and the last ones, with
            s = floor(sqrt(tokens / budget)).
        fill: whether "random" or evenly spread ("dither") tokens are added or dropped. Corners are
            dropped last.

    Returns:
        Distinct token indices in ascending order, int32 [budget].

    Raises:
        ValueError: there are fewer tokens than `budget`.

    Examples:
        >>> anchors = jitjax.sampler.first_anchors(jax.random.key(0), (3, 3), 8)
        >>> anchors  # border and corners; without the centre
        Array([0, 1, 2, 3, 5, 6, 7, 8], dtype=int32)
    """
    scores = first_anchor_scores(key, grid, budget, layout=layout, fill=fill)
    return jnp.sort(jax.lax.top_k(scores, budget)[1])


def first_anchor_scores(
    key: Key[Array, ""], grid: Grid, budget: int, *, layout: str, fill: str
) -> Float[Array, " n"]:
    """Draw the scores by which `first_anchors` chooses, with the same arguments.

    Returns:
        The priority of each token, below 3: an integer by the layout, and a fraction that the key
        decides.
    """
    n = grid[0] * grid[1]
    stride = max(1, int(math.sqrt(n / budget))) if layout == "strided" else None
    if fill == "dither":
        # The key shifts the pattern. The factor keeps values away from 1, where float32 would
        # round a score up to the next priority.
        shifted = jnp.asarray(dither(grid), jnp.float32) + draws.uniform(key)
        tie_break = jnp.mod(shifted, 1) * 0.999
    else:
        tie_break = draws.uniform(key, (n,))
    return jnp.asarray(layout_priority(grid, stride), jnp.float32) + tie_break


def local_variance(velocity: Float[Array, "b n d"], grid: Grid) -> Float[Array, "b n"]:
    """Compute the importance of each token: the local variance of the velocity u.

    The importance is E_W[u^2] - (E_W[u])^2 over 3 x 3 windows W, averaged over channels. Windows
    extend over the edge of the grid, where u is 0. Source: paper, importance-guided activation.
    """
    b, _, d = velocity.shape
    field = velocity.reshape(b, *grid, d)

    def mean(x: Array) -> Array:
        window = (1, 3, 3, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME") / 9

    variance = mean(field**2) - mean(field) ** 2
    return variance.mean(-1).reshape(b, -1)


def fixed_grid_scores(batch: int, grid: Grid) -> Float[Array, "b n"]:
    """Compute scores that do not depend on the image, [batch, tokens].

    The tokens of the "even" layout come first, then evenly spread tokens.
    """
    scores = jnp.asarray(np.minimum(layout_priority(grid), 1) + dither(grid), jnp.float32)
    return jnp.broadcast_to(scores, (batch, scores.shape[0]))


def activate(
    anchors: AnchorSet, scores: Float[Array, "b n"], old_budget: int, budget: int
) -> tuple[Int[Array, "b k"], Int[Array, "b new"]]:
    """Choose the next stage's anchors: the old ones and the highest-scoring other tokens.

    Args:
        anchors: the old anchors; their first `old_budget` slots are valid.
        scores: one score per token; equal scores are ordered by token index.
        old_budget: number of old anchors.
        budget: number of anchors of the next stage.

    Returns:
        All anchors, [b, budget], the old ones first; and the new ones only,
        [b, budget - old_budget], highest score first.
    """
    exclude = jax.vmap(lambda score, index: score.at[index].set(-jnp.inf, mode="drop"))
    _, new = jax.lax.top_k(exclude(scores, anchors.index), budget - old_budget)
    return jnp.concatenate([anchors.index[:, :old_budget], new], axis=1), new
