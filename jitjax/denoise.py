"""`denoise`: the staged solve with FLUX plugged in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig, TransformerConfig
from jitjax.latents import draw_noise
from jitjax.models.flux import FluxTransformer
from jitjax.sampler.anchors import first_anchors as draw_first_anchors
from jitjax.sampler.grid import Grid
from jitjax.sampler.plan import Plan, get_plan
from jitjax.sampler.schedule import Shift, plan_sigmas
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.trace import Trace
from jitjax.text import Conditioning


@dataclass(frozen=True)
class FluxVelocity:
    """FLUX as a velocity function for `jit_solve`; computes in the dtype of its parameters.

    Attributes:
        config: sizes of the transformer.
        attention: "xla", or "cudnn" (NVIDIA GPUs; bfloat16 or float16), see
            `jitjax.models.attention.attend`.
    """

    config: TransformerConfig
    attention: str = "xla"

    def __call__(
        self,
        tokens: Float[Array, "b m d"],
        positions: Int[Array, "b m 3"],
        sigma: Array,
        valid: Array | None,
        args: tuple[Any, Conditioning, Array | None],
    ) -> Float[Array, "b m d"]:
        """Velocities at the anchors; `args` are (parameters, conditioning, guidance)."""
        params, conditioning, guidance = args
        dtype = jax.tree.leaves(params)[0].dtype
        model = FluxTransformer(self.config, dtype=dtype, attention=self.attention)
        velocities = model.apply(
            {"params": params},
            tokens,
            positions,
            conditioning.text,
            conditioning.pooled,
            jnp.broadcast_to(sigma, tokens.shape[:1]),
            guidance,
            valid,
        )
        assert isinstance(velocities, jax.Array)
        return velocities


def flux_sigmas(plan: Plan, tokens: int, config: FluxConfig) -> np.ndarray:
    """`plan_sigmas` with the shift of the model's configuration."""
    shift = Shift(
        dynamic=config.dynamic_shift,
        base_shift=config.base_shift,
        max_shift=config.max_shift,
        base_seq=config.base_seq,
        max_seq=config.max_seq,
        shift=config.shift,
    )
    return plan_sigmas(plan, tokens, shift)


def batch_keys(key: Array, batch: int) -> Key[Array, " b"]:
    """One key per sample: `key` folded with 0, 1, ...; or `key` itself if it is `batch` keys.

    Sample i of a batch is made from its own key alone, so `key=keys[i : i + 1]` makes it again.

    Raises:
        ValueError: `key` is not a `jax.random` key, or not of the shape [] or [batch].
    """
    key = jnp.asarray(key)
    if key.dtype == jnp.uint32 and key.ndim and key.shape[-1] == 2:  # jax.random.PRNGKey
        key = jax.random.wrap_key_data(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key is {key.dtype} {list(key.shape)}; expected jax.random.key(seed) or an array "
            "of such keys"
        )
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key is {list(key.shape)} keys; expected one, or [{batch}]")
    return key


