"""The lifter: values on anchors to values on all tokens (Pi = S u + I(u) in the paper).

Anchors keep their exact values. What the others get is one of these interpolators I:

    "blur"     the nearest anchor's value, then a Gaussian blur of width
               clip(0.4 / sqrt(density), 1, 10) tokens: the authors' program. At the
               densities of its presets the clip makes the width 1.
    "narrow"   the same without the clip: 0.4 / sqrt(density), the width that was meant
    "linear"   a plane fitted to the anchors around, with Gaussian weights of that narrow width
               (normalised convolution of first order, Knutsson and Westin 1993): exact for
               constants, nearly so for slopes
    "nearest"  the nearest anchor's value
    "none"     0 (the paper's ablation); the micro-flow's target is lifted by "blur" all the same

What depends on the anchors alone is made once per stage.
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
"""Holds the slopes of "linear" back where anchors lie on one side, the more the farther they are:
times the squared distance to the nearest anchor, whose weight in the fit is 1."""


class Lifter(eqx.Module):
    """Lifts values on one stage's anchors.

    Attributes:
        anchors: where the values are.
        nearest: slot of each token's nearest anchor; among equally near ones the first.
        anchored: whether the token is an anchor itself.
        weights: of each slot for each token, where the interpolator is "linear".
        grid: rows and columns.
        width: standard deviation of the Gaussian, in tokens.
        kind: the interpolator.
    """

    anchors: AnchorSet
    nearest: Int[Array, "b n"]
    anchored: Bool[Array, "b n"]
    weights: Float[Array, "b n m"] | None
    grid: Grid = eqx.field(static=True)
    width: float = eqx.field(static=True)
    kind: str = eqx.field(static=True)

    @classmethod
    def build(cls, anchors: AnchorSet, grid: Grid, known: int, kind: str = "blur") -> Lifter:
        """Prepare to lift from `known` anchors, the first slots of `anchors`."""
        rows, columns = np.indices(grid).reshape(2, -1, 1).astype(np.int32)
        far = grid[0] ** 2 + grid[1] ** 2

        def one(index: Array, valid: Array) -> tuple[Array, Array]:
            # Whole numbers, so that ties are ties.
            row, column = index[None] // grid[1], index[None] % grid[1]
            squared = jnp.where(valid[None], (rows - row) ** 2 + (columns - column) ** 2, far)
            return jnp.argmin(squared, axis=1), jnp.min(squared, axis=1) == 0

        nearest, anchored = jax.vmap(one)(anchors.index, anchors.valid)
        width = blur_width(known / (grid[0] * grid[1]), clip=kind in ("blur", "none"))
        weights = (
            jax.vmap(partial(_plane_weights, grid, width))(anchors) if kind == "linear" else None
        )
        return cls(anchors, nearest, anchored, weights, grid, width, kind)

    def __call__(self, values: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
        """Lift `values` on the anchors to the whole grid; padded slots are not looked at."""
        exact = jax.vmap(lambda v, i: v[i])(values, self.nearest)
        if self.kind == "nearest":
            return exact
        if self.kind == "none":
            others = jnp.zeros_like(exact)
        elif self.kind == "linear":
            known = jnp.where(self.anchors.valid[..., None], values, 0)
            assert self.weights is not None
            weights = self.weights.astype(values.dtype)
            others = jnp.einsum("bnm,bmd->bnd", weights, known, precision="highest")
        else:
            others = self._blurred(exact)
        return jnp.where(self.anchored[..., None], exact, others)

    @property
    def of_clean(self) -> Lifter:
        """The lifter of clean predictions: "none" takes away the velocity's interpolation alone."""
        return dataclasses.replace(self, kind="blur") if self.kind == "none" else self

    def _blurred(self, field: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = field.shape
        down, across = (blur_matrix(side, self.width, field.dtype) for side in self.grid)
        blurred = jnp.einsum(
            "ip,jq,bpqd->bijd",
            down,
            across,
            field.reshape(b, *self.grid, d),
            optimize="optimal",
            precision="highest",  # cheap here, and accelerators would round to fewer bits
        )
        return blurred.reshape(b, n, d)


def _plane_weights(grid: Grid, width: float, anchors: AnchorSet) -> Float[Array, "n m"]:
    """What each slot adds to each token's value of the plane fitted around it (no batch axis).

    The plane a + b dr + c dc is the least-squares fit to the anchors at offsets (dr, dc), so its
    value at the token, a, is a weighted sum of theirs. Gaussian weights are relative to that of
    the nearest anchor, so that they do not vanish however far it is.
    """
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    dr = (anchors.index // grid[1])[None] - rows
    dc = (anchors.index % grid[1])[None] - columns
    squared = jnp.where(anchors.valid[None], (dr**2 + dc**2).astype(jnp.float32), jnp.inf)
    gap = squared.min(axis=1, keepdims=True)
    w = jnp.exp((gap - squared) / (2 * width**2))
    total = w.sum(axis=1, keepdims=True)
    w = w / total

    def mean(x: Array) -> Array:
        return (w * x).sum(axis=1, keepdims=True)

    # Around the anchors' mean place, so that constants are exact to rounding.
    at_r, at_c = mean(dr.astype(w.dtype)), mean(dc.astype(w.dtype))
    dr, dc = dr - at_r, dc - at_c
    held = RIDGE * gap / total
    rr, cc, rc = mean(dr**2) + held, mean(dc**2) + held, mean(dr * dc)
    determinant = rr * cc - rc**2
    safe = jnp.where(gap > 0, determinant, 1)  # on an anchor itself nothing is fitted
    slope_r, slope_c = (cc * dr - rc * dc) / safe, (rr * dc - rc * dr) / safe
    return w * (1 - at_r * slope_r - at_c * slope_c)


def blur_width(density: float, clip: bool = True) -> float:
    """Standard deviation of the blur, in tokens: 0.4 / sqrt(density), clipped to [1, 10].

    Source: the authors' program.
    """
    width = 0.4 / math.sqrt(density)
    return min(max(width, 1.0), 10.0) if clip else width


def blur_matrix(side: int, width: float, dtype: jnp.dtype) -> Array:
    """Gaussian blur along one side of the grid as a [side, side] matrix, edges reflected."""
    radius = math.ceil(3 * width)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    weights /= weights.sum()
    # On a grid narrower than the radius the reflection bounces to and fro.
    source = np.pad(np.arange(side), radius, mode="reflect" if side > 1 else "edge")
    matrix = np.zeros((side, side))
    for offset, weight in enumerate(weights):
        np.add.at(matrix, (np.arange(side), source[offset : offset + side]), weight)
    return jnp.asarray(matrix, dtype)
