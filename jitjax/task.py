"""What `sample` makes pictures from besides prompts: its keyword arguments `**task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.control import check_pictures
from jitjax.denoise import plan_at_strength
from jitjax.encode import check_images, encode
from jitjax.latents import token_grid
from jitjax.sampler.entry import check_strength
from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan

DEFAULT_STRENGTH = 0.6
"""The strength of image to image; that of diffusers' pipeline."""

Pictures = Float[Array, "_ h w 3"] | Float[np.ndarray, "_ h w 3"]
"""Pictures [b or 1, height, width, 3], floating point numbers in [0, 1]; see `encode`."""


class Task(TypedDict, total=False):
    """The pictures, and what belongs to them, that `sample` takes besides prompts.

    Each is a keyword argument of `sample`, and None if it is left out.

    Attributes:
        image: pictures to start from, one per prompt or one for all. The autoencoder's mean is
            taken. Their size is that of the result.
        strength: how far from `image` the result may be, in (0, 1]; 0.6 by default. That share of
            the plan's steps is run, from the picture with noise of the first of them; see
            `plan_at_strength`. At 1 the picture does not matter.
        control: control pictures (edges, depth, ...), one per prompt or one for all, for models
            that take them: FLUX.1 Canny and Depth. Their size is that of the result.
        reference: pictures to edit, one per prompt or one for all, for FLUX.1 Kontext. They may
            have another size than the result, whose size is theirs if nothing else gives it.
    """

    image: Pictures | None
    strength: float | None
    control: Pictures | None
    reference: Pictures | None


class TaskInputs(NamedTuple):
    """The arrays of a task, [b, ...] each; None for what it does not have.

    Attributes:
        clean: pictures to start from, or their clean tokens.
        control: control pictures, or their clean tokens.
        reference: reference pictures, or their clean tokens.
    """

    clean: Array | np.ndarray | None = None
    control: Array | np.ndarray | None = None
    reference: Array | np.ndarray | None = None


def check_task(
    arguments: Mapping[str, Any], height: int | None, width: int | None, config: FluxConfig
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Check a task before the batch is known.

    Args:
        arguments: the fields of `Task` by name.
        height, width: the size asked for, if any.
        config: the model's configuration.

    Returns:
        The task without what is None and with the defaults, and the height and width of the
        result.

    Raises:
        ValueError, TypeError: as `sample`.
    """
    unknown = sorted(arguments.keys() - Task.__annotations__.keys())
    if unknown:
        raise TypeError(f"sample got an unexpected keyword argument {unknown[0]!r}")
    task = {name: value for name, value in arguments.items() if value is not None}
    check_pictures(task.keys(), config.transformer)
    if "image" in task:
        task["strength"] = check_strength(task.get("strength", DEFAULT_STRENGTH))
    elif "strength" in task:
        raise ValueError(
            f"strength is {task['strength']!r}, but image is None; expected both or neither"
        )
    for name in ("image", "control", "reference"):
        if name in task:
            check_images(name, task[name], config)
    size = {"height": height, "width": width}
    source = ""
    for name in ("image", "control"):
        if name not in task:
            continue
        for side, expected in zip(size, task[name].shape[1:3], strict=True):
            if size[side] not in (None, expected):
                raise ValueError(
                    f"{source}{side} is {size[side]!r}; expected {expected}, that of {name}, or None"
                )
            size[side] = expected
        source = f"{name}'s "
    default = task["reference"].shape[1:3] if "reference" in task else [config.image_size] * 2
    height, width = (
        expected if given is None else given
        for given, expected in zip(size.values(), default, strict=True)
    )
    return task, (height, width)


def plan_and_inputs(
    task: Mapping[str, Any], plan: Plan, grid: Grid, batch: int, config: FluxConfig
) -> tuple[Plan, TaskInputs]:
    """Return the plan that a task runs, and its arrays, whose batch may still be 1.

    Args:
        task: from `check_task`.
        plan: the plan asked for.
        grid: rows and columns of tokens.
        batch: number of pictures to make.
        config: the model's configuration.

    Raises:
        ValueError: the batch of an array is another.
    """
    pictures = {name: task.get(name) for name in ("image", "control", "reference")}
    for name, array in pictures.items():
        if array is not None:
            check_batch(name, array, batch)
    clean = pictures.pop("image")
    if clean is not None:
        plan = plan_at_strength(plan, task["strength"], grid=grid, config=config)
        if task["strength"] == 1:  # it is plain sampling
            clean = None
    return plan, TaskInputs(clean, **pictures)


def reference_grid(task: Mapping[str, Any], config: FluxConfig) -> Grid | None:
    """Return the token grid of a checked task's reference; None without one."""
    if "reference" not in task:
        return None
    height, width = task["reference"].shape[1:3]
    return token_grid(height, width, config)


def check_batch(name: str, array: Any, batch: int) -> None:
    """Raise `ValueError` unless an array is one for all prompts, or one for each."""
    if array.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} has shape {list(array.shape)}; expected a batch of 1 or {batch}, one per "
            "prompt"
        )


def with_batch(params: FluxParams, inputs: TaskInputs, batch: int) -> TaskInputs:
    """Return arrays with the batch as their first axis.

    A picture for all prompts is encoded here, once, instead of in every chunk.
    """

    def repeat(array: Any) -> Any:
        if array.shape[0] == batch:
            return array
        array = encode(params, array) if array.ndim == 4 else array
        return jnp.broadcast_to(array, (batch, *array.shape[1:]))

    return jax.tree.map(repeat, inputs)


def as_tokens(params: FluxParams, pictures: Array | np.ndarray | None) -> Array | None:
    """Encode pictures, unless they are clean tokens already, or None."""
    if pictures is None or pictures.ndim == 3:
        return pictures  # type: ignore[return-value]
    return encode(params, pictures)
