"""FLUX.1-dev and -schnell at full size: names, shapes and dtypes, without allocating weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.full_size import __file__ as script
from golden.full_size import unfold

from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.convert.components import component_of
from jitjax.convert.lora.names import layers_by_name, match_layer, parse_key
from jitjax.convert.lora.widening import widened_config
from jitjax.convert.sources.diffusers_folder import prepare_model
from jitjax.convert.sources.layouts import recognise
from jitjax.convert.sources.tensors import WEIGHT_DTYPES, OriginalWeights

LISTS = json.loads(Path(script).with_suffix(".json").read_text())
DEV = 11_901_408_320
PUBLISHED = {  # parameter counts, from the model cards and the sizes of the files
    "dev": DEV,
    "schnell": 11_891_178_560,
    "canny": DEV + 64 * 3072,  # the columns of the control picture
    "fill": DEV + (64 + 256) * 3072,  # those of the masked picture and of its mask
    "T5": 4_762_310_656,
    "CLIP": 123_060_480,
    "diffusers": 83_819_683,  # the autoencoder
    "original": 83_819_683,
}
SETTINGS = {  # how a transformer's configuration differs from FLUX.1-dev's
    "schnell": {"guidance_embeds": False},
    "canny": {"in_channels": 128, "out_channels": 64},
    "fill": {"in_channels": 384, "out_channels": 64},
}
MODELS = [title for title in LISTS if "LoRA" not in title]
CONFIGS = {
    "transformer": TransformerConfig,
    "t5": T5Config,
    "clip": CLIPConfig,
    "autoencoder": AutoencoderConfig,
}


class ListedWeights:
    """Names, shapes and dtypes of a listed file, with the interface of `Weights`."""

    def __init__(self, title: str):
        self.shapes = unfold(LISTS[title]["tensors"])
        self.dtypes = dict.fromkeys(self.shapes, WEIGHT_DTYPES[LISTS[title]["dtype"]])

    def read(self, name, rows=None):
        raise AssertionError("no values are needed")

    def origin(self, name):
        return name


@pytest.mark.parametrize("title", MODELS)
def test_every_name_maps_and_every_parameter_is_filled(title):
    weights = ListedWeights(title)
    (model,) = recognise(weights.shapes, title)
    layout, first = model.layout, title.split()[0]
    config = layout.config(weights.shapes)
    assert config == CONFIGS[layout.model](**SETTINGS.get(first, {}))
    component = component_of(layout.model)
    abstract = component.abstract_params(config)
    if layout.parts:
        shapes = component.source_shapes(config)
        weights = OriginalWeights(weights, layout.parts(config), shapes, label=title)
    prepared = prepare_model(component, config, weights, label=title, ignored=layout.ignored)
    leaves = jax.tree.leaves(abstract)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert count == PUBLISHED[first]
    assert len(prepared.rules) == len(leaves)
    is_float32 = LISTS[title]["dtype"] == "F32"
    assert set(prepared.dtypes.values()) == {np.dtype(np.float32 if is_float32 else jnp.bfloat16)}
    assert prepared.bytes == count * (4 if is_float32 else 2)


def test_all_layouts_are_listed():
    titles = {recognise(ListedWeights(title).shapes, title)[0].layout.title for title in MODELS}
    assert len(titles) == 6


def test_every_tensor_of_a_control_lora_fits_a_layer():
    """Each update is of a whole layer, every layer has one, and the model is then Canny's."""
    shapes = ListedWeights("control LoRA").shapes
    tensors = SimpleNamespace(keys=tuple(shapes), shape=shapes.__getitem__)
    config = widened_config([(Path("control"), tensors)], FluxConfig())  # pyright: ignore[reportArgumentType]
    assert config.transformer == TransformerConfig(in_channels=128, out_channels=64)
    layers = layers_by_name("transformer", config)
    found = {}
    for name, shape in shapes.items():
        key = parse_key(name)
        assert key is not None
        match = match_layer(key.layer, {"transformer": layers})
        layer = match[2] if match else None
        assert layer is not None, name
        expected = {
            "A": (128, layer.shape[-1]),
            "B": (layer.shape[0], 128),
            "B bias": layer.shape[:1],
            "weight": layer.shape,
        }
        assert shape == expected[key.kind], name
        found.setdefault(key.kind, set()).update(
            part for part, _ in (layer.biases if key.kind == "B bias" else layer.weights)
        )
    every = component_of("transformer").source_shapes(config.transformer)
    assert found["A"] == found["B"]
    assert found["A"] | found["weight"] | found["B bias"] == every.keys()
