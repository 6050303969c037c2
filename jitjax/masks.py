"""Masks of inpainting: which pixels are new.

    mask [H, W] in [0, 1] -- largest of 8 x 8 --> latents' mask [H/8, W/8] -- pack --> [N, 64]
    new pixels, given pixels -- composite --> mask * new + (1 - mask) * given

A mask whose values are known stays a NumPy array, also inside transformations, because there the
results of `jax.numpy` have no known values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jitjax.config import PATCH, FluxConfig
from jitjax.sampler.checks import as_array, check_finite, concrete
from jitjax.sampler.grid import Grid, as_grid
from jitjax.sampler.keys import batch_keys, split
from jitjax.sampler.plan import Plan, get_plan


def check_mask(mask: Any, size: tuple[int, int]) -> Any:
    """Check a mask.

    Args:
        mask: booleans or floating point numbers in [0, 1], [b, height, width] or
            [b, height, width, 1]; see `Task`.
        size: height and width of the pictures that it belongs to.

    Returns:
        The mask as floating point numbers, float32 unless it had another such dtype,
        [b, height, width]; a NumPy array if its values are known.

    Raises:
        ValueError: the shape is another, or a known value is not finite or outside [0, 1], or a
            picture's mask is 0 everywhere.
        TypeError: it is no array, or of another dtype.
    """
    if not isinstance(mask, (jax.Array, np.ndarray)):
        raise TypeError(
            f"mask is {type(mask).__name__}; expected an array [batch, height, width] of booleans "
            "or numbers in [0, 1], 1 where the picture is new"
        )
    if mask.dtype != np.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
        hint = ", such as x.astype(np.float32) / 255" if mask.dtype == np.uint8 else ""
        raise TypeError(
            f"mask has dtype {mask.dtype}; expected booleans or floating point numbers in [0, 1]"
            f"{hint}"
        )
    shape = mask.shape[:-1] if mask.ndim == 4 and mask.shape[3] == 1 else mask.shape
    if len(shape) != 3 or not shape[0]:
        hint = "; mask[None] is a batch of one" if mask.ndim == 2 else ""
        raise ValueError(
            f"mask has shape {list(mask.shape)}; expected [batch, height, width], or "
            f"[batch, height, width, 1]{hint}"
        )
    if shape[1:] != size:
        raise ValueError(
            f"mask has {shape[1]} rows and {shape[2]} columns of pixels; expected {size[0]} and "
            f"{size[1]}, those of image"
        )
    values = concrete(mask)
    if values is None:
        mask = mask.reshape(shape)
        return mask.astype(jnp.float32) if mask.dtype == np.bool_ else mask
    values = values.reshape(shape)
    values = as_array("mask", values.astype(np.float32) if values.dtype == np.bool_ else values)
    check_finite("mask", values)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"mask has values from {values.min():.6g} to {values.max():.6g}; expected [0, 1]"
        )
    empty = np.flatnonzero(~values.any(axis=(1, 2)))
    if empty.size:
        of = "" if len(values) == 1 else f" of picture {empty[0]}"
        raise ValueError(
            f"mask{of} is 0 everywhere, so there is nothing to do; expected 1 where the picture is "
            "new"
        )
    return values


def is_all_new(mask: Any) -> bool:
    """Whether a mask is known to be 1 everywhere, so that nothing is kept."""
    values = concrete(mask)
    return values is not None and bool((values == 1).all())


def mask_tokens(
    mask: Float[Array, "b h w"] | Float[np.ndarray, "b h w"], config: FluxConfig
) -> Float[Array, "b n d"] | Float[np.ndarray, "b n d"]:
    """Return the mask of tokens, in the layout of `encode`, for `denoise`.

    A latent's value is the largest of its 8 x 8 pixels, so that no pixel of the mask is held by
    what is known. It is the same for all channels.

    Args:
        mask: values in [0, 1], 1 for new pixels; sides are multiples of 16.
        config: the model's configuration.

    Returns:
        Values in [0, 1], 1 for new latents; a NumPy array if `mask` is one. n = h w / 256 and
        d = 64.

    Raises:
        ValueError, TypeError: a side is no multiple of 16, so that the mask cannot be reshaped (by
            NumPy, by JAX).
    """
    b, h, w = mask.shape
    side, channels = config.pixels_per_token // PATCH, config.transformer.out_channels
    blocks = mask.reshape(b, h // side, side, w // side, side).max(axis=(2, 4))
    rows, columns = blocks.shape[1] // PATCH, blocks.shape[2] // PATCH
    patches = blocks.reshape(b, rows, PATCH, columns, PATCH).swapaxes(2, 3)
    # The channels of a token are (latent channel, row in patch, column in patch).
    one_channel = patches.reshape(b, rows * columns, 1, PATCH**2)
    numpy = np if isinstance(mask, np.ndarray) else jnp
    shape = (b, rows * columns, channels // PATCH**2, PATCH**2)
    return numpy.broadcast_to(one_channel, shape).reshape(b, rows * columns, channels)


def inpaint_anchors(
    mask: Float[Array, "b n d"] | Float[np.ndarray, "b n d"],
    *,
    plan: str | Plan,
    grid: Grid,
    key: Array | None = None,
) -> Int[Array, "b k"] | None:
    """Draw the anchors with which `denoise` inpaints, unless they are given.

    They are the tokens with any mask, all tokens that touch those, and of the others the share
    `plan.context_density`, by the plan's layout of first anchors.

    Args:
        mask: the mask of tokens, from `mask_tokens`; its values decide k and must be known. Under
            `jit` that is a NumPy array, or anchors that are drawn outside.
        plan: a `Plan`, or a name in `PLANS`.
        grid: rows and columns of tokens.
        key: one `jax.random` key, or one per sample; that of `denoise` gives the anchors that it
            would draw. Not needed if all tokens are anchors.

    Returns:
        Token indices in ascending order, then n in unused slots, since a smaller mask needs fewer;
        None if all tokens are anchors.

    Raises:
        ValueError: the mask is traced or does not fit the grid, the plan is unknown, or there is
            no key although one is needed.
    """
    from jitjax.sampler.known import anchor_counts, draw_known_anchors, needed_tokens

    plan, grid = get_plan(plan), as_grid(grid)
    values = concrete(mask)
    if values is None:
        raise ValueError("mask is traced; expected known values, which decide how many anchors")
    b, n, _ = values.shape
    if n != grid[0] * grid[1]:
        raise ValueError(f"mask has {n} tokens; expected {grid[0]} x {grid[1]}")
    needed = needed_tokens(values, grid)
    counts = anchor_counts(needed, plan)
    if counts.min() == n:
        return None
    if key is None:
        raise ValueError("key is None; expected a key, which inpainting needs for first_anchors")
    return draw_known_anchors(needed, counts, plan, grid, split(batch_keys(key, b))[0])


@jax.jit
def composite(
    mask: Float[Array, "b h w"], new: Float[Array, "b h w c"], given: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Return new pixels where the mask is 1, given ones where it is 0, and mixtures between.

    Args:
        mask: values in [0, 1].
        new, given: pictures.
    """
    weight = mask[..., None].astype(new.dtype)
    return weight * new + (1 - weight) * given.astype(new.dtype)
