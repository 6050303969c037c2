"""`denoise`: the staged solve with the FLUX transformer as the velocity function."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jitjax.checkpoint import FluxParams
from jitjax.config import EMBEDDING_SCALE, FluxConfig
from jitjax.control import check_control, check_reference
from jitjax.latents import draw_noise
from jitjax.masks import inpaint_anchors
from jitjax.models.devices import compiler_options, on_nvidia_gpu
from jitjax.models.partitioning import over_batch
from jitjax.models.quantised import float_dtype
from jitjax.negative import check_negative
from jitjax.offload import with_parts_on_device
from jitjax.sampler.checks import as_array, concrete
from jitjax.sampler.checks import check_finite as check_finite_array
from jitjax.sampler.entry import enter_plan
from jitjax.sampler.grid import Grid, as_grid
from jitjax.sampler.keys import batch_keys, fold_in, split, uniform
from jitjax.sampler.meshes import with_auto_axes
from jitjax.sampler.plan import DEFAULT_PLAN, Plan, get_plan
from jitjax.sampler.progress import StepReports
from jitjax.sampler.schedule import Shift, plan_sigmas
from jitjax.text import Conditioning
from jitjax.velocity import FluxVelocity, VelocityInputs

if TYPE_CHECKING:
    import diffrax

    from jitjax.sampler.trace import Trace

NVIDIA_TOKENS = 8
"""On NVIDIA GPUs, `denoise` pads the tokens of a 16-bit transformer to a multiple of this number.

