"""What `sample` makes pictures from besides prompts: its keyword arguments `**task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.denoise import plan_at_strength
from jitjax.encode import check_images, encode
from jitjax.masks import check_mask, inpaint_anchors, is_all_new, mask_tokens
from jitjax.sampler.checks import concrete
from jitjax.sampler.entry import check_strength
from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan

DEFAULT_STRENGTH = 0.6
"""The strength of image to image; that of diffusers' pipeline."""

INPAINTING_STRENGTH = 1.0
"""The strength with a mask: what is inside it is new, and owes nothing to the given picture."""

Pictures = Float[Array, "_ h w 3"] | Float[np.ndarray, "_ h w 3"]
"""Pictures [b or 1, height, width, 3], floating point numbers in [0, 1]; see `encode`."""

Masks = (
    Bool[Array, "_ h w *_"]
    | Bool[np.ndarray, "_ h w *_"]
    | Float[Array, "_ h w *_"]
    | Float[np.ndarray, "_ h w *_"]
)
"""Masks [b or 1, height, width], or with a last axis of 1: booleans, or numbers in [0, 1]."""


class Task(TypedDict, total=False):
    """The pictures, and what belongs to them, that `sample` takes besides prompts.

    Each is a keyword argument of `sample`, and None if it is left out.

    Attributes:
        image: pictures to start from, one per prompt or one for all. The autoencoder's mean is
            taken. Their size is that of the result.
        strength: how far from `image` the result may be, in (0, 1]; 0.6 by default, with `mask` 1.
            That share of the plan's steps is run, from the picture with noise of the first of them;
            see `plan_at_strength`. At 1 the picture (with `mask`, what is inside) does not matter.
        mask: where pictures are new (inpainting), one for each or one for all: 1 for new pixels,
            0 for those that stay as they are in `image`, and mixtures between, for soft edges
            through which gradients flow. [b or 1, height, width], also [..., 1], floating point
            numbers in [0, 1] or booleans. The result is mask * new + (1 - mask) * image. The
            network sees only the mask, its surroundings and the share `Plan.context` of all else;
            but all of it if the mask is traced.
    """

    image: Pictures | None
    strength: float | None
    mask: Masks | None


class TaskInputs(NamedTuple):
    """The arrays of a task, [b, ...] each; None for what it does not have.

    Attributes:
        clean: pictures to start from, or their clean tokens.
        image: pictures of which the result keeps a part.
        mask: pixels of them that are new, [b, height, width].
        anchors: tokens that the network sees; None for all.
    """

    clean: Array | np.ndarray | None = None
    image: Array | np.ndarray | None = None
    mask: Array | np.ndarray | None = None
    anchors: Array | None = None


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
    if "image" in task:
        default = INPAINTING_STRENGTH if "mask" in task else DEFAULT_STRENGTH
        task["strength"] = check_strength(task.get("strength", default))
        check_images("image", task["image"], config)
        size = task["image"].shape[1:3]
        for name, given, side in zip(("height", "width"), (height, width), size, strict=True):
            if given is not None and given != side:
                raise ValueError(f"{name} is {given!r}; expected {side}, that of image, or None")
        height, width = size
        if "mask" in task:
            task["mask"] = check_mask(task["mask"], size)
    elif "mask" in task:
        raise ValueError("mask is given, but image is None; expected both or neither")
    elif "strength" in task:
        raise ValueError(
            f"strength is {task['strength']!r}, but image is None; expected both or neither"
        )
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
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
    image = task.get("image")
    if image is None:
        return plan, TaskInputs()
    check_batch("image", image, batch)
    strength = task["strength"]
    plan = plan_at_strength(plan, strength, grid=grid, config=config)
    mask = task.get("mask")
    if mask is not None:
        check_batch("mask", mask, batch)
        if not is_all_new(mask):
            return plan, TaskInputs(clean=image, image=image, mask=mask)
    # At strength 1 it is plain sampling.
    return plan, TaskInputs(clean=None if strength == 1 else image)


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
        # Known values stay known, also inside transformations.
        numpy = np if isinstance(array, np.ndarray) else jnp
        return numpy.broadcast_to(array, (batch, *array.shape[1:]))

    if inputs.clean is not None and inputs.clean.shape[0] != batch:
        inputs = inputs._replace(clean=as_tokens(params, inputs.clean))
    return jax.tree.map(repeat, inputs)


def with_anchors(
    inputs: TaskInputs, plan: Plan, grid: Grid, keys: Key[Array, " b"], config: FluxConfig
) -> TaskInputs:
    """Return arrays with the anchors of inpainting, unless the mask is traced.

    They are chosen for all pictures at once, so that all chunks have as many and share programs.

    Args:
        inputs: from `with_batch`.
        plan: the plan that is run.
        grid: rows and columns of tokens.
        keys: the keys of the pictures that `denoise` gets.
        config: the model's configuration.
    """
    if inputs.mask is None or concrete(inputs.mask) is None:
        return inputs
    mask = mask_tokens(inputs.mask, config)
    return inputs._replace(anchors=inpaint_anchors(mask, plan=plan, grid=grid, key=keys))


def as_tokens(params: FluxParams, pictures: Array | np.ndarray | None) -> Array | None:
    """Encode pictures, unless they are clean tokens already, or None."""
    if pictures is None or pictures.ndim == 3:
        return pictures  # type: ignore[return-value]
    return encode(params, pictures)
