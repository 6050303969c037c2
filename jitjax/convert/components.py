"""The models of a FLUX pipeline, and where a diffusers folder keeps them.

    model_index.json                         _class_name, one of `PIPELINES`
    transformer/       config.json, diffusion_pytorch_model*.safetensors    transformer
    text_encoder/      config.json, model*.safetensors                      clip
    text_encoder_2/    config.json, model*.safetensors                      t5
    vae/               config.json, diffusion_pytorch_model*.safetensors    autoencoder
    scheduler/         scheduler_config.json                                shift of dense plans
    tokenizer/, tokenizer_2/                                                copied unchanged

`sources/` reads such a folder and `targets/` writes one; neither needs torch or diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jitjax.config import (
    AutoencoderConfig,
    CLIPConfig,
    FluxConfig,
    T5Config,
    TransformerConfig,
)
from jitjax.models import param_shapes
from jitjax.validation import read_json

from .tables.autoencoder import AUTOENCODER_IGNORED, autoencoder_rules
from .tables.engine import (
    Rule,
    Shape,
    Tree,
    build_tree,
    check_keys,
    expected_sources,
    leaf_dtypes,
    leaf_shapes,
)
from .tables.text import (
    CLIP_ALIASES,
    CLIP_IGNORED,
    T5_ALIASES,
    T5_IGNORED,
    Aliases,
    canonical_names,
    clip_rules,
    t5_rules,
)
from .tables.transformer import TRANSFORMER_ALIASES, TRANSFORMER_IGNORED, transformer_rules

CONTROL_PIPELINES = {
    "none": "FluxPipeline", "picture": "FluxControlPipeline", "fill": "FluxFillPipeline",
}  # fmt: skip
"""`TransformerConfig.control` -> diffusers' pipeline for it."""
KONTEXT_PIPELINES = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
"""Pipelines of a model that was trained with a reference picture: FLUX.1 Kontext."""
PIPELINES = (
    *CONTROL_PIPELINES.values(), *KONTEXT_PIPELINES, "FluxImg2ImgPipeline", "FluxInpaintPipeline",
    "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline",
)  # fmt: skip
"""Pipelines whose folders are read. The others have more models, or other ones."""
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Component:
    """One model of the pipeline.

    Attributes:
        folder: its subfolder in the diffusers folder.
        name: its field in `FluxParams` and in `FluxConfig`.
        stem: beginning of the names of its weight files.
        config: its configuration class.
        rules: returns its rule table for a configuration.
        abstract_params: returns its parameter tree, of shapes and dtypes only.
        ignored: tensors of its files that need no rule.
        aliases: regular expression for an alias of a tensor name -> replacement, or None for
            tensors that are passed over.
    """

    folder: str
    name: str
    stem: str
    config: Any
    rules: Callable[[Any], list[Rule]]
    abstract_params: Callable[[Any], Tree]
    ignored: tuple[str, ...]
    aliases: Aliases = field(default_factory=dict)

    def source_shapes(self, config: Any) -> dict[str, Shape]:
        """Return canonical name -> shape of every source tensor of a model of `config`."""
        return expected_sources(self.rules(config), leaf_shapes(self.abstract_params(config)))

    def read_config(self, path: Path) -> Any:
        """Return the configuration in a `config.json`. Raises `ValueError` that names the file."""
        raw = read_json(path)
        try:
            return self.config.from_diffusers(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


COMPONENTS = (
    Component(
        "transformer",
        "transformer",
        "diffusion_pytorch_model",
        TransformerConfig,
        transformer_rules,
        param_shapes.transformer,
        TRANSFORMER_IGNORED,
        TRANSFORMER_ALIASES,
    ),
    Component(
        "text_encoder",
        "clip",
        "model",
        CLIPConfig,
        clip_rules,
        param_shapes.clip,
        CLIP_IGNORED,
        CLIP_ALIASES,
    ),
    Component(
        "text_encoder_2",
        "t5",
        "model",
        T5Config,
        t5_rules,
        param_shapes.t5,
        T5_IGNORED,
        T5_ALIASES,
    ),
    Component(
        "vae",
        "autoencoder",
        "diffusion_pytorch_model",
        AutoencoderConfig,
        autoencoder_rules,
        param_shapes.autoencoder,
        AUTOENCODER_IGNORED,
    ),
)


def component_of(model: str) -> Component:
    """Return the component for a field of `FluxParams`, for example "transformer"."""
    return next(component for component in COMPONENTS if component.name == model)


def pipeline_of(config: FluxConfig) -> str:
    """Return the class of diffusers' pipeline that runs a model."""
    if config.uses_reference:
        return KONTEXT_PIPELINES[0]
    return CONTROL_PIPELINES[config.transformer.control]


SHIFT_FIELDS = {
    "use_dynamic_shifting": ("dynamic_shift", False),
    "base_shift": ("base_shift", 0.5),
    "max_shift": ("max_shift", 1.15),
    "base_image_seq_len": ("base_seq", 256),
    "max_image_seq_len": ("max_seq", 4096),
    "shift": ("shift", 1.0),
}
"""Key in `scheduler_config.json` -> (field of `FluxConfig`, diffusers' default)."""


def from_state(name: str, state: Mapping[str, np.ndarray], config: Any, dtype: Any = None) -> Tree:
    """Convert a PyTorch state dictionary of NumPy arrays to the parameters of one model.

    Args:
        name: "transformer", "clip", "t5" or "autoencoder".
        state: name -> array, with the names of diffusers or transformers.
        config: configuration of that model.
        dtype: dtype of all leaves; None keeps the dtypes of `state`.

    Returns:
        The parameter tree of the model, with NumPy arrays as leaves.

    Raises:
        ConversionError: keys or shapes do not match, or a value is NaN or infinite.
    """
    component = component_of(name)
    rules, shapes = component.rules(config), leaf_shapes(component.abstract_params(config))
    names = canonical_names(state, component.aliases)
    sources = {canonical: tuple(state[stored].shape) for canonical, stored in names.items()}
    check_keys(rules, shapes, sources, label=name, ignored=component.ignored)
    dtypes = leaf_dtypes(rules, {n: state[stored].dtype for n, stored in names.items()}, dtype)
    return build_tree(rules, shapes, dtypes, lambda canonical: state[names[canonical]])


def byte_bar(total: int, label: str, show: bool) -> tqdm:
    """Return a progress bar over `total` bytes; it is silent if `show` is false."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not show)
