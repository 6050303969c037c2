"""The models of a FLUX pipeline as a diffusers folder has them: facts for reading and writing it.

    model_index.json                         _class_name FluxPipeline
    transformer/       config.json, diffusion_pytorch_model*.safetensors    transformer
    text_encoder/      config.json, model*.safetensors                      clip
    text_encoder_2/    config.json, model*.safetensors                      t5
    vae/               config.json, diffusion_pytorch_model*.safetensors    autoencoder
    scheduler/         scheduler_config.json                                shift of dense plans
    tokenizer/, tokenizer_2/                                                copied as they are

Reading is in `sources/`, writing in `targets/`; neither torch nor diffusers is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config, TransformerConfig
from jitjax.models import autoencoder, clip, flux, t5

from .tables.autoencoder import AUTOENCODER_IGNORED, autoencoder_rules
from .tables.engine import Rule, Shape, Tree, check, expected_sources, fill, leaf_shapes, leaf_types
from .tables.text import (
    CLIP_ALIASES,
    CLIP_IGNORED,
    T5_ALIASES,
    T5_IGNORED,
    canonical_names,
    clip_rules,
    t5_rules,
)
from .tables.transformer import TRANSFORMER_IGNORED, transformer_rules

PIPELINE = "FluxPipeline"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Component:
    """One model of the pipeline.

    Attributes:
        folder: its folder.
        name: its field in `FluxParams` and in `FluxConfig`.
        stem: how the names of its weight files begin.
        config: its configuration class.
        rules: its rule table.
        abstract_params: its parameter tree without the numbers.
        ignored, aliases: see its table.
    """

    folder: str
    name: str
    stem: str
    config: Any
    rules: Callable[[Any], list[Rule]]
    abstract_params: Callable[[Any], Tree]
    ignored: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def source_shapes(self, config: Any) -> dict[str, Shape]:
        """Canonical name -> shape of every tensor that a model of `config` is made from."""
        return expected_sources(self.rules(config), leaf_shapes(self.abstract_params(config)))


COMPONENTS = (
    Component(
        "transformer",
        "transformer",
        "diffusion_pytorch_model",
        TransformerConfig,
        transformer_rules,
        flux.abstract_params,
        TRANSFORMER_IGNORED,
    ),
    Component(
        "text_encoder",
        "clip",
        "model",
        CLIPConfig,
        clip_rules,
        clip.abstract_params,
        CLIP_IGNORED,
        CLIP_ALIASES,
    ),
    Component(
        "text_encoder_2",
        "t5",
        "model",
        T5Config,
        t5_rules,
        t5.abstract_params,
        T5_IGNORED,
        T5_ALIASES,
    ),
    Component(
        "vae",
        "autoencoder",
        "diffusion_pytorch_model",
        AutoencoderConfig,
        autoencoder_rules,
        autoencoder.abstract_params,
        AUTOENCODER_IGNORED,
    ),
)


def component_of(model: str) -> Component:
    """The component that fills a field of `FluxParams`."""
    return next(component for component in COMPONENTS if component.name == model)


SHIFT_FIELDS = {
    "use_dynamic_shifting": ("dynamic_shift", False),
    "base_shift": ("base_shift", 0.5),
    "max_shift": ("max_shift", 1.15),
    "base_image_seq_len": ("base_seq", 256),
    "max_image_seq_len": ("max_seq", 4096),
    "shift": ("shift", 1.0),
}
"""Key in `scheduler_config.json` -> field of `FluxConfig`, and diffusers' value if it is absent."""


def from_state(name: str, state: Mapping[str, np.ndarray], config: Any, dtype: Any = None) -> Tree:
    """Parameters of one model from a PyTorch state dictionary of NumPy arrays.

    Args:
        name: "transformer", "clip", "t5" or "autoencoder".
        state: name -> array, with the names of diffusers or transformers.
        config: of that model.
        dtype: of the result; None keeps each array's own.

    Raises:
        ConversionError: keys or shapes do not fit; the message lists all of them.
    """
    component = component_of(name)
    rules, shapes = component.rules(config), leaf_shapes(component.abstract_params(config))
    names = canonical_names(state, component.aliases)
    sources = {canonical: tuple(state[own].shape) for canonical, own in names.items()}
    check(rules, shapes, sources, what=name, ignored=component.ignored)
    types = leaf_types(rules, {n: state[own].dtype for n, own in names.items()}, dtype)
    return fill(rules, shapes, types, lambda canonical: state[names[canonical]])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` if it is broken, or holds none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no complete JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected a JSON object")
    return raw


def byte_bar(total: int, what: str, show: bool) -> tqdm:
    """A progress bar over `total` bytes."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show)
