"""Fill, Canny, Depth and Kontext: their layouts, their configurations, and folders both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.build import SMALL, random_tree, write_tokenizers
from test_layouts import TRANSFORMER, assert_equal, original_transformer, prefixed, write

import jitjax
from jitjax.checkpoint import FluxParams, abstract_params
from jitjax.config import TransformerConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import PIPELINES, component_of, from_state
from jitjax.convert.sources.diffusers_folder import read_config, read_folder
from jitjax.convert.sources.single_files import open_files, open_sources
from jitjax.convert.tables.engine import ConversionError
from jitjax.convert.targets.diffusers_folder import write_folder

LATENTS = TRANSFORMER.in_channels
WIDTHS = {"picture": 2 * LATENTS, "fill": 2 * LATENTS + 256}


def config_of(control: str) -> TransformerConfig:
    return dataclasses.replace(TRANSFORMER, in_channels=WIDTHS[control])


def state_of(control: str) -> dict[str, np.ndarray]:
    """Random weights under diffusers names."""
    rng = np.random.default_rng(1)
    shapes = component_of("transformer").source_shapes(config_of(control))
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def fp8(state: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Return the matrices in fp8 with a scale each, and the exact values."""
    stored, exact = {"scaled_fp8": np.zeros(0, jnp.float8_e4m3fn)}, {}
    for name, value in state.items():
        stored[name] = exact[name] = value
        if name.endswith("weight") and value.ndim == 2:
            stored[name] = value.astype(jnp.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = np.full((), 0.5, np.float32)
            exact[name] = stored[name].astype(np.float32) / 2
    return stored, exact


def write_gguf(path, state: dict[str, np.ndarray]):
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "flux")
    for name, value in state.items():
        writer.add_tensor(name, value, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("layout", ["diffusers", "original", "prefix", "fp8", "gguf"])
@pytest.mark.parametrize("control", WIDTHS)
def test_single_files(tmp_path, control, layout):
    state = state_of(control)
    expected = from_state("transformer", state, config_of(control))
    if layout != "diffusers":
        state = original_transformer(state)
    if layout == "gguf":
        file = write_gguf(tmp_path / "flux.gguf", state)
    elif layout == "fp8":
        state, exact = fp8(state)
        file = write(tmp_path, "flux", prefixed("model.diffusion_model.", state))
        expected = open_files([write(tmp_path, "exact", exact)]).read().transformer
    else:
        file = write(
            tmp_path, "flux", prefixed("model.diffusion_model." * (layout == "prefix"), state)
        )
    params = open_files([file], jnp.float32).read()
    assert params.config.transformer == config_of(control)
    assert params.config.transformer.control == control
    assert params.config.dynamic_shift  # FLUX.1-dev's schedule
    assert_equal(params.transformer, expected)
    assert params.transformer["image_in"]["kernel"].shape[0] == WIDTHS[control]
    assert params.transformer["image_out"]["kernel"].shape[1] == LATENTS


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (49, 16, "in_channels is 49 and out_channels is 16; expected in_channels 16 .*, 32 .* 288"),
        (16, 32, "in_channels is 16 and out_channels is 32"),
        (48, 16, "transformer.mask_channels is 16; expected pixels_per_token .. 2 = 256"),
    ],
)
def test_other_widths_are_refused(tmp_path, columns, rows, message):
    state = original_transformer(state_of("picture"))
    state["img_in.weight"] = np.ones((64, columns), np.float32)
    state["final_layer.linear.weight"] = np.ones((rows, 64), np.float32)
    state["final_layer.linear.bias"] = np.ones(rows, np.float32)
    with pytest.raises(ValueError, match=message) as caught:
        open_files([write(tmp_path, "odd", state)])
    assert "\n" not in str(caught.value)


