"""FLUX.1-dev and -schnell at full size: names, shapes and dtypes, without allocating weights."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.full_size import __file__ as script
from golden.full_size import unfold

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config, TransformerConfig
from jitjax.convert.components import component_of
from jitjax.convert.sources.diffusers_folder import prepare_model
from jitjax.convert.sources.layouts import recognise
from jitjax.convert.sources.tensors import WEIGHT_DTYPES, OriginalWeights

LISTS = json.loads(Path(script).with_suffix(".json").read_text())
PUBLISHED = {  # parameter counts, from the model cards and the sizes of the files
    "transformer": (11_901_408_320, 11_891_178_560),  # dev, schnell
    "t5": (4_762_310_656,) * 2,
    "clip": (123_060_480,) * 2,
    "autoencoder": (83_819_683,) * 2,
}
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


@pytest.mark.parametrize("title", LISTS)
def test_every_name_maps_and_every_parameter_is_filled(title):
    weights = ListedWeights(title)
    (model,) = recognise(weights.shapes, title)
    layout, is_schnell = model.layout, "schnell" in title
    config = layout.config(weights.shapes)
    settings = {"guidance_embeds": False} if is_schnell else {}
    assert config == CONFIGS[layout.model](**settings)
    component = component_of(layout.model)
    abstract = component.abstract_params(config)
    if layout.parts:
        shapes = component.source_shapes(config)
        weights = OriginalWeights(weights, layout.parts(config), shapes, label=title)
    prepared = prepare_model(component, config, weights, label=title, ignored=layout.ignored)
    leaves = jax.tree.leaves(abstract)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert count == PUBLISHED[layout.model][is_schnell]
    assert len(prepared.rules) == len(leaves)
    is_float32 = LISTS[title]["dtype"] == "F32"
    assert set(prepared.dtypes.values()) == {np.dtype(np.float32 if is_float32 else jnp.bfloat16)}
    assert prepared.bytes == count * (4 if is_float32 else 2)


def test_all_layouts_are_listed():
    titles = {recognise(ListedWeights(title).shapes, title)[0].layout.title for title in LISTS}
    assert len(titles) == 6
