"""The parameters of a pipeline, and the names of their parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.config import FluxConfig

PARTS = ("transformer", "t5", "clip", "autoencoder")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_ENCODERS = ("t5", "clip")
HINT = ", or pass a Conditioning computed elsewhere in place of the prompt"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FluxParams:
    """All parameters of a FLUX pipeline: a pytree of arrays with the configuration attached.

    Attributes:
        transformer, t5, clip, autoencoder: nested dictionaries of arrays, blocks stacked along
            the first axis; empty where a part was left out.
        config: the static facts, of the parts left out too.
        tokenizer: folder that holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5); empty if there
            is none.
    """

    transformer: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    autoencoder: dict[str, Any]
    config: FluxConfig = dataclasses.field(metadata={"static": True})
    tokenizer: str = dataclasses.field(metadata={"static": True})

    def part(self, name: str) -> dict[str, Any]:
        """The parameters of one of `PARTS`. Raises `ValueError` if it was left out."""
        found = getattr(self, name)
        if not found:
            held = [part for part in PARTS if getattr(self, part)]
            raise ValueError(
                f"these parameters have no {name}, only {', '.join(held)}; load or convert a "
                f"checkpoint with it{HINT if name in TEXT_ENCODERS else ''}"
            )
        return found


def abstract_params(config: FluxConfig, dtype: DTypeLike = jnp.float32) -> FluxParams:
    """Shapes and dtypes of all parameters of `config`, without making any."""
    from jitjax.models import autoencoder, clip, flux, t5

    return FluxParams(
        transformer=flux.abstract_params(config.transformer, dtype),
        t5=t5.abstract_params(config.t5, dtype),
        clip=clip.abstract_params(config.clip, dtype),
        autoencoder=autoencoder.abstract_params(config.autoencoder, dtype),
        config=config,
        tokenizer="",
    )