def test_a_bias_of_another_width_is_named(tmp_path):
    state = original_transformer(state_of("fill"))
    state["final_layer.linear.bias"] = np.ones(WIDTHS["fill"], np.float32)
    with pytest.raises(ConversionError, match=r"linear.bias has shape \[288\]; expected \[16\]"):
        open_files([write(tmp_path, "odd", state)])


def small_params(folder, in_channels: int, **fields) -> FluxParams:
    """Return a random pipeline of some width; write its tokenizers."""
    transformer = dataclasses.replace(SMALL.transformer, in_channels=in_channels)
    config = dataclasses.replace(SMALL, transformer=transformer, **fields)
    write_tokenizers(folder)
    trees = random_tree(abstract_params(config), 0)
    return dataclasses.replace(trees, config=config, tokenizer=str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function of the pipeline: its diffusers folder and parameters."""
    widths = {"FluxFillPipeline": 384, "FluxControlPipeline": 128, "FluxKontextPipeline": 64}

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        fields = {"uses_reference": True} if name == "FluxKontextPipeline" else {}
        params = small_params(folder / "tokenizers", widths[name], **fields)
        write_folder(params, folder / "flux")
        return folder / "flux", params

    return make


@pytest.mark.parametrize(
    "name",
    [
        "FluxFillPipeline",
        pytest.param("FluxControlPipeline", marks=pytest.mark.slow),
        pytest.param("FluxKontextPipeline", marks=pytest.mark.slow),
    ],
)
def test_folders(tmp_path, folders, name):
    """Written with the class of their pipeline, and read and converted without change."""
    folder, params = folders(name)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == name
    loaded = read_folder(folder, parts=("transformer",))
    assert loaded.config == params.config
    jax.tree.map(np.testing.assert_array_equal, loaded.transformer, params.transformer)
    out = tmp_path / "checkpoint"
    assert main([str(folder), "--dtype", "float32", "--out", str(out)]) == 0
    loaded = jitjax.load(out, parts=("transformer",))
    assert loaded.config == params.config
    assert_equal(loaded.transformer, params.transformer)
    assert main([str(out), "--to-diffusers", "--out", str(tmp_path / "back")]) == 0
    assert read_config(tmp_path / "back") == params.config
    assert main([str(out), "--to-diffusers", "--overwrite", "--out", str(tmp_path / "back")]) == 0


def test_the_class_of_the_pipeline_says_what_is_kontext(tmp_path, folders):
    """FLUX.1 Kontext has FLUX.1-dev's shapes, so nothing else does; a name of a file never."""
    folder = tmp_path / "FLUX.1-Kontext-dev"
    shutil.copytree(folders("FluxKontextPipeline")[0], folder)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    for name in PIPELINES:
        index.write_text(json.dumps(content | {"_class_name": name}))
        assert read_config(folder).uses_reference == ("Kontext" in name), name
    index.write_text(json.dumps(content))
    assert open_sources(folder, {}).config.uses_reference
    transformer = folder / "transformer"
    replaced = open_sources(folder, {"transformer": transformer})
    assert not replaced.config.uses_reference
    assert not open_sources(transformer, {}).config.uses_reference


def test_the_rest_from_another_folder(tmp_path, folders):
    """The transformer of a single file, all else from the folder of another model."""
    source, _ = folders("FluxKontextPipeline")
    folder, params = folders("FluxFillPipeline")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    out = tmp_path / "fill"
    # A head of 8 is too narrow for a file without config.json, which says how it is divided.
    with pytest.raises(ValueError, match="expected a multiple of 32"):
        open_sources(source, {"transformer": file})
    arguments = [str(source), "--transformer", str(file.parent), "--dtype", "float32"]
    assert main([*arguments, "--out", str(out)]) == 0
    loaded = jitjax.load(out, parts=("transformer",))
    assert loaded.config.transformer == params.config.transformer
    assert loaded.config == dataclasses.replace(params.config, uses_reference=False)
    assert_equal(loaded.transformer, params.transformer)
