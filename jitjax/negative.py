"""Negative prompts: the inputs of true classifier-free guidance, for `sample` and `denoise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jitjax.checkpoint import TEXT_ENCODERS, FluxParams
from jitjax.config import FluxConfig
from jitjax.sampler.checks import as_array, check_finite, concrete
from jitjax.text import Conditioning, as_prompts, encode_tokens, tokenize

DEFAULT_TRUE_GUIDANCE = 2.0
"""The scale of a negative prompt without one; docs/pictures-in.md has what was measured."""

TokenIds = tuple[Int[Array, "_ _"] | Int[np.ndarray, "_ _"], ...]
"""Token ids [b, length] of prompts for T5 and for CLIP, from `tokenize`."""


def check_true_guidance(scale: Any, batch: int) -> Float[Array, " b"] | None:
    """Return the scale of each sample, float32 [batch]; None if all are known to be 1.

    Args:
        scale: one number, 1 or more, or one per sample. Traced values are not checked.
        batch: number of samples.

    Raises:
        ValueError: the shape does not fit, or a known value is not finite or below 1.
    """
    scale = as_array("true_guidance", scale)
    if scale.shape not in ((), (batch,)) or not jnp.isrealobj(scale):
        raise ValueError(
            f"true_guidance has shape {list(scale.shape)} and dtype {scale.dtype}; expected real "
            f"numbers, [] or [{batch}]"
        )
    values = concrete(scale)
    if values is None:
        return jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (batch,))
    if not ((values >= 1) & (values <= np.finfo(np.float32).max)).all():
        raise ValueError(
            f"true_guidance is {values!s}; expected finite numbers of 1 or more (1 is without "
            "negative prompt)"
        )
    if (values == 1).all():
        return None
    return jnp.asarray(np.broadcast_to(values.astype(np.float32), (batch,)))


def check_negative(
    name: str,
    negative: Conditioning | None,
    scale: Any,
    config: FluxConfig,
    batch: int,
    text_tokens: int,
) -> tuple[Conditioning | None, Float[Array, " b"] | None]:
    """Check encoded negative prompts and their scale.

    Args:
        name: name of the argument `negative`, for messages.
        negative: one for all samples, or one per sample.
        scale: as for `check_true_guidance`; None for the default.
        config: the model's configuration.
        batch: number of samples.
        text_tokens: number of text tokens of the prompts.

    Returns:
        The negative prompts and the scales [batch]; None and None if there is no true guidance, or
        all scales are known to be 1.

    Raises:
        ValueError: a shape does not fit, a known value is not possible, or there is a scale alone.
    """
    if negative is None:
        if scale is not None and check_true_guidance(scale, batch) is not None:
            raise ValueError(f"true_guidance is given, but {name} is None; expected both")
        return None, None
    scale = check_true_guidance(DEFAULT_TRUE_GUIDANCE if scale is None else scale, batch)
    negative.check(config)
    rows, tokens = negative.text.shape[:2]
    if rows not in (1, batch):
        raise ValueError(
            f"{name} has batch size {rows}; expected 1 or {batch}, the number of prompts"
        )
    if tokens != text_tokens:
        raise ValueError(
            f"{name} has {tokens} text tokens; expected {text_tokens}, as the prompts have"
        )
    check_finite(f"{name}.text", negative.text)
    check_finite(f"{name}.pooled", negative.pooled)
    return (None, None) if scale is None else (negative, scale)


def negative_inputs(
    task: Mapping[str, Any], params: FluxParams, batch: int, text_tokens: int
) -> tuple[Conditioning | TokenIds | None, Float[Array, " b"] | None]:
    """Return the negative prompts of a task, encoded or as token ids, and the scales.

    Args:
        task: from `check_task`.
        params: the parameters, whose tokenizers are used.
        batch: number of samples.
        text_tokens: number of text tokens of the prompts.

    Returns:
        Negative prompts, [1, ...] or [batch, ...], and scales [batch]; None and None if there is
        no true guidance, or all scales are known to be 1.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `sample`.
    """
    negative, scale = task.get("negative_prompt"), task.get("true_guidance")
    if negative is None and scale is None:
        return None, None
    if isinstance(negative, Conditioning):
        return check_negative("negative_prompt", negative, scale, params.config, batch, text_tokens)
    scale = check_true_guidance(DEFAULT_TRUE_GUIDANCE if scale is None else scale, batch)
    prompts = as_prompts("" if negative is None else negative, "negative_prompt")
    if len(prompts) not in (1, batch):
        raise ValueError(
            f"negative_prompt has {len(prompts)} strings; expected 1 or {batch}, the number of "
            "prompts"
        )
    if scale is None:
        return None, None
    for part in TEXT_ENCODERS:
        params.part(part)
    ids = tokenize(params.tokenizer, prompts, params.config, name="negative_prompt")
    if ids[0].shape[1] != text_tokens:
        raise ValueError(
            f"negative_prompt has {ids[0].shape[1]} text tokens; expected {text_tokens}, as the "
            "conditioning has"
        )
    return ids, scale


def encode_both(
    params: FluxParams, text: Conditioning | TokenIds, negative: Conditioning | TokenIds | None
) -> tuple[Conditioning, Conditioning | None]:
    """Encode prompts and negative prompts unless they are encoded; both in one batch."""
    if isinstance(text, Conditioning):
        return text, encode_tokens(params, *negative) if isinstance(negative, tuple) else negative
    if not isinstance(negative, tuple):
        return encode_tokens(params, *text), negative
    both = encode_tokens(params, *map(_joined, zip(text, negative, strict=True)))
    b = text[0].shape[0]
    return jax.tree.map(lambda x: x[:b], both), jax.tree.map(lambda x: x[b:], both)


def _joined(pair: Sequence[Array | np.ndarray]) -> Array | np.ndarray:
    is_known = all(isinstance(ids, np.ndarray) for ids in pair)
    return np.concatenate(pair) if is_known else jnp.concatenate(pair)
