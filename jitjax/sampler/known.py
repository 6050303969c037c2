"""Inpainting: tokens that are known at every sigma, and the anchors of the others.

    . . . . . .      #  tokens of the mask: new
    . o o o o .      o  their ring: the tokens that touch them
    . o # # o .      .  tokens outside, of which the network sees some: the context
    . o o o o .
    . . . . . .

The state of ring and outside is known at every sigma, (1 - sigma) clean + sigma noise. So a run is
one stage, with mask, ring and context as the anchors of every step, and nothing is lifted.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jitjax.sampler.anchors import AnchorSet, first_anchor_scores
from jitjax.sampler.checks import as_array, check_finite, concrete
from jitjax.sampler.grid import Grid
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.plan import Plan

NEEDED = 4.0
"""What is added to the score of mask and ring; above all scores of `first_anchor_scores`."""


class Known(NamedTuple):
    """What is known of the tokens, and of which.

    Attributes:
        clean: clean tokens, of any values.
        noise: standard normal tokens. The known state is (1 - sigma) clean + sigma noise.
        mask: in [0, 1]: 1 where tokens are new, 0 where the state is the known one; between, a
            mixture of both.
    """

    clean: Float[Array, "b n d"]
    noise: Float[Array, "b n d"]
    mask: Float[Array, "b n d"] | Float[np.ndarray, "b n d"]

    def impose(self, y: Float[Array, "b n d"], sigma: Array) -> Float[Array, "b n d"]:
        """Return a state with what is known of it.

        Args:
            y: the state.
            sigma: the sigma that it is at, in [0, 1].
        """
        known = (1 - sigma) * self.clean + sigma * self.noise
        return jnp.asarray(self.mask * y + (1 - self.mask) * known)


def check_known(known: Known, shape: tuple[int, ...], *, prefix: str = "known.") -> Known:
    """Return what is known as arrays.

    Args:
        known: what is known.
        shape: shape of the state, [b, n, d].
        prefix: of the names in messages.

    Raises:
        ValueError: an array has another shape, or a known value is not finite; or the mask has a
            value outside [0, 1].
    """
    known = Known(*(as_array(prefix + name, x) for name, x in known._asdict().items()))
    for name, array in known._asdict().items():
        if array.shape != shape:
            raise ValueError(
                f"{prefix}{name} has shape {list(array.shape)}; expected that of noise, "
                f"{list(shape)}"
            )
        check_finite(prefix + name, array)
    mask = concrete(known.mask)
    if mask is not None and (mask.min() < 0 or mask.max() > 1):
        raise ValueError(
            f"{prefix}mask has values from {mask.min():.6g} to {mask.max():.6g}; expected [0, 1]"
        )
    return known


def check_known_anchors(anchors: Array | np.ndarray, known: Known) -> None:
    """Check the anchors of inpainting.

    Raises:
        ValueError: they have the wrong shape or dtype, are not distinct tokens followed by unused
            slots, or leave out a token of the mask. Of traced anchors and masks only shapes and
            dtypes are checked.
    """
    b, n, _ = known.mask.shape
    if anchors.ndim != 2 or anchors.shape[0] != b or not 0 < anchors.shape[1] <= n:
        raise ValueError(
            f"first_anchors has shape {list(anchors.shape)}; expected [{b}, 1 to {n}] with known"
        )
    if not jnp.issubdtype(anchors.dtype, jnp.integer):
        raise ValueError(f"first_anchors has dtype {anchors.dtype}; expected integers")
    index = concrete(anchors)
    if index is None:
        return
    if index.min() < 0 or index.max() > n:
        raise ValueError(
            f"first_anchors has indices from {index.min()} to {index.max()}; expected 0 to "
            f"{n - 1}, or {n} in unused slots"
        )
    if (np.diff((index == n).astype(int), axis=1) < 0).any():
        raise ValueError("first_anchors has unused slots before used ones; expected them last")
    is_anchor = np.zeros((b, n + 1), bool)
    np.put_along_axis(is_anchor, index, True, axis=1)
    if (is_anchor[:, :n].sum(1) != (index < n).sum(1)).any():
        raise ValueError("first_anchors has duplicate indices in a sample; expected none")
    mask = concrete(known.mask)
    if mask is None:
        return
    missing = (mask > 0).any(-1) & ~is_anchor[:, :n]
    if missing.any():
        raise ValueError(
            f"first_anchors leaves out {missing.sum()} tokens of the mask; expected all of them"
        )


def needed_tokens(mask: Float[np.ndarray, "b n d"], grid: Grid) -> Bool[np.ndarray, "b n"]:
    """Return the tokens with any mask, and their ring: all that touch them, also at a corner."""
    new = (mask > 0).any(-1).reshape(-1, *grid)
    padded = np.pad(new, ((0, 0), (1, 1), (1, 1)))
    rows, columns = grid
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return np.any(shifted, axis=0).reshape(len(new), -1)


def anchor_counts(needed: Bool[np.ndarray, "b n"], plan: Plan) -> Int[np.ndarray, " b"]:
    """Return each sample's number of anchors: mask, ring, and the plan's share of the others."""
    inside = needed.sum(1)
    outside = needed.shape[1] - inside
    # The small number keeps 0.35 * 100 from being counted as 36.
    return inside + np.ceil(plan.context_density * outside - 1e-9).astype(int)


def draw_known_anchors(
    needed: Bool[np.ndarray, "b n"],
    counts: Int[np.ndarray, " b"],
    plan: Plan,
    grid: Grid,
    keys: Key[Array, " b"],
) -> Int[Array, "b k"]:
    """Draw the anchors of inpainting: what is needed, and a context by the plan's layout.

    A sample's anchors depend on its own mask and key alone.

    Args:
        needed: mask and ring, from `needed_tokens`.
        counts: from `anchor_counts`.
        plan: its layout of first anchors is that of the context.
        grid: rows and columns of tokens.
        keys: one key per sample.

    Returns:
        Token indices in ascending order, then n, the number of tokens, in unused slots: k is the
        largest of the counts.
    """
    settings = (grid, int(counts.max()), plan.context_density, plan.first, plan.fill)
    return _draw(settings, needed, counts, keys)


@partial(jax.jit, static_argnums=0)
def _draw(
    settings: tuple[Grid, int, float, str, str], needed: Array, counts: Array, keys: Array
) -> Array:
    grid, slots, density, layout, fill = settings
    n = grid[0] * grid[1]
    budget = max(1, math.floor(n * density))

    def draw(key: Array, needed: Array, count: Array) -> Array:
        scores = first_anchor_scores(key, grid, budget, layout=layout, fill=fill)
        chosen = jax.lax.top_k(scores + NEEDED * needed, slots)[1]
        return jnp.sort(jnp.where(jnp.arange(slots) < count, chosen, n))

    return jax.vmap(draw)(keys, needed, counts)


@partial(jax.jit, static_argnums=(1, 2))
def known_lifter(index: Int[Array, "b k"], slots: int, grid: Grid) -> Lifter:
    """Build the lifter of inpainting, which sets the velocity of all other tokens to 0.

    Args:
        index: anchors; n, the number of tokens, in unused slots.
        slots: number of slots, at least k.
        grid: rows and columns of tokens.
    """
    n = grid[0] * grid[1]
    index = AnchorSet.padded(index, slots, n).index
    return Lifter.build(AnchorSet(index, index < n), grid, slots, "none")
