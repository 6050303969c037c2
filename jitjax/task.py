"""What `sample` makes pictures from besides prompts: its keyword arguments `**task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.control import check_pictures
from jitjax.denoise import plan_at_strength
from jitjax.encode import check_images, encode
from jitjax.fill import masked_pictures
from jitjax.latents import token_grid
from jitjax.masks import check_mask, inpaint_anchors, is_all_new, mask_tokens
from jitjax.negative import TokenIds
from jitjax.sampler.checks import concrete
from jitjax.sampler.entry import check_strength
from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan
from jitjax.text import Conditioning, encode_tokens

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
            but all of it if the mask is traced. FLUX.1 Fill needs it, sees all of `image` outside
            the mask, rounded to 0 and 1, and runs as without a mask.
        control: control pictures (edges, depth, ...), one per prompt or one for all, for models
            that take them: FLUX.1 Canny and Depth. Their size is that of the result.
        reference: pictures to edit, one per prompt or one for all, for FLUX.1 Kontext. They may
            have another size than the result, whose size is theirs if nothing else gives it.
        negative_prompt: what the pictures are not to show: strings or a `Conditioning`, one for all
            prompts or one per prompt; the empty prompt if only `true_guidance` is given. The
            transformer then runs twice per step (true classifier-free guidance).
        true_guidance: how far to move away from `negative_prompt`, finite and 1 or more; one number
            or one per picture, 2 by default. If all are known to be 1, the transformer runs once,
            and `negative_prompt` does not matter. It is diffusers' `true_cfg_scale`.
    """

    image: Pictures | None
    strength: float | None
    mask: Masks | None
    control: Pictures | None
    reference: Pictures | None
    negative_prompt: str | Sequence[str] | Conditioning | None
    true_guidance: float | Float[Array, ""] | Float[Array, " b"] | None


class TaskInputs(NamedTuple):
    """The arrays of a task, [b, ...] each; None for what it does not have.

    Attributes:
        clean: pictures to start from, or their clean tokens.
        image: pictures of which the result keeps a part.
        mask: pixels of them that are new, [b, height, width].
        anchors: tokens that the network sees; None for all.
        control: pictures for the further channels of the tokens, or their clean tokens.
        reference: reference pictures, or their clean tokens.
        negative: negative prompts, encoded or as token ids.
        true_guidance: how far to move away from them.
    """

    clean: Array | np.ndarray | None = None
    image: Array | np.ndarray | None = None
    mask: Array | np.ndarray | None = None
    anchors: Array | None = None
    control: Array | np.ndarray | None = None
    reference: Array | np.ndarray | None = None
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
    check_pictures(task.keys(), config.transformer)
    if "image" in task:
        default = INPAINTING_STRENGTH if "mask" in task else DEFAULT_STRENGTH
        task["strength"] = check_strength(task.get("strength", default))
    elif "mask" in task:
        raise ValueError("mask is given, but image is None; expected both or neither")
    elif "strength" in task:
        raise ValueError(
            f"strength is {task['strength']!r}, but image is None; expected both or neither"
        )
    for name in ("image", "control", "reference"):
        if name in task:
            check_images(name, task[name], config)
    if "mask" in task:
        task["mask"] = check_mask(task["mask"], task["image"].shape[1:3])
    size = {"height": height, "width": width}
    source = ""
    for name in ("image", "control"):
        if name not in task:
            continue
        for side, expected in zip(size, task[name].shape[1:3], strict=True):
            if size[side] not in (None, expected):
                raise ValueError(
                    f"{source}{side} is {size[side]!r}; expected {expected}, that of {name}, "
                    "or None"
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
    for name in ("image", "control", "reference", "mask"):
        if name in task:
            check_batch(name, task[name], batch)
    inputs = TaskInputs(control=task.get("control"), reference=task.get("reference"))
    image, mask = task.get("image"), task.get("mask")
    if image is None:
        return plan, inputs
    plan = plan_at_strength(plan, task["strength"], grid=grid, config=config)
    # At strength 1 it is plain sampling.
    clean = None if task["strength"] == 1 else image
    if config.transformer.control == "fill":
        control = masked_pictures(image, mask)
        return plan, inputs._replace(clean=clean, image=image, mask=mask, control=control)
    if mask is not None and not is_all_new(mask):
        return plan, inputs._replace(clean=image, image=image, mask=mask)
    return plan, inputs._replace(clean=clean)


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

    A picture or negative prompt for all prompts is encoded here, once, instead of in every chunk.
    """
    if isinstance(inputs.negative, tuple) and inputs.negative[0].shape[0] != batch:
        inputs = inputs._replace(negative=encode_tokens(params, *inputs.negative))

    def repeat(array: Any) -> Any:
        # Known values stay known, also inside transformations.
        numpy = np if isinstance(array, np.ndarray) else jnp
        return numpy.broadcast_to(array, (batch, *array.shape[1:]))

    for name in ("clean", "control", "reference"):
        pictures = getattr(inputs, name)
        if pictures is not None and pictures.shape[0] != batch:
            inputs = inputs._replace(**{name: as_tokens(params, pictures)})
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
    is_fill = config.transformer.control == "fill"  # it runs as without a mask
    if inputs.mask is None or is_fill or concrete(inputs.mask) is None:
        return inputs
    mask = mask_tokens(inputs.mask, config)
    return inputs._replace(anchors=inpaint_anchors(mask, plan=plan, grid=grid, key=keys))


def as_tokens(params: FluxParams, pictures: Array | np.ndarray | None) -> Array | None:
    """Encode pictures, unless they are clean tokens already, or None."""
    if pictures is None or pictures.ndim == 3:
        return pictures  # type: ignore[return-value]
    return encode(params, pictures)
