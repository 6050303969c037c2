"""`sample`, which encodes the prompt, denoises and decodes; and `decode`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from jitjax.checkpoint import TEXT_ENCODERS, FluxParams
from jitjax.config import AutoencoderConfig
from jitjax.denoise import batch_keys, check_guidance, denoise
from jitjax.fill import with_mask
from jitjax.latents import draw_noise, token_grid, unpack
from jitjax.masks import composite, mask_tokens
from jitjax.memory.check import check_fits
from jitjax.models.attention import check_implementation
from jitjax.models.partitioning import over_batch
from jitjax.models.quantised import float_dtype
from jitjax.negative import TokenIds, encode_both, negative_inputs
from jitjax.offload import with_parts_on_device
from jitjax.processes import check_same_call, on_every_process
from jitjax.sampler.checks import check_finite
from jitjax.sampler.grid import Grid, as_grid, as_integer
from jitjax.sampler.keys import split
from jitjax.sampler.meshes import with_auto_axes
from jitjax.sampler.plan import DEFAULT_PLAN, Plan, get_plan
from jitjax.sampler.progress import StepReports
from jitjax.task import (
    Task,
    TaskInputs,
    as_tokens,
    check_task,
    plan_and_inputs,
    reference_grid,
    with_anchors,
    with_batch,
)
from jitjax.text import Conditioning, as_prompts, check_params, tokenize

if TYPE_CHECKING:
    from jitjax.sampler.trace import Trace

Images = Float[Array, "b height width 3"] | Float[np.ndarray, "b height width 3"]


class Options(Task, total=False):
    """The other keyword arguments of `sample`, for its types."""

    height: int | None
    width: int | None
    plan: str | Plan
    guidance: float | Float[Array, ""] | Float[Array, " b"]
    attention: str
    progress: bool | Callable[[int], Any]
    chunk: int | None


Prompts = str | Sequence[str] | Conditioning


@overload
def sample(
    params: FluxParams,
    prompt: Prompts,
    *,
    key: Array,
    trace: Literal[False] = False,
    **options: Unpack[Options],
) -> Images: ...
@overload
def sample(
    params: FluxParams,
    prompt: Prompts,
    *,
    key: Array,
    trace: Literal[True],
    **options: Unpack[Options],
) -> tuple[Images, Trace]: ...
@overload
def sample(
    params: FluxParams, prompt: Prompts, *, key: Array, trace: bool, **options: Unpack[Options]
) -> Images | tuple[Images, Trace]: ...
@with_auto_axes("prompt", "key", "task")
def sample(
    params: FluxParams,
    prompt: Prompts,
    *,
    key: Array,
    height: int | None = None,
    width: int | None = None,
    plan: str | Plan = DEFAULT_PLAN,
    guidance: float | Float[Array, ""] | Float[Array, " b"] = 3.5,
    attention: str = "auto",
    progress: bool | Callable[[int], Any] = False,
    chunk: int | None = None,
    trace: bool = False,
    **task: Unpack[Task],
) -> Images | tuple[Images, Trace]:
    """Generate images from prompts, or from prompts and pictures (`Task`).

    Args:
        params: parameters, from `load`. If they are in host memory (`load(path, low_memory=True)`),
            each model is on its device only while it runs.
        prompt: a string, a sequence of strings for one image each, or a `Conditioning`.
        key: one `jax.random` key for the batch, from which `batch_keys` derives one per image, or
            one key per image. The same key gives the same image in any batch, up to rounding:
            programs of other batch sizes round differently, by 1e-5 of the range in float32.
        height, width: size in pixels, multiples of 16 from 16 to 8192; by default that of `image`,
            `control` or `reference`, or `params.config.image_size`.
        plan: a name in `PLANS`, such as "multistep-12", "4x" or "dense", or a `Plan`.
        guidance: guidance scale, one number or one per image; larger values follow the prompt
            more closely. Any finite number from -3.4e35 to 3.4e35 is taken (beyond them its
            embedding overflows). Of use are those that a model was trained with: 2 to 4 for `tiny`;
            diffusers' examples have 3.5 for FLUX.1-dev, 2.5 for Kontext, 10 for Depth, 30 for Canny
            and Fill. Models without guidance embeddings (FLUX.1-schnell) ignore it.
        attention: how the transformer computes attention: "auto" (the fastest on the platform),
            "xla", "cudnn" or "pallas"; see `jitjax.models.attention`.
        progress: show a progress bar of the steps on standard error; or a callback, called with 1
            for every finished step.
        chunk: most images to make at once, for any number of prompts: text is encoded, denoised and
            decoded for one chunk after another, so that the device's memory is that of one. Chunks
            have one length; the last is padded by repetition. By default all images are made at
            once. The images are the same, up to the rounding of the batch size.
        trace: return a `Trace` of all images, too: every state of the tokens, the anchors and what
            they were chosen by, as from `denoise(..., trace=True)`. Not with more images than
            `chunk`.
        **task: pictures that the result is made from, and negative prompts: the fields of `Task`,
            `image`, `strength`, `mask`, `control`, `reference`, `negative_prompt` and
            `true_guidance`.

    Returns:
        Images, float32 [b, height, width, 3] in [0, 1]. Values that are not finite are NaN. With
        more images than `chunk` they are a NumPy array, in the host's memory; but under `jit` and
        other transformations a JAX array, because there nothing can leave the device.
        With parameters on a mesh (`load(mesh=...)`) they are divided over its batch axes if these
        divide the batch; if the mesh spans processes, every process has all images.
        With `trace`, a tuple of the images, which are the same, and the `Trace`, on the device.

    Raises:
        ValueError: the plan or `attention` is unknown, the height or width is not supported, there
            are no prompts, the guidance or the conditioning is not finite, the key or the
            conditioning does not fit, `chunk` is not a positive integer, or less than the images
            with `trace`, `params` has no parameters for a model that is needed, the batch (or
            chunk) cannot fit the device, a picture does not fit the batch, the height and width or
            `encode`, `strength` is outside (0, 1] or given without `image`, a mask does not fit
            `image`, is 0 everywhere, or has values outside [0, 1], the model needs pictures that
            are not given, or the reverse, or the negative prompts or `true_guidance` do not fit.
            Raised before any model runs, except for a conditioning that the text encoders made.
        TypeError: an argument has another type, for example a prompt that is not a string.
        FileNotFoundError: a tokenizer is missing.
    """
    check_params(params)
    config = params.config
    plan = get_plan(plan)
    check_implementation(attention)
    given, (height, width) = check_task(task, height, width, config)
    grid = token_grid(height, width, config)
    if isinstance(prompt, Conditioning):
        prompt.check(config)
        prompts, batch = [], prompt.text.shape[0]
    else:
        prompts = as_prompts(prompt)
        batch = len(prompts)
    for part in ("transformer", "autoencoder", *(TEXT_ENCODERS if prompts else ())):
        params.part(part)
    if batch == 0:
        raise ValueError("the conditioning has batch size 0; expected 1 or more")
    plan, inputs = plan_and_inputs(given, plan, grid, batch, config)
    text_tokens = prompt.text.shape[1] if isinstance(prompt, Conditioning) else config.text_length
    negative, scale = negative_inputs(given, params, batch, text_tokens)
    inputs = inputs._replace(negative=negative, true_guidance=scale)
    if chunk is not None and ((size := as_integer(chunk)) is None or size < 1):
        raise ValueError(f"chunk is {chunk!r}; expected a positive integer, or None")
    chunks = 1 if chunk is None else -(-batch // int(chunk))
    if trace and chunks > 1:
        raise ValueError(
            f"trace is for images that are made at once, but chunk is {chunk!r}; expected None, or "
            f"{batch} or more"
        )
    chunk = -(-batch // chunks)
    guidance = check_guidance(guidance, batch)
    check_same_call(
        params,
        prompt=prompt,
        key=key,
        plan=plan,
        height=height,
        width=width,
        guidance=guidance,
        task=inputs,
        chunk=chunk,
    )
    check_fits(
        params,
        grid,
        chunk,
        plan,
        encode=bool(prompts) or isinstance(negative, tuple),
        image=inputs.clean is not None,
        negative=negative is not None,
    )
    keys = batch_keys(key, batch)
    if isinstance(prompt, Conditioning):
        text = prompt
        if chunks > 1:  # else `denoise` finds it before it computes anything
            check_finite("Conditioning.text", prompt.text)
            check_finite("Conditioning.pooled", prompt.pooled)
    else:
        text = tokenize(params.tokenizer, prompts, config)
    inputs = with_batch(params, inputs, batch)
    if inputs.mask is not None:
        inputs = with_anchors(inputs, plan, grid, split(keys)[1], config)
    rows = _Rows(text, keys, guidance, inputs)
    # Of several processes all run the steps one by one, and the first one shows them.
    hidden = progress is not True or sys.stderr is None or jax.process_index() > 0
    with tqdm(total=chunks * plan.steps, unit="step", disable=hidden) as bar:
        reports = StepReports(progress if callable(progress) else bar.update)
        make = partial(
            _make_batch,
            params,
            plan=plan,
            grid=grid,
            reference_grid=reference_grid(given, config),
            attention=attention,
            reports=reports if progress else None,
        )
        if chunks == 1:
            images, record = make(rows, trace=trace)
            return images if record is None else (images, record)
        indices = np.minimum(np.arange(chunks * chunk), batch - 1).reshape(chunks, chunk)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, rows))):
            images, _ = jax.lax.map(make, jax.tree.map(lambda leaf: leaf[indices], rows))
            return images.reshape(chunks * chunk, *images.shape[2:])[:batch]
        images = np.empty((batch, height, width, 3), np.float32)
        for start, chosen in zip(range(0, batch, chunk), indices, strict=True):
            made, _ = make(jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], rows))
            images[start : start + chunk] = np.asarray(made)[: batch - start]
    return images


class _Rows(NamedTuple):
    """What images are made from: one row of every array for each image.

    Attributes:
        text: a conditioning, or the token ids of T5 and CLIP.
        keys: their keys.
        guidance: their guidance.
        task: the arrays of the task.
    """

    text: Conditioning | TokenIds
    keys: Key[Array, " b"]
    guidance: Array
    task: TaskInputs


def _make_batch(
    params: FluxParams,
    rows: _Rows,
    *,
    plan: Plan,
    grid: Grid,
    reference_grid: Grid | None,
    attention: str,
    reports: StepReports | None,
    trace: bool = False,
) -> tuple[Float[Array, "b height width 3"], Trace | None]:
    """Make images; return them, and the record of the run if `trace`."""
    text, keys, guidance, task = rows
    noise, denoise_keys = _start(grid, params.config.transformer.out_channels, keys)
    conditioning, negative = encode_both(params, text, task.negative)
    mask, control = None, as_tokens(params, task.control)
    if params.config.transformer.control == "fill":
        assert control is not None
        control = with_mask(control, task.mask, params.config)
    elif task.mask is not None:
        mask = mask_tokens(task.mask, params.config)
    denoised = denoise(
        params,
        conditioning,
        noise,
        plan=plan,
        grid=grid,
        guidance=guidance,
        key=denoise_keys,
        clean=as_tokens(params, task.clean),
        mask=mask,
        first_anchors=task.anchors,
        control=control,
        reference=as_tokens(params, task.reference),
        reference_grid=reference_grid,
        negative=negative,
        true_guidance=task.true_guidance,
        attention=attention,
        progress=reports,
        trace=trace,
    )
    tokens, record = denoised if isinstance(denoised, tuple) else (denoised, None)
    # Before the last steps are finished, so that they run while Python traces the decoder.
    images = decode(params, tokens, grid=grid)
    if task.mask is not None:
        images = composite(task.mask, images, task.image)
    if reports is not None:
        reports.finish()
    return images, record


@partial(jax.jit, static_argnums=(0, 1))
def _start(
    grid: Grid, channels: int, keys: Key[Array, " b"]
) -> tuple[Float[Array, "b n d"], Key[Array, " b"]]:
    """Draw the noise; return it, and the keys of all other draws."""
    noise_keys, denoise_keys = split(keys)
    return draw_noise(noise_keys, grid, channels), denoise_keys


@with_parts_on_device("autoencoder")
@with_auto_axes("tokens")
def decode(
    params: FluxParams, tokens: Float[Array, "b n d"], *, grid: Grid
) -> Float[Array, "b height width 3"]:
    """Decode clean tokens to images with the autoencoder.

    Args:
        params: parameters; only the autoencoder's are used.
        tokens: [b, n, d] clean tokens, from `denoise`.
        grid: rows and columns of tokens; n is their product.

    Returns:
        Images, float32 [b, height, width, 3] in [0, 1]; 16 pixels per token and side. Values that
        are not finite are NaN.

    Raises:
        ValueError: `grid` is not two positive integers, the shape of `tokens` does not fit, or
            `params` has no autoencoder.
        TypeError: `params` are no parameters, or `tokens` is no array.
    """
    check_params(params)
    if not isinstance(tokens, (jax.Array, np.ndarray)):
        raise TypeError(f"tokens is {type(tokens).__name__}; expected an array, from denoise")
    grid = as_grid(grid)
    expected = (grid[0] * grid[1], params.config.transformer.out_channels)
    if tokens.ndim != 3 or tokens.shape[1:] != expected:
        raise ValueError(
            f"tokens has shape {list(tokens.shape)}; expected [batch, {expected[0]}, "
            f"{expected[1]}] for a grid of {grid[0]} x {grid[1]} tokens"
        )
    images = _decode(params.config.autoencoder, grid, params.part("autoencoder"), tokens)
    return on_every_process(images)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(config: AutoencoderConfig, grid: Grid, params: dict, tokens: Array) -> Array:
    from jitjax.models.autoencoder import from_latents
    from jitjax.models.strips import decode_latents

    latents = from_latents(unpack(over_batch(tokens), grid), config)
    images = decode_latents(config, params, latents, float_dtype(params))
    images = images.astype(jnp.float32)
    # Clipped, an infinity would be a white or black pixel that nobody notices.
    return jnp.where(jnp.isfinite(images), jnp.clip(images / 2 + 0.5, 0, 1), jnp.nan)
