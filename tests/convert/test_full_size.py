"""FLUX.1-dev and -schnell at full size, from names, shapes and dtypes: nothing is allocated."""

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
from jitjax.convert.sources.diffusers_folder import prepare
from jitjax.convert.sources.layouts import recognise
from jitjax.convert.sources.tensors import TYPES, OriginalWeights

LISTS = json.loads(Path(script).with_suffix(".json").read_text())
PUBLISHED = {  # parameters, as the model cards and the files' sizes have it
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


class Listed:
    """Stands in for `Weights`: all but the numbers."""

    def __init__(self, title: str):
        self.shapes = unfold(LISTS[title]["tensors"])
        self.types = dict.fromkeys(self.shapes, TYPES[LISTS[title]["dtype"]])

    def read(self, name, rows=None):
        raise AssertionError("no number is needed")


@pytest.mark.parametrize("title", LISTS)
def test_every_name_maps_and_every_parameter_is_filled(title):
    weights = Listed(title)
    (found,) = recognise(weights.shapes, title)
    layout, schnell = found.layout, "schnell" in title
    config = layout.config(weights.shapes)
    expected = {"guidance_embeds": False} if schnell else {}
    assert config == CONFIGS[layout.model](**expected)
    component = component_of(layout.model)
    abstract = component.abstract_params(config)
    if layout.parts:
        shapes = component.source_shapes(config)
        weights = OriginalWeights(weights, layout.parts(config), shapes, what=title)
    job = prepare(component, config, weights, what=title, ignored=layout.ignored)
    leaves = jax.tree.leaves(abstract)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert count == PUBLISHED[layout.model][schnell]
    assert len(job.rules) == len(leaves)
    wide = LISTS[title]["dtype"] == "F32"
    assert set(job.types.values()) == {np.dtype(np.float32 if wide else jnp.bfloat16)}
    assert job.bytes == count * (4 if wide else 2)


def test_all_layouts_are_listed():
    titles = {recognise(Listed(title).shapes, title)[0].layout.title for title in LISTS}
    assert len(titles) == 6
