"""What the transformer is shown of pictures, beside the noisy tokens: control and reference.

FLUX.1 Canny, Depth   [latents 64 | control picture 64]            further channels of each token
FLUX.1 Fill           [latents 64 | masked picture 64 | mask 256]  further channels of each token
FLUX.1 Kontext        [tokens of the reference, tokens]            further tokens
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from jaxtyping import Array, Float

from jitjax.config import TransformerConfig
from jitjax.models.partitioning import over_batch
from jitjax.sampler.checks import as_array, check_finite
from jitjax.sampler.grid import Grid, as_grid

NEEDED = {"none": (), "picture": ("control",), "fill": ("image", "mask")}
"""Kind of model, `TransformerConfig.control`, to the arguments of `sample` that it needs."""


def describe(config: TransformerConfig) -> str:
    """Return what a model takes besides prompts, for messages."""
    text = {
        "none": "takes no control picture",
        "picture": "takes a control picture, as FLUX.1 Canny and Depth",
        "fill": "takes a masked picture, as FLUX.1 Fill",
    }[config.control]
    return f"the model {text} (in_channels is {config.in_channels})"


def check_pictures(
    given: Collection[str],
    config: TransformerConfig,
    *,
    spell: Callable[[str], str] = lambda name: name,
) -> None:
    """Raise `ValueError` unless a model gets the pictures that it needs, and no others.

    A reference picture is never needed: without one, FLUX.1 Kontext makes pictures of prompts.
    Any model without further channels takes one, since Kontext's weights have the shapes of
    FLUX.1-dev's and most files do not say which they are.

    Args:
        given: names of the arguments of `sample` that are given.
        config: the transformer's configuration.
        spell: returns an argument's name as it stands in messages.
    """
    missing = [name for name in NEEDED[config.control] if name not in given]
    if missing:
        needed = " and ".join(map(spell, NEEDED[config.control]))
        raise ValueError(
            f"{describe(config)}, and there is no {' and no '.join(map(spell, missing))}; "
            f"expected {needed}"
        )
    for name in ("control", "reference"):
        takes = config.control == ("picture" if name == "control" else "none")
        if name in given and not takes:
            raise ValueError(
                f"there is {spell(name)}, but {describe(config)}; expected no {spell(name)}"
            )


def check_control(
    control: Any, batch: int, grid: Grid, config: TransformerConfig
) -> Float[Array, "b rows columns c"] | None:
    """Return the further channels of the tokens on their grid.

    Args:
        control: [batch, tokens, channels], or None.
        batch: number of samples.
        grid: rows and columns of tokens.
        config: the transformer's configuration.

    Raises:
        ValueError: the model needs them and they are None, or the reverse; their shape is another;
            or a known value is not finite.
    """
    channels, tokens = config.control_channels, grid[0] * grid[1]
    if control is None:
        if channels:
            raise ValueError(
                f"{describe(config)}, and control is None; expected [{batch}, {tokens}, {channels}]"
            )
        return None
    if not channels:
        raise ValueError(f"control is given, but {describe(config)}; expected None")
    control = as_array("control", control)
    if control.shape != (batch, tokens, channels):
        raise ValueError(
            f"control has shape {list(control.shape)}; expected [{batch}, {tokens}, {channels}]"
        )
    check_finite("control", control)
    return over_batch(control.reshape(batch, *grid, channels))


def check_reference(
    reference: Any, grid: Grid | None, own_grid: Grid, batch: int, config: TransformerConfig
) -> Float[Array, "b rows columns d"] | None:
    """Return the tokens of a reference picture on its grid.

    Args:
        reference: [batch, rows * columns, out_channels], or None.
        grid: its rows and columns; None for `own_grid`.
        own_grid: rows and columns of the picture to make.
        batch: number of samples.
        config: the transformer's configuration.

    Raises:
        ValueError: there is a grid without a reference, the model takes no reference, the shape
            does not fit, or a known value is not finite.
    """
    if reference is None:
        if grid is not None:
            raise ValueError(f"reference_grid is {grid!r}, but reference is None; expected both")
        return None
    if config.control_channels:
        raise ValueError(f"reference is given, but {describe(config)}; expected None")
    rows, columns = own_grid if grid is None else as_grid(grid)
    reference = as_array("reference", reference)
    expected = (batch, rows * columns, config.out_channels)
    if reference.shape != expected:
        hint = "" if grid is not None else " (pass `reference_grid` if its size is another)"
        raise ValueError(
            f"reference has shape {list(reference.shape)}; expected {list(expected)} for a grid of "
            f"{rows} x {columns} tokens{hint}"
        )
    check_finite("reference", reference)
    return over_batch(reference.reshape(batch, rows, columns, config.out_channels))
