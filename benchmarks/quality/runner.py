"""Runs the methods of the quality benchmark on one checkpoint and image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial

import jitjax
from benchmarks.quality import flops, peers
from benchmarks.quality.methods import Method
from benchmarks.quality.prompts import prompts
from jitjax.config import EMBEDDING_SCALE
from jitjax.denoise import flux_sigmas
from jitjax.latents import draw_noise
from jitjax.models.layers import MLP, modulate, sinusoidal_embedding
from jitjax.sampler.grid import Grid, positions
from jitjax.sampler.plan import Plan
from jitjax.velocity import FluxVelocity


def modulated_input(
    tokens: Float[Array, "b n c"], sigma: Array, args: tuple[dict, jitjax.Conditioning, Array]
) -> Array:
    """Compute TeaCache's indicator for FLUX: the modulated input of the first block.

    Args:
        tokens: the noisy tokens.
        sigma: the noise level.
        args: transformer's parameters, conditioning, and guidance scale [batch].

    Returns:
        The image tokens after the first block's modulated norm, [batch, n, hidden].
    """
    params, conditioning, guidance = args

    def embed(name: str, value: Array) -> Array:
        hidden = params["image_in"]["bias"].shape[0]
        output = MLP(hidden, hidden, "silu").apply({"params": params[name]}, value)
        assert isinstance(output, jax.Array)
        return output

    def embed_scalar(name: str, value: Array) -> Array:
        value = jnp.broadcast_to(value, tokens.shape[:1])
        return embed(name, sinusoidal_embedding(value * EMBEDDING_SCALE))

    embedding = embed_scalar("sigma_in", sigma) + embed("pooled_in", conditioning.pooled)
    if "guidance_in" in params:
        embedding = embedding + embed_scalar("guidance_in", guidance)
    first = jax.tree.map(lambda leaf: leaf[0], params["double_blocks"]["image_modulation"])
    modulation = (
        jnp.einsum("bh,hpk->bpk", jax.nn.silu(embedding), first["kernel"]) + first["bias"][None]
    )
    image = tokens @ params["image_in"]["kernel"] + params["image_in"]["bias"][None, None]
    return modulate(image, modulation[:, 0], modulation[:, 1])


class Runner:
    """Runs methods on one checkpoint and image size, and reports their cost.

    Args:
        params: parameters of the pipeline.
        grid: rows and columns of tokens.
        guidance: guidance scale.
    """

    def __init__(self, params: jitjax.FluxParams, grid: Grid, guidance: float = 3.5):
        self.params, self.grid, self.guidance = params, grid, guidance
        self.tokens = grid[0] * grid[1]
        self.velocity = FluxVelocity(params.config.transformer)
        self.fitted_rules: dict[int, tuple[Polynomial, float]] = {}
        self.calibration_changes: tuple[np.ndarray, np.ndarray] | None = None
        self._evaluate = jax.jit(self._evaluate_dense)
        self._indicate = jax.jit(modulated_input)

    def _evaluate_dense(self, tokens: Array, sigma: Array, args: Any) -> Array:
        token_positions = positions(jnp.arange(self.tokens), self.grid)
        token_positions = jnp.broadcast_to(
            token_positions, (tokens.shape[0], *token_positions.shape)
        )
        return self.velocity(tokens, token_positions, sigma, None, args)

    def sigmas(self, plan: Plan) -> Array:
        """Return the plan's noise levels, [steps + 1]."""
        return jnp.asarray(flux_sigmas(plan, self.tokens, self.params.config))

    def __call__(
        self,
        method: Method,
        conditioning: jitjax.Conditioning,
        noise: Float[Array, "b n d"],
        keys: Array,
    ) -> tuple[Float[Array, "b n d"], Sequence[int]]:
        """Sample with a method.

        Args:
            method: the method.
            conditioning: the prompts' conditioning.
            noise: the noisy tokens.
            keys: a key per sample, for the plans' random choices.

        Returns:
            Clean tokens, and the number of image tokens in each evaluation.
        """
        plan = method.plan
        if not method.peer:
            tokens = jitjax.denoise(
                self.params, conditioning, noise, plan=plan, grid=self.grid,
                guidance=self.guidance, key=keys,
            )  # fmt: skip
            return tokens, flops.slots(plan, self.tokens, conditioning.text.shape[1])
        evaluate, indicate = self._functions(conditioning)
        sigmas = self.sigmas(plan)
        if method.peer == "taylor":
            steps = peers.evaluated_steps(plan.steps, method.evaluations)
            tokens, evaluations = peers.taylor(evaluate, noise, sigmas, steps)
        else:
            teacache_rule = self.teacache_rule(method)
            tokens, evaluations = peers.teacache(evaluate, indicate, noise, sigmas, *teacache_rule)
        return tokens, [self.tokens] * evaluations

    def _functions(
        self, conditioning: jitjax.Conditioning
    ) -> tuple[peers.Evaluate, peers.Evaluate]:
        guidance = jnp.full(conditioning.text.shape[:1], self.guidance)
        args = self.params.transformer, conditioning, guidance
        return (
            lambda tokens, sigma: self._evaluate(tokens, sigma, args),
            lambda tokens, sigma: self._indicate(tokens, sigma, args),
        )

    def teacache_rule(self, method: Method) -> tuple[Polynomial, float]:
        """Return TeaCache's polynomial and threshold for the method's number of evaluations.

        Both are fitted on four prompts of the development split, once per number of evaluations.
        """
        if method.evaluations not in self.fitted_rules:
            dev_prompts = prompts(1, "dev", seeds=1)[:4]
            conditioning = jitjax.encode_prompt(self.params, [p.text for p in dev_prompts])
            keys = jnp.stack([jax.random.key(p.seeds[0]) for p in dev_prompts])
            noise = draw_noise(keys, self.grid, self.params.config.transformer.out_channels)
            inputs = (*self._functions(conditioning), noise, self.sigmas(method.plan))
            self.calibration_changes = self.calibration_changes or peers.relative_changes(*inputs)
            rescale = peers.calibrate(*self.calibration_changes)
            upper = float(np.abs(rescale(self.calibration_changes[0])).sum())
            threshold = peers.find_threshold(
                lambda threshold: peers.teacache(*inputs, rescale, threshold)[1],
                method.evaluations,
                upper,
            )
            self.fitted_rules[method.evaluations] = rescale, threshold
        return self.fitted_rules[method.evaluations]
