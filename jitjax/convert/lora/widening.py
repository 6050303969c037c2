"""Control LoRAs (FLUX.1-Canny-dev-lora, -Depth-dev-lora): updates that add input channels.

Their update of the layer that takes the image's tokens has columns for the latents and for those of
a control picture. They also have whole norms of queries and keys, in the place of the model's.

    img_in.lora_A.weight                              [rank, 128]
    img_in.lora_B.weight, img_in.lora_B.bias          [3072, rank], [3072]
    double_blocks.0.img_attn.norm.query_norm.scale    [128]
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jitjax.config import FluxConfig

from ..components import component_of
from ..sources.diffusers_folder import ModelSource, Source
from ..tables.engine import ConversionError, leaf_shapes
from ..tables.transformer import IMAGE_WEIGHT
from .names import Layer, layers_by_name, match_layer, parse_key
from .tensors import LoraTensors

COLUMNS = ("A", "difference", "weight", "hada_w1_b")
"""Kinds of tensors whose second axis is the layer's input."""
NORM = re.compile(r"(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$")
"""Names of whole norms, in the original release and in diffusers."""


def widened_config(files: Iterable[tuple[Path, LoraTensors]], config: FluxConfig) -> FluxConfig:
    """Return the configuration that a pipeline has with some updates.

    Args:
        files: path and tensors of each LoRA file.
        config: the pipeline's configuration without them.

    Raises:
        ConversionError: a file is for a model with other input channels, or a control LoRA meets a
            model that takes more than latents already, or another control LoRA.
    """
    layers = {"transformer": layers_by_name("transformer", config)}
    transformer = config.transformer
    channels, latents = transformer.in_channels, transformer.out_channels
    first: Path | None = None
    for path, tensors in files:
        found = _image_columns(tensors, layers)
        if found is None or found[1] == latents:
            continue
        key, columns = found
        takes = f"{path} is for a model of {columns} input channels ({key})"
        if columns == channels:
            if norm := next((k for k in tensors.keys if NORM.search(k)), None):
                raise ConversionError(
                    f"{takes} and has norms ({norm}), so it is a control LoRA for FLUX.1-dev; the "
                    f"model has {channels} input channels already"
                )
            continue
        if channels != latents:
            raise ConversionError(f"{takes}; expected {channels}, those of the model, or {latents}")
        if first is not None:
            raise ConversionError(f"{path} and {first} are both control LoRAs; expected one")
        try:
            wide = dataclasses.replace(transformer, in_channels=columns)
            config = dataclasses.replace(config, transformer=wide)
        except ValueError:  # of no FLUX model, so reading the layer's update refuses it
            continue
        first = path
    return config


def widened_source(source: Source, config: FluxConfig) -> Source:
    """Return the source of a transformer with more input channels.

    Args:
        source: the source of all models.
        config: `source.config` with a larger `transformer.in_channels`. The weights of the added
            channels, which are the last ones, are 0.

    Source: diffusers `FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_`.
    """
    shapes = leaf_shapes(component_of("transformer").abstract_params(config.transformer))

    def widened(model: ModelSource) -> ModelSource:
        def read(name: str) -> np.ndarray:
            values = model.read(name)
            if name != IMAGE_WEIGHT:
                return values
            return np.pad(values, ((0, 0), (0, config.transformer.in_channels - values.shape[1])))

        return dataclasses.replace(model, shapes=shapes, read=read)

    models = (widened(m) if m.name == "transformer" else m for m in source.models)
    return dataclasses.replace(source, config=config, models=tuple(models))


def _image_columns(
    tensors: LoraTensors, layers: Mapping[str, Mapping[str, Layer]]
) -> tuple[str, int] | None:
    """Return a tensor that updates the layer of the image, and the number of its columns."""
    for key in tensors.keys:
        parsed = parse_key(key)
        if parsed is None or parsed.kind not in COLUMNS:
            continue
        match = match_layer(parsed.layer, layers)
        layer = match[2] if match else None
        shape = tensors.shape(key)
        if layer and layer.weights[0][0] == IMAGE_WEIGHT and len(shape) > 1:
            return key, shape[1]
    return None