XLA would pad the operands of every matrix product to it, which takes longer.
"""


def flux_sigmas(plan: Plan, tokens: int, config: FluxConfig) -> np.ndarray:
    """Compute the sigmas of a plan with the shift of the model's configuration.

    Args:
        plan: the plan.
        tokens: number of tokens of the grid.
        config: the model's configuration.

    Returns:
        Sigmas at the step boundaries, [plan.steps + 1], float32; the last is 0.
    """
    shift = Shift(
        dynamic=config.dynamic_shift,
        base_shift=config.base_shift,
        max_shift=config.max_shift,
        base_seq=config.base_seq,
        max_seq=config.max_seq,
        shift=config.shift,
    )
    return plan_sigmas(plan, tokens, shift)


def plan_at_strength(plan: str | Plan, strength: float, *, grid: Grid, config: FluxConfig) -> Plan:
    """Return the part of a plan that image to image runs at a strength.

    The first steps are dropped, and with them the stages that end before the first step kept.
    The schedule of the result is the list of the sigmas left, so its first sigma is below 1.

    Args:
        plan: a `Plan`, or a name in `PLANS`.
        strength: share of the steps to keep, in (0, 1]; 1 returns the plan unchanged.
        grid: rows and columns of tokens.
        config: the model's configuration.

    Returns:
        A plan of `steps - int(steps - steps * strength)` steps, at least one. Its stages are those
        in which a step is left, with their densities; its schedule is a tuple of sigmas; `context`
        is that of the whole plan. Every other field is the same.

    Source: `FluxImg2ImgPipeline.get_timesteps` of diffusers 0.42, for plans of one stage.

    Examples:
        >>> plan = jitjax.plan_at_strength("4x", 0.5, grid=(64, 64), config=jitjax.FluxConfig())
        >>> plan.steps, plan.densities, plan.stage_steps
        (9, (0.62, 1.0), (2, 9))

    Raises:
        ValueError: the plan is unknown, or the strength is outside (0, 1].
        TypeError: the strength is no number known outside of transformations.
    """
    plan, grid = get_plan(plan), as_grid(grid)
    return enter_plan(plan, flux_sigmas(plan, grid[0] * grid[1], config), strength)


def plan_for_device(plan: Plan, dtype: DTypeLike) -> Plan:
    """Return the plan with which `denoise` runs: with another `pad_to` on NVIDIA GPUs.

    Args:
        plan: the plan; its `pad_to` is kept unless it is 1.
        dtype: dtype of the transformer.
    """
    if plan.pad_to > 1 or jnp.dtype(dtype).itemsize != 2 or not on_nvidia_gpu():
        return plan
    return plan.replace(pad_to=NVIDIA_TOKENS)


def check_guidance(guidance: Any, batch: int) -> Array:
    """Return the guidance of each sample, float32 [batch].

    Raises:
        ValueError: the shape does not fit, or a known value is not finite or so large that its
            embedding overflows.
    """
    guidance = as_array("guidance", guidance)
    if guidance.shape not in ((), (batch,)) or not jnp.isrealobj(guidance):
        raise ValueError(
            f"guidance has shape {list(guidance.shape)} and dtype {guidance.dtype}; expected real "
            f"numbers, [] or [{batch}]"
        )
    values, largest = concrete(guidance), np.finfo(np.float32).max / EMBEDDING_SCALE
    if values is not None and not (np.abs(values) <= largest).all():
        raise ValueError(
            f"guidance is {values!s}; expected finite values from {-largest:.1e} to {largest:.1e}"
        )
    if values is None:
        return jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (batch,))
    # By NumPy, because every operation of JAX is a program to compile.
    return jnp.asarray(np.broadcast_to(values.astype(np.float32), (batch,)))


@overload
def denoise(*args: Any, trace: Literal[False] = False, **kwargs: Any) -> Array: ...
@overload
def denoise(*args: Any, trace: Literal[True], **kwargs: Any) -> tuple[Array, Trace]: ...
@overload
def denoise(*args: Any, trace: bool, **kwargs: Any) -> Array | tuple[Array, Trace]: ...
@with_parts_on_device("transformer")
@with_auto_axes("noise")
def denoise(
    params: FluxParams,
    conditioning: Conditioning,
    noise: Float[Array, "b n d"],
    *,
    plan: str | Plan = DEFAULT_PLAN,
    grid: Grid | None = None,
    guidance: float | Float[Array, ""] | Float[Array, " b"] = 3.5,
    key: Array | None = None,
    clean: Float[Array, "b n d"] | None = None,
    mask: Float[Array, "b n d"] | Float[np.ndarray, "b n d"] | None = None,
    control: Float[Array, "b n c"] | None = None,
    reference: Float[Array, "b r d"] | None = None,
    reference_grid: Grid | None = None,
    negative: Conditioning | None = None,
    true_guidance: float | Float[Array, ""] | Float[Array, " b"] | None = None,
    microflow_noise: Float[Array, "b n d"] | None = None,
    first_anchors: Int[Array, "b k"] | Int[Array, " k"] | None = None,
    solver: str | diffrax.AbstractSolver | None = None,
    attention: str = "auto",
    progress: Callable[[int], Any] | StepReports | None = None,
    check_finite: bool = False,
    trace: bool = False,
) -> Float[Array, "b n d"] | tuple[Float[Array, "b n d"], Trace]:
    """Integrate from noise to clean tokens with the FLUX transformer.

    The function is pure and composes with all of JAX's transformations as `jit_solve` does, unless
    `progress` or `check_finite` is set. The choice of anchors is piecewise constant in all inputs,
    so no gradient passes through it.

    Args:
        params: the model's parameters; only those of the transformer are used.
        conditioning: the result of `encode_prompt`, or embeddings computed elsewhere.
        noise: standard normal tokens in row-major order, float32 (or float64); d = 64 is (channel,
            row in patch, column in patch).
        plan: a `Plan`, or a name in `PLANS`. On NVIDIA GPUs with 16-bit parameters, `pad_to` is 8
            unless it is greater than 1.
        grid: rows and columns of tokens; a square by default.
        guidance: guidance strength, one number or one per sample: finite, from -3.4e35 to 3.4e35
            (beyond them the embedding overflows), as for `sample`; ignored by models without a
            guidance embedding.
        key: one `jax.random` key, or one per sample. It draws the first anchors, the micro-flow
            noise and the random scores if the plan needs them and they are not given.
        clean: clean tokens of the pictures to start from, from `encode`: the first state is then
            (1 - sigma) clean + sigma noise, with the plan's first sigma. That of the named plans is
            1, at which `clean` does not matter; `plan_at_strength` returns plans that start lower.
            By default the first state is `noise`.
        mask: for inpainting, 1 where tokens are new, 0 where the result is `clean`, and mixtures
            between, from `jitjax.masks.mask_tokens`. At every sigma the state becomes
            mask state + (1 - mask) ((1 - sigma) clean + sigma noise). The plan's stages do not
            count: all steps run on the anchors of `jitjax.masks.inpaint_anchors`; but if the mask
            is traced, on all tokens unless there are `first_anchors`.
        control: what each token gets as further channels; needed by models with more input
            channels, and taken by no others. The clean tokens of the control picture, from
            `encode`, for FLUX.1 Canny and Depth (c = 64); those of `jitjax.fill.fill_tokens` for
            FLUX.1 Fill (c = 320).
        reference: clean tokens of a reference picture of any size, from `encode`, for FLUX.1
            Kontext. They run beside the anchors in every step, at the positions (1, row, column).
        reference_grid: rows and columns of `reference`; by default those of `grid`.
        negative: encoded negative prompts, one for all samples or one per sample, with as many text
            tokens as `conditioning`. Each step then runs the transformer twice on its anchors, one
            pass after another, and the solve, the lifter, the importance of new anchors and their
            clean prediction use negative + true_guidance * (positive - negative).
        true_guidance: scale of true classifier-free guidance, 1 or more, one number or one per
            sample; 2 by default. If all are known to be 1, the transformer runs once.
        microflow_noise: noise of the micro-flow's targets; overrides `plan.microflow_noise`.
        first_anchors: token indices of the first stage's anchors, for all samples or per sample;
            with `mask`, of all steps, n in unused slots.
        solver: a name or a diffrax solver, as in `Plan.solver`, which is the default.
        attention: how attention is computed: "auto" (the fastest on the platform), "xla", "cudnn"
            or "pallas"; see `jitjax.models.attention`.
        progress: callback, called with 1 for every finished step; or a `StepReports`, which the
            caller finishes.
        check_finite: whether to check the velocity of every step.
        trace: whether to return a `Trace` too.

    Returns:
        Clean tokens for `decode` in the dtype of `noise`; with `trace`, a tuple of the tokens and
        the `Trace`.

    Raises:
        ValueError: the plan or `attention` is unknown; an array is not finite or does not fit the
            model, the plan or another array; or `key` is None although the plan needs it. Raised
            before compilation.
        FloatingPointError: a velocity is not finite (only with `check_finite`).
    """
    # Imported here, because diffrax takes half a second to import.
    from jitjax.sampler.known import Known, check_known
    from jitjax.sampler.solve import jit_solve

    plan = get_plan(plan)
    velocity = FluxVelocity(params.config.transformer, attention)
    config = params.config.transformer
    noise = as_array("noise", noise)
    if noise.ndim != 3 or noise.shape[2] != config.out_channels:
        raise ValueError(
            f"noise has shape {list(noise.shape)}; expected [batch, tokens, {config.out_channels}]"
        )
    b, n, _ = noise.shape
    grid = (math.isqrt(n), math.isqrt(n)) if grid is None else as_grid(grid)
    if grid[0] * grid[1] != n:
        raise ValueError(
            f"noise has {n} tokens; expected {grid[0]} x {grid[1]} (pass `grid` if the image is "
            "not square)"
        )
    noise = over_batch(noise)
    if clean is not None:
        clean_tokens = as_array("clean", clean)
        if clean_tokens.shape != noise.shape:
            raise ValueError(
                f"clean has shape {list(clean_tokens.shape)}; expected that of noise, "
                f"{list(noise.shape)}"
            )
        check_finite_array("clean", clean_tokens)
        clean = over_batch(clean_tokens)
    control = check_control(control, b, grid, config)
    reference = check_reference(reference, reference_grid, grid, b, config)
    conditioning.check(params.config, batch=b)
    check_finite_array("Conditioning.text", conditioning.text)
    check_finite_array("Conditioning.pooled", conditioning.pooled)
    guidance = check_guidance(guidance, b)
    text_tokens = conditioning.text.shape[1]
    negative, scale = check_negative(
        "negative", negative, true_guidance, params.config, b, text_tokens
    )

    known = None
    if mask is not None:
        if clean is None:
            raise ValueError("mask is given, but clean is None; expected both or neither")
        known = check_known(Known(clean, noise, mask), noise.shape, prefix="")

    transformer = params.part("transformer")
    plan = plan_for_device(plan, float_dtype(transformer))
    # Tokens that run beside the anchors.
    beside = text_tokens
    if reference is not None:
        beside += reference.shape[1] * reference.shape[2]
    budget = plan.budgets(n, beside)[0]
    must_draw = {
        "first_anchors": first_anchors is None,
        "microflow_noise": microflow_noise is None
        and plan.microflow_noise == "fresh"
        and plan.microflow != "none",
        "random activation": plan.activation == "random",
    }
    random_scores = None
    if known is not None:
        values = concrete(known.mask)
        if first_anchors is None and values is not None:
            first_anchors = inpaint_anchors(values, plan=plan, grid=grid, key=key)
        known = known._replace(mask=over_batch(jnp.asarray(known.mask)))
    elif budget < n and any(must_draw.values()):
        if key is None:
            names = " and ".join(name for name, needed in must_draw.items() if needed)
            raise ValueError(f"key is None; expected a key, which this plan needs for {names}")
        drawn = _draw(plan, grid, budget, noise.shape[2], batch_keys(key, b))
        if must_draw["first_anchors"]:
            first_anchors = drawn[0]
        if must_draw["microflow_noise"]:
            assert drawn[1] is not None
            microflow_noise = drawn[1].astype(noise.dtype)
        if must_draw["random activation"]:
            random_scores = drawn[2]
    if first_anchors is not None:
        anchors = as_array("first_anchors", first_anchors)
        first_anchors = anchors[None].repeat(b, axis=0) if anchors.ndim == 1 else anchors
    sigmas = flux_sigmas(plan, n, params.config)
    start = noise
    if clean is not None and sigmas[0] < 1:
        start = _mix(clean, noise, jnp.asarray(sigmas[0], noise.dtype))
        if microflow_noise is None:  # `jit_solve` would take the first state
            microflow_noise = noise

    return jit_solve(
        velocity,
        start,
        jnp.asarray(sigmas, noise.dtype),
        plan=plan,
        grid=grid,
        first_anchors=first_anchors,
        microflow_noise=microflow_noise,
        random_scores=random_scores,
        known=known,
        args=VelocityInputs(
            transformer,
            conditioning,
            guidance if config.guidance_embeds else None,
            negative,
            scale,
            control,
            reference,
        ),
        solver=solver,
        text_tokens=beside,
        compiler_options=compiler_options(),
        progress=progress,
        check_finite=check_finite,
        trace=trace,
    )


@jax.jit
def _mix(clean: Array, noise: Array, sigma: Array) -> Array:
    """Return clean tokens with noise, at a sigma."""
    return (1 - sigma) * clean.astype(noise.dtype) + sigma * noise


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    plan: Plan, grid: Grid, budget: int, channels: int, keys: Key[Array, " b"]
) -> tuple[Int[Array, "b k"], Float[Array, "b n d"] | None, Float[Array, "b n"] | None]:
    """Draw the first anchors, the noise of the micro-flow, and scores for random activation.

    What the plan does not use is None.
    """
    from jitjax.sampler.anchors import first_anchors

    anchor_keys, microflow_keys = split(keys)
    draw = partial(first_anchors, grid=grid, budget=budget, layout=plan.first, fill=plan.fill)
    noise = scores = None
    if plan.microflow != "none" and plan.microflow_noise == "fresh":
        noise = draw_noise(microflow_keys, grid, channels)
    if plan.activation == "random":
        score_keys = fold_in(keys, jnp.full(keys.shape, 2))
        scores = jax.vmap(lambda key: uniform(key, (grid[0] * grid[1],)))(score_keys)
    return jax.vmap(draw)(anchor_keys), noise, scores
