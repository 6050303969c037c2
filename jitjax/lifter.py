"""The lifter: values on anchors to values on all tokens (Pi = S u + I(u) in the paper).

    values on anchors --> nearest anchor's value everywhere --> Gaussian blur --> exact values
    [m, d]                [rows, columns, d]                                      on the anchors

The map to the nearest anchor depends on the anchors alone: it is made once per stage.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jitjax.anchors import AnchorSet
from jitjax.latents import Grid


class Lifter(eqx.Module):
    """What lifting needs to know about one stage's anchors.

    Attributes:
        nearest: slot of each token's nearest anchor.
        anchored: whether the token is an anchor itself.
    """

    nearest: Int[Array, "b n"]
    anchored: Bool[Array, "b n"]

    @classmethod
    def build(cls, anchors: AnchorSet, grid: Grid) -> Lifter:
        """Find each token's nearest anchor; among equally near ones the first slot wins."""
        rows, columns = np.indices(grid).reshape(2, -1, 1).astype(np.int32)
        far = grid[0] ** 2 + grid[1] ** 2

        def one(index: Array, valid: Array) -> tuple[Array, Array]:
            # Whole numbers, so that ties are ties.
            row, column = index[None] // grid[1], index[None] % grid[1]
            squared = jnp.where(valid[None], (rows - row) ** 2 + (columns - column) ** 2, far)
            return jnp.argmin(squared, axis=1), jnp.min(squared, axis=1) == 0

        return cls(*jax.vmap(one)(anchors.index, anchors.valid))

    def __call__(
        self, values: Float[Array, "b m d"], grid: Grid, density: float
    ) -> Float[Array, "b n d"]:
        """Lift `values` on the anchors, a share `density` of all tokens, to the whole grid."""
        b, n = self.nearest.shape
        field = jax.vmap(lambda v, i: v[i])(values, self.nearest)
        down, across = (blur_matrix(side, blur_width(density), values.dtype) for side in grid)
        blurred = jnp.einsum(
            "ip,jq,bpqd->bijd",
            down,
            across,
            field.reshape(b, *grid, -1),
            optimize="optimal",
            precision="highest",  # cheap here, and accelerators would round to fewer bits
        )
        return jnp.where(self.anchored[..., None], field, blurred.reshape(b, n, -1))


def blur_width(density: float) -> float:
    """Standard deviation of the blur, in tokens: clip(0.4 / sqrt(density), 1, 10).

    Source: the authors' program. At the densities of its presets the clip makes it 1.
    """
    return min(max(0.4 / math.sqrt(density), 1.0), 10.0)


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