@overload
def denoise(*args: Any, trace: Literal[False] = False, **more: Any) -> Array: ...
@overload
def denoise(*args: Any, trace: Literal[True], **more: Any) -> tuple[Array, Trace]: ...
def denoise(
    params: FluxParams,
    conditioning: Conditioning,
    noise: Float[Array, "b n d"],
    *,
    plan: str | Plan = "4x",
    grid: Grid | None = None,
    guidance: float | Float[Array, " b"] = 3.5,
    key: Array | None = None,
    microflow_noise: Float[Array, "b n d"] | None = None,
    first_anchors: Int[Array, "b k"] | Int[Array, " k"] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    progress: Callable[[int], Any] | None = None,
    check_finite: bool = False,
    trace: bool = False,
) -> Float[Array, "b n d"] | tuple[Float[Array, "b n d"], Trace]:
    """Noise to clean tokens by the FLUX transformer, following `plan`.

    Pure, and traces under `jit`, `vmap` and `grad`, unless `progress` or `check_finite` is given.
    The choice of anchors is piecewise constant in all inputs: no gradient passes through it.

    Args:
        params: parameters; only the transformer's are used.
        conditioning: what `encode_prompt` returns, or embeddings computed elsewhere.
        noise: standard normal tokens, float32, d = 64 as (channel, row in patch, column in
            patch), row-major.
        plan: a name in `PLANS` or a `Plan`.
        grid: rows and columns of tokens; by default a square.
        guidance: strength of the guidance embedding; ignored by models without one.
        key: one `jax.random` key, or one per sample, for what is not given below.
        microflow_noise: noise of the micro-flow's targets, instead of what the plan says.
        first_anchors: positions of the first stage's anchors, for all samples or per sample.
        solver: a diffrax solver; Euler by default.
        progress: called with 1 after every step.
        check_finite: raise at the first step whose velocity is not finite.
        trace: also return what the run did.

    Returns:
        clean tokens, float32, for `decode`; with `trace`, the tokens and a `Trace`.

    Raises:
        ValueError: an unknown plan; arrays that are not finite, or whose shapes do not fit the
            model, the plan or one another; a key that is missing and needed. Before anything is
            compiled.
        FloatingPointError: a velocity is not finite (with `check_finite`).
    """
    plan = get_plan(plan)
    config = params.config.transformer
    if noise.ndim != 3 or noise.shape[2] != config.in_channels:
        raise ValueError(
            f"noise is {list(noise.shape)}; expected [batch, tokens, {config.in_channels}]"
        )
    b, n, _ = noise.shape
    grid = grid or (math.isqrt(n), math.isqrt(n))
    if grid[0] * grid[1] != n or min(grid) < 1:
        raise ValueError(
            f"noise has {n} tokens; expected {grid[0]} x {grid[1]} (give `grid` if the picture "
            "is not square)"
        )
    conditioning.check(params.config, batch=b)
    strength = jnp.asarray(guidance, jnp.float32)
    if strength.shape not in ((), (b,)):
        raise ValueError(f"guidance is {list(strength.shape)}; expected one number, or [{b}]")

    budget = plan.budgets(n, conditioning.text.shape[1])[0]
    drawn = {
        "first_anchors": first_anchors is None,
        "microflow_noise": microflow_noise is None and plan.microflow_noise == "fresh",
        "activation at random": plan.activation == "random",
    }
    scores = None
    if budget < n and any(drawn.values()):
        if key is None:
            needed = " and ".join(name for name, needed in drawn.items() if needed)
            raise ValueError(f"key is None; this plan needs one for {needed}")
        keys = batch_keys(key, b)
        pairs = jax.vmap(jax.random.split)(keys)
        if drawn["first_anchors"]:
            draw = partial(
                draw_first_anchors, grid=grid, budget=budget, layout=plan.first, fill=plan.fill
            )
            first_anchors = jax.vmap(draw)(pairs[:, 0])
        if drawn["microflow_noise"]:
            microflow_noise = draw_noise(pairs[:, 1], grid, noise.shape[2]).astype(noise.dtype)
        if plan.activation == "random":
            scores = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2), (n,)))(keys)
    if first_anchors is not None:
        first_anchors = jnp.asarray(first_anchors)
        if first_anchors.ndim == 1:
            first_anchors = jnp.broadcast_to(first_anchors, (b, first_anchors.shape[0]))

    embedded = jnp.broadcast_to(strength, (b,)) if config.guidance_embeds else None
    return jit_solve(
        FluxVelocity(config),
        noise,
        jnp.asarray(flux_sigmas(plan, n, params.config), noise.dtype),
        plan=plan,
        grid=grid,
        first_anchors=first_anchors,
        microflow_noise=microflow_noise,
        random_scores=scores,
        args=(params.part("transformer"), conditioning, embedded),
        solver=solver,
        text_tokens=conditioning.text.shape[1],
        progress=progress,
        check_finite=check_finite,
        trace=trace,
    )
