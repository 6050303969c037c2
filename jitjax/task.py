"""What `sample` makes pictures from besides prompts: its keyword arguments `**task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.denoise import plan_at_strength
from jitjax.encode import check_images, encode
from jitjax.negative import TokenIds
from jitjax.sampler.entry import check_strength
from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan
from jitjax.text import Conditioning, encode_tokens

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
        negative_prompt: what the pictures are not to show: strings or a `Conditioning`, one for all
            prompts or one per prompt; the empty prompt if only `true_guidance` is given. The
            transformer then runs twice per step (true classifier-free guidance).
        true_guidance: how far to move away from `negative_prompt`, 1 or more; one number or one per
            picture, 2 by default. If all are known to be 1, the transformer runs once, and
            `negative_prompt` does not matter. It is diffusers' `true_cfg_scale`.
    """

    image: Pictures | None
    strength: float | None
    negative_prompt: str | Sequence[str] | Conditioning | None
    true_guidance: float | Float[Array, ""] | Float[Array, " b"] | None


class TaskInputs(NamedTuple):
    """The arrays of a task, [b, ...] each; None for what it does not have.

    Attributes:
        clean: pictures to start from, or their clean tokens.
        negative: negative prompts, encoded or as token ids.
        true_guidance: how far to move away from them.
    """

    clean: Array | np.ndarray | None = None
    negative: Conditioning | TokenIds | None = None
    true_guidance: Array | None = None


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
        task["strength"] = check_strength(task.get("strength", DEFAULT_STRENGTH))
        check_images("image", task["image"], config)
        size = task["image"].shape[1:3]
        for name, given, side in zip(("height", "width"), (height, width), size, strict=True):
            if given is not None and given != side:
                raise ValueError(f"{name} is {given!r}; expected {side}, that of image, or None")
        height, width = size
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

    A picture or negative prompt for all prompts is encoded here, once, instead of in every chunk.
    """
    if isinstance(inputs.negative, tuple) and inputs.negative[0].shape[0] != batch:
        inputs = inputs._replace(negative=encode_tokens(params, *inputs.negative))

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
