"""The FLUX transformer as a velocity function for `jit_solve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jitjax.conditioning import Conditioning
from jitjax.config import TransformerConfig
from jitjax.models.attention import check_implementation
from jitjax.models.quantised import float_dtype
from jitjax.sampler.grid import positions as grid_positions


class VelocityInputs(NamedTuple):
    """What the velocity depends on besides the state: the run-time arguments of `FluxVelocity`.

    Attributes:
        params: the transformer's parameters.
        conditioning: the encoded prompts.
        guidance: guidance strength [b]; None for models without a guidance embedding.
        negative: encoded negative prompts, one for all samples or one per sample, for true
            classifier-free guidance; None without it.
        true_guidance: its scale [b]; None without it.
        control: what each token of the grid gets as further channels, for models that take a
            control picture or a mask; None for others.
        reference: clean tokens of a reference picture on its own grid, for FLUX.1 Kontext.
    """

    params: Any
    conditioning: Conditioning
    guidance: Float[Array, " b"] | None
    negative: Conditioning | None = None
    true_guidance: Float[Array, " b"] | None = None
    control: Float[Array, "b rows columns c"] | None = None
    reference: Float[Array, "b reference_rows reference_columns d"] | None = None


@dataclass(frozen=True)
class FluxVelocity:
    """The FLUX transformer as a velocity function for `jit_solve`.

    The transformer runs in the dtype of its parameters. With negative prompts it runs twice, and
    the velocity is `negative + true_guidance * (positive - negative)`.

    Source of the combination: Ho and Salimans, 2022 (arXiv 2207.12598); diffusers' `FluxPipeline`.

    Attributes:
        config: configuration of the transformer.
        attention: "auto" (the fastest on the platform), "xla", "cudnn" or "pallas"; see
            `jitjax.models.attention`.
    """

    config: TransformerConfig
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_implementation(self.attention)

    def __call__(
        self,
        tokens: Float[Array, "b m d"],
        positions: Int[Array, "b m 3"],
        sigma: Array,
        valid: Array | None,
        args: VelocityInputs | tuple[Any, Conditioning, Array | None],
    ) -> Float[Array, "b m d"]:
        """Return the velocities of the tokens.

        Args:
            tokens: states of the tokens, without those of `reference`.
            positions: (0, row, column) of each token.
            sigma: sigma of the states, a scalar in [0, 1].
            valid: False in padded slots, [b, m]; None if there are none. Unless `attention` is
                "xla" or "pallas", they follow all others.
            args: `VelocityInputs`, or a tuple of its first fields.
        """
        from jitjax.models.flux import FluxTransformer

        inputs = args if isinstance(args, VelocityInputs) else VelocityInputs(*args)
        count = tokens.shape[1]
        if inputs.control is not None:
            further = _at(positions, inputs.control).astype(tokens.dtype)
            tokens = jnp.concatenate([tokens, further], axis=2)
        if inputs.reference is not None:
            # Before the anchors, so that padding stays last.
            tokens, positions, valid = _after_reference(inputs.reference, tokens, positions, valid)
        dtype = float_dtype(inputs.params)
        model = FluxTransformer(self.config, dtype=dtype, attention=self.attention)

        def evaluate(conditioning: Conditioning) -> jax.Array:
            velocities = model.apply(
                {"params": inputs.params},
                tokens,
                positions,
                conditioning.text,
                conditioning.pooled,
                jnp.broadcast_to(sigma, tokens.shape[:1]),
                inputs.guidance,
                valid,
            )
            assert isinstance(velocities, jax.Array)
            return velocities if inputs.reference is None else velocities[:, -count:]

        if inputs.negative is None:
            return evaluate(inputs.conditioning)
        # One pass after another, with the activations of one, by one compiled network. A batch of
        # two is as fast (docs/pictures-in.md).
        pair = jax.tree.map(
            lambda *leaves: jnp.stack(jnp.broadcast_arrays(*leaves)),
            inputs.conditioning,
            inputs.negative,
        )
        positive, negative = jax.lax.map(evaluate, pair)
        assert inputs.true_guidance is not None
        scale = inputs.true_guidance[:, None, None].astype(positive.dtype)
        return negative + scale * (positive - negative)


def _at(positions: Int[Array, "b m 3"], field: Float[Array, "b h w c"]) -> Float[Array, "b m c"]:
    """Return the values of a field at the positions of tokens; zeros in padded slots."""
    take = jax.vmap(lambda f, p: f.at[p[:, 1], p[:, 2]].get(mode="fill", fill_value=0))
    return take(field, positions)


def _after_reference(
    reference: Float[Array, "b h w d"],
    tokens: Float[Array, "b m d"],
    positions: Int[Array, "b m 3"],
    valid: Array | None,
) -> tuple[Array, Array, Array | None]:
    """Put the tokens of a reference picture, at (1, row, column), before others."""
    b, rows, columns, channels = reference.shape
    own = grid_positions(jnp.arange(rows * columns), (rows, columns)).at[:, 0].set(1)
    own = jnp.broadcast_to(own, (b, *own.shape)).astype(positions.dtype)
    flat = reference.reshape(b, rows * columns, channels).astype(tokens.dtype)
    if valid is not None:
        valid = jnp.concatenate([jnp.ones(flat.shape[:2], bool), valid], axis=1)
    return (
        jnp.concatenate([flat, tokens], axis=1),
        jnp.concatenate([own, positions], axis=1),
        valid,
    )
