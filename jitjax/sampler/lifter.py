"""The lifter: interpolation from anchors to all tokens (Pi u = S u + I(u) in the paper).

Anchors keep their exact values. The other tokens get one of these interpolators I:

    "blur"     the nearest anchor's value, then a Gaussian blur of width
               clip(0.4 / sqrt(density), 1, 10) tokens: the authors' program. At the
               densities of its presets the clip makes the width 1.
    "narrow"   the same without the clip: 0.4 / sqrt(density), the intended width
    "linear"   a plane fitted to the surrounding anchors, with Gaussian weights of the width of
               "narrow" (first-order normalised convolution, Knutsson and Westin 1993): exact for
               constants, nearly exact for linear fields
    "nearest"  the nearest anchor's value
    "none"     0 (the paper's ablation); clean predictions are lifted by "blur" nevertheless

Everything that depends on the anchors only is computed once per stage, in `Lifter.build`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.grid import Grid

RIDGE = 0.02
"""Ridge regularisation of the slopes of "linear", per squared distance to the nearest anchor.

It limits extrapolation where all anchors lie on one side. The nearest anchor has weight 1 in the
fit."""


class Lifter(eqx.Module):
    """Interpolates values on one stage's anchors to all tokens.

    Attributes:
        anchors: the anchors of the stage.
        nearest: slot of each token's nearest anchor; the first slot among equally near ones.
        is_anchor: whether each token is an anchor.
        weights: interpolation weight of each slot for each token if `kind` is "linear", else None.
        grid: rows and columns of tokens.
        width: standard deviation of the Gaussian, in tokens.
        kind: the interpolator.

    Source: paper, augmented lifter Pi; "blur" is that of the authors' program.

    Examples:
        >>> anchors = jitjax.sampler.AnchorSet.padded(jnp.array([[0, 3]]), slots=2, tokens=4)
        >>> lift = jitjax.sampler.Lifter.build(anchors, grid=(1, 4), budget=2, kind="nearest")
        >>> lift(jnp.array([[[10.0], [20.0]]]))[0, :, 0]
        Array([10., 10., 20., 20.], dtype=float32)
    """

    anchors: AnchorSet
    nearest: Int[Array, "b n"]
    is_anchor: Bool[Array, "b n"]
    weights: Float[Array, "b n m"] | None
    grid: Grid = eqx.field(static=True)
    width: float = eqx.field(static=True)
    kind: str = eqx.field(static=True)

    @classmethod
    def build(cls, anchors: AnchorSet, grid: Grid, budget: int, kind: str = "blur") -> Lifter:
        """Build the lifter of one stage.

        Args:
            anchors: the anchors of the stage; their first `budget` slots are valid.
            grid: rows and columns of tokens.
            budget: number of anchors, from 1 to the number of tokens.
            kind: the interpolator: "blur", "narrow", "linear", "nearest" or "none".

        Returns:
            The lifter: a function of values on the anchors.
        """
        rows, columns = np.indices(grid).reshape(2, -1, 1).astype(np.int32)
        beyond_grid = grid[0] ** 2 + grid[1] ** 2  # above every squared distance on the grid

        def nearest_slot(index: Array, valid: Array) -> tuple[Array, Array]:
            # Integer distances, so that ties are exact.
            row, column = index[None] // grid[1], index[None] % grid[1]
            squared = (rows - row) ** 2 + (columns - column) ** 2
            squared = jnp.where(valid[None], squared, beyond_grid)
            return jnp.argmin(squared, axis=1), jnp.min(squared, axis=1) == 0

        nearest, is_anchor = jax.vmap(nearest_slot)(anchors.index, anchors.valid)
        width = blur_width(budget / (grid[0] * grid[1]), clip=kind in ("blur", "none"))
        weights = (
            jax.vmap(partial(_plane_weights, grid, width))(anchors) if kind == "linear" else None
        )
        return cls(anchors, nearest, is_anchor, weights, grid, width, kind)

    def __call__(self, values: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
        """Lift values from the anchors to all tokens.

        Args:
            values: one row per slot; those of padded slots are ignored.

        Returns:
            One row per token; anchors keep theirs exactly.
        """
        nearest_values = jax.vmap(lambda v, i: v[i])(values, self.nearest)
        if self.kind == "nearest":
            return nearest_values
        if self.kind == "none":
            interpolated = jnp.zeros_like(nearest_values)
        elif self.kind == "linear":
            valid_values = jnp.where(self.anchors.valid[..., None], values, 0)
            assert self.weights is not None
            weights = self.weights.astype(values.dtype)
            interpolated = jnp.einsum("bnm,bmd->bnd", weights, valid_values, precision="highest")
        else:
            interpolated = self._blur(nearest_values)
        return jnp.where(self.is_anchor[..., None], nearest_values, interpolated)

    def lift_clean(self, values: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
        """Lift clean predictions from the anchors to all tokens.

        The kind "none" removes the interpolation of the velocity only: clean predictions are then
        lifted by "blur".

        Args:
            values: clean predictions, one row per slot.

        Returns:
            One row per token; anchors keep theirs exactly.
        """
        lifter = dataclasses.replace(self, kind="blur") if self.kind == "none" else self
        return lifter(values)

    def _blur(self, field: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = field.shape
        row_blur, column_blur = (blur_matrix(side, self.width, field.dtype) for side in self.grid)
        blurred = jnp.einsum(
            "ip,jq,bpqd->bijd",
            row_blur,
            column_blur,
            field.reshape(b, *self.grid, d),
            optimize="optimal",
            precision="highest",  # accelerators would round to fewer bits; the cost is small
        )
        return blurred.reshape(b, n, d)


def _plane_weights(grid: Grid, width: float, anchors: AnchorSet) -> Float[Array, "n m"]:
    """Compute the weight of each slot in each token's "linear" interpolation, for one sample.

    The plane a + b dr + c dc is the least-squares fit to the anchors at offsets (dr, dc) from the
    token. Its value at the token, a, is therefore a weighted sum of the anchors' values. The
    Gaussian weights are relative to that of the nearest anchor, so that they do not vanish where
    all anchors are far away.
    """
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    dr = (anchors.index // grid[1])[None] - rows
    dc = (anchors.index % grid[1])[None] - columns
    squared = jnp.where(anchors.valid[None], (dr**2 + dc**2).astype(jnp.float32), jnp.inf)
    nearest = squared.min(axis=1, keepdims=True)
    w = jnp.exp((nearest - squared) / (2 * width**2))
    total = w.sum(axis=1, keepdims=True)
    w = w / total

    def mean(x: Array) -> Array:
        return (w * x).sum(axis=1, keepdims=True)

    # Offsets are relative to the anchors' mean position, so that constants are exact to rounding.
    mean_r, mean_c = mean(dr.astype(w.dtype)), mean(dc.astype(w.dtype))
    dr, dc = dr - mean_r, dc - mean_c
    ridge = RIDGE * nearest / total
    rr, cc, rc = mean(dr**2) + ridge, mean(dc**2) + ridge, mean(dr * dc)
    # At anchors the determinant may be 0; their weights are not used.
    determinant = jnp.where(nearest > 0, rr * cc - rc**2, 1)
    slope_r, slope_c = (cc * dr - rc * dc) / determinant, (rr * dc - rc * dr) / determinant
    return w * (1 - mean_r * slope_r - mean_c * slope_c)


def blur_width(density: float, clip: bool = True) -> float:
    """Compute the standard deviation of the blur, in tokens.

    It is 0.4 / sqrt(density), clipped to [1, 10] unless `clip` is False. Source: the authors'
    program.
    """
    width = 0.4 / math.sqrt(density)
    return min(max(width, 1.0), 10.0) if clip else width


def blur_matrix(side: int, width: float, dtype: jnp.dtype) -> Array:
    """Compute the [side, side] matrix of a Gaussian blur along one axis, with reflected edges.

    Args:
        side: number of tokens along the axis.
        width: standard deviation of the Gaussian, in tokens.
        dtype: dtype of the matrix.
    """
    radius = math.ceil(3 * width)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    weights /= weights.sum()
    # If the axis is shorter than the radius, np.pad reflects repeatedly.
    source = np.pad(np.arange(side), radius, mode="reflect" if side > 1 else "edge")
    matrix = np.zeros((side, side))
    for offset, weight in enumerate(weights):
        np.add.at(matrix, (np.arange(side), source[offset : offset + side]), weight)
    return jnp.asarray(matrix, dtype)
