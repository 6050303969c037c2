"""`compile`, which builds a sampler's program ahead of its first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jitjax.checkpoint import FluxParams
from jitjax.checkpoint.parameters import PARTS
from jitjax.control import describe
from jitjax.denoise import batch_keys, check_guidance
from jitjax.latents import token_grid
from jitjax.models.attention import check_implementation
from jitjax.models.devices import compiler_options
from jitjax.offload import in_host_memory
from jitjax.processes import check_same_call, on_every_process
from jitjax.sample import sample
from jitjax.sampler.plan import DEFAULT_PLAN, Plan, get_plan
from jitjax.text import as_prompts, check_params, encode_ids, tokenize


@dataclass(frozen=True, eq=False)
class CompiledSampler:
    """A compiled `sample`: a function of prompts, key and guidance. Made by `compile`.

    Attributes:
        params: the parameters that it was compiled with.
        plan: the plan.
        height: height of the images in pixels.
        width: width of the images in pixels.
        batch: number of images.
        executable: the program, a `jax.stages.Compiled`: it has `memory_analysis()`.
    """

    params: FluxParams = field(repr=False)
    plan: Plan
    height: int
    width: int
    batch: int
    executable: Any = field(repr=False)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        key: Array,
        guidance: float | Float[Array, ""] | Float[Array, " b"] = 3.5,
        params: FluxParams | None = None,
    ) -> Float[Array, "b height width 3"]:
        """Generate images; arguments and images are those of `sample`.

        Args:
            prompt: `batch` strings, or one string if `batch` is 1.
            key: one `jax.random` key, or one per image.
            guidance: guidance scale, one number or one per image; its range is that of `sample`.
            params: other parameters of the same shapes, dtypes and devices, for example with
                another LoRA; by default those it was compiled with.

        Returns:
            Images, float32 [b, height, width, 3] in [0, 1]. Values that are not finite are NaN.

        Raises:
            ValueError: the number of prompts is not `batch`, or the key or the guidance does not
                fit.
            TypeError: a prompt is not a string, or `params` have other shapes or dtypes.
            FileNotFoundError: a tokenizer is missing.
        """
        prompts = as_prompts(prompt)
        if len(prompts) != self.batch:
            raise ValueError(f"prompt has {len(prompts)} strings; expected {self.batch} (`batch`)")
        params = self.params if params is None else params
        check_params(params)
        t5_ids, clip_ids = tokenize(params.tokenizer, prompts, params.config)
        guidance = check_guidance(guidance, self.batch)
        check_same_call(params, prompt=prompts, key=key, guidance=guidance)
        keys = batch_keys(key, self.batch)
        return on_every_process(self.executable(params, t5_ids, clip_ids, keys, guidance))


def compile(
    params: FluxParams,
    *,
    plan: str | Plan = DEFAULT_PLAN,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    attention: str = "auto",
) -> CompiledSampler:
    """Compile text encoders, all stages and the decoder as one program, before the first prompt.

    A call of the result compiles nothing but, once, a few operations on keys, whatever the prompt,
    the key and the guidance. With `jax.config.update("jax_compilation_cache_dir", folder)` the
    program is kept on disk for other processes.

    Args:
        params: parameters of all models, from `load`. Nothing is computed with them.
        plan: a name in `PLANS` or a `Plan`.
        height, width: size in pixels, multiples of 16 from 16 to 8192; by default
            `params.config.image_size`.
        batch: number of images per call, 1 or more.
        attention: as for `sample`.

    Returns:
        A function of `batch` prompts, a key and a guidance.

    Raises:
        ValueError: the plan, the size, the batch or `attention` is not supported, a model has no
            parameters, or has them in host memory, or the model needs pictures.
        TypeError: `params` are no parameters.
        FileNotFoundError: a tokenizer is missing.
    """
    check_params(params)
    config, plan = params.config, get_plan(plan)
    if config.transformer.control_channels:
        raise ValueError(
            f"{describe(config.transformer)}, and `compile` is for prompts alone; expected `sample`"
        )
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
    token_grid(height, width, config)
    check_implementation(attention)
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected 1 or more")
    for part in PARTS:
        if in_host_memory(params.part(part)):
            raise ValueError(
                "params are in host memory (low_memory=True); expected parameters on a device: one "
                "program uses all models"
            )

    def run(
        params: FluxParams, t5_ids: Array, clip_ids: Array, keys: Array, guidance: Array
    ) -> Any:
        t5, clip = params.part("t5"), params.part("clip")
        return sample(
            params,
            encode_ids(t5, clip, t5_ids, clip_ids, config),
            key=keys,
            height=height,
            width=width,
            plan=plan,
            guidance=guidance,
            attention=attention,
        )

    t5_ids, clip_ids = tokenize(params.tokenizer, [""] * batch, config)
    keys = batch_keys(jax.random.key(0), batch)
    jitted = jax.jit(run, compiler_options=compiler_options() or None)
    lowered = jitted.lower(params, t5_ids, clip_ids, keys, jnp.zeros(batch))
    return CompiledSampler(params, plan, height, width, batch, lowered.compile())
