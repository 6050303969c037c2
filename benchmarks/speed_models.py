"""What the benchmarks of speed run: transformers, their inputs, and velocities of no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jitjax
from benchmarks.flop_count import xla_flops
from benchmarks.timing import compile_for, random_params
from jitjax.checkpoint import FluxParams, quantise_params
from jitjax.config import FluxConfig, T5Config, TransformerConfig
from jitjax.denoise import flux_sigmas
from jitjax.models import param_shapes
from jitjax.models.devices import compiler_options
from jitjax.sampler.grid import positions
from jitjax.sampler.solve import jit_solve
from jitjax.velocity import FluxVelocity

CHECKPOINT = "tiny"
"""The model that is loaded, from the bundled checkpoint; the weights of all others are random."""
MODELS: dict[str, TransformerConfig | None] = {
    "flux-dev": TransformerConfig(),
    "middle": TransformerConfig(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        axes_dims_rope=(8, 28, 28),
    ),
    CHECKPOINT: None,
}
"""Configurations of the transformers; None for the one of the checkpoint."""
SIDES = {"flux-dev": [1024], "middle": [1024], CHECKPOINT: [512, 1024]}
"""Sides of the images in pixels, for each model."""


def load_params(
    model: str, text: int | None, dtype: Any, quantise: str | None = None
) -> FluxParams:
    """Return parameters of which only the transformer's are set.

    Args:
        model: a name in `MODELS`. Random weights are made on the device.
        text: number of text tokens; None for 512, or those of the checkpoint.
        dtype: dtype of the weights.
        quantise: what they are quantised to; None for no quantisation.
    """
    transformer = MODELS[model]
    if transformer is None:
        return jitjax.load(model, dtype=dtype, parts=("transformer",), quantise=quantise)
    config = FluxConfig(
        transformer=transformer,
        t5=T5Config(d_model=transformer.joint_attention_dim),
        text_length=text or 512,
    )
    weights = random_params(param_shapes.transformer(transformer, dtype))
    params = FluxParams(
        transformer=weights, t5={}, clip={}, autoencoder={}, config=config, tokenizer=""
    )
    return params if quantise is None else quantise_params(params, quantise)


def linear_velocity(
    tokens: jax.Array, positions: jax.Array, sigma: jax.Array, valid: jax.Array | None, args: Any
) -> jax.Array:
    """A velocity of the right shape at next to no cost: `args`, [d, d], times each token."""
    return tokens @ args


class Bench:
    """A transformer, and the inputs for one sample.

    Args:
        model: a name in `MODELS`.
        side: side of the image in pixels, a multiple of 16.
        text: number of text tokens; None for 512, or those of the checkpoint.
        dtype: dtype of the weights.
        attention: implementation of attention, see `jitjax.models.attention`.
        quantise: what the weights are quantised to; None for no quantisation.
    """

    def __init__(
        self,
        model: str,
        side: int,
        text: int | None,
        dtype: Any,
        attention: str,
        quantise: str | None = None,
    ):
        self.params = load_params(model, text, dtype, quantise)
        self.config = self.params.config.transformer
        self.text = text or self.params.config.text_length
        self.grid = (side // 16, side // 16)
        self.tokens = self.grid[0] * self.grid[1]
        self.velocity = FluxVelocity(self.config, attention)
        keys = iter(jax.random.split(jax.random.key(1), 8))
        self.conditioning = jitjax.Conditioning(
            jax.random.normal(next(keys), (1, self.text, self.config.joint_attention_dim)),
            jax.random.normal(next(keys), (1, self.config.pooled_projection_dim)),
        )
        self.noise = jax.random.normal(next(keys), (1, self.tokens, self.config.out_channels))
        self.microflow_noise = jax.random.normal(next(keys), self.noise.shape)
        self.guidance = jnp.full((1,), 3.5)
        self.args = (self.params.transformer, self.conditioning, self.guidance)
        self.linear_args = 0.1 * jnp.eye(self.config.out_channels)
        jax.block_until_ready((self.params.transformer, self.noise, self.microflow_noise))

    def forward(self, tokens: int) -> tuple[Callable[[], Any], float]:
        """Compile one evaluation on the first `tokens` tokens.

        Returns:
            The compiled call, and the seconds that compilation took.
        """
        inputs = self._inputs(tokens)
        return compile_for(self._evaluate(self.velocity), *inputs, options=compiler_options())

    def forward_flops(self, tokens: int) -> float:
        """Count the FLOPs of one evaluation by XLA's cost analysis.

        With the attention "xla": XLA does not count those of a call of cuDNN.
        """
        return xla_flops(self._evaluate(FluxVelocity(self.config, "xla")), *self._inputs(tokens))

    def _inputs(self, tokens: int) -> tuple[Any, ...]:
        token_positions = positions(jnp.arange(tokens), self.grid)[None]
        return self.noise[:, :tokens], token_positions, jnp.float32(0.9), self.args

    @staticmethod
    def _evaluate(velocity: FluxVelocity) -> Callable[..., jax.Array]:
        return lambda y, p, sigma, args: velocity(y, p, sigma, None, args)

    def first_anchors(self, plan: jitjax.Plan) -> jax.Array | None:
        """Return random anchors of the first stage, [1, k]; None if the network runs on all."""
        budget = plan.budgets(self.tokens, self.text)[0]
        anchors = np.random.default_rng(0).permutation(self.tokens)[None, :budget]
        return jnp.asarray(anchors) if budget < self.tokens else None

    def sigmas(self, plan: jitjax.Plan) -> jax.Array:
        """Return the sigmas of a plan, as `denoise` computes them."""
        return jnp.asarray(flux_sigmas(plan, self.tokens, self.params.config), self.noise.dtype)

    def plan(self, plan: jitjax.Plan) -> Callable[..., Any]:
        """Return a call that runs `plan` from noise to clean tokens; its first call compiles.

        Keyword arguments are passed to `denoise`.
        """
        anchors = self.first_anchors(plan)
        return lambda **more: jitjax.denoise(
            self.params,
            self.conditioning,
            self.noise,
            plan=plan,
            grid=self.grid,
            guidance=self.guidance,
            first_anchors=anchors,
            microflow_noise=self.microflow_noise,
            attention=self.velocity.attention,
            **more,
        )

    def linear_plan(self, plan: jitjax.Plan) -> Callable[[], Any]:
        """Return a call that runs `plan` with `linear_velocity` in place of the transformer."""
        anchors = self.first_anchors(plan)
        return lambda: jit_solve(
            linear_velocity,
            self.noise,
            self.sigmas(plan),
            plan=plan,
            grid=self.grid,
            first_anchors=anchors,
            microflow_noise=self.microflow_noise,
            args=self.linear_args,
            text_tokens=self.text,
            compiler_options=compiler_options(),
        )
