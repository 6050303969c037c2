"""Files with strange names, keys and settings: read, or refused by one line."""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, H, original_transformer, random_states, read_files

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.tables.engine import ConversionError

STATES = random_states()
LAYER = "transformer.x_embedder"


@pytest.fixture(scope="module")
def params():
    tree = from_state("transformer", STATES["transformer"], CONFIGS["transformer"])
    return FluxParams(
        transformer=tree, clip={}, t5={}, autoencoder={}, config=FluxConfig(**CONFIGS), tokenizer=""
    )


def save(path, state, metadata=None):
    save_file({name: np.array(value, order="C") for name, value in state.items()}, path, metadata)
    return path


def pair(layer=LAYER, a="lora_A.weight", b="lora_B.weight"):
    return {f"{layer}.{a}": np.ones((4, 16)), f"{layer}.{b}": np.full((H, 4), 0.25)}


def kernel(params) -> np.ndarray:
    return np.asarray(params.transformer["image_in"]["kernel"], np.float64)


@pytest.mark.parametrize(
    "name", ["\u58a8 \u6c34.safetensors", "a:b.safetensors", "a\nb.safetensors"]
)
def test_names_of_files(tmp_path, params, name):
    merged = merge_loras(params, [(save(tmp_path / name, pair()), 1.0)])
    np.testing.assert_allclose(kernel(merged), kernel(params) + 1, atol=1e-6)


@pytest.mark.parametrize("prefix", ["module.", "transformer.module.", "module.base_model.model."])
def test_lora_saved_in_training_on_several_devices(tmp_path, params, prefix):
    file = save(tmp_path / "l.safetensors", pair(f"{prefix}x_embedder"))
    np.testing.assert_allclose(
        kernel(merge_loras(params, [(file, 1.0)])), kernel(params) + 1, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["", "img_in\n.weight", "\x1b[31mimg_in.weight", "img_in.weight\u200b", "\u202eimg_in"]
)
def test_tensors_that_would_garble_messages(tmp_path, params, name):
    file = save(tmp_path / "a.safetensors", {name: np.ones(1)})
    for read in (lambda: read_files([file]), lambda: merge_loras(params, [(file, 1.0)])):
        with pytest.raises(ValueError, match="expected a name of printable") as caught:
            read()
        assert str(caught.value).isprintable()
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b"), [("lora_a.weight", "lora_b.weight"), ("A.weight", "B.weight"), ("lora_a", "lora_b")]
)
def test_suffixes_that_are_not_known(tmp_path, params, a, b):
    """Some trainers transpose matrices of these names, so they are not guessed."""
    file = save(tmp_path / "l.safetensors", pair(a=a, b=b))
    with pytest.raises(ConversionError, match=f"unknown key: {LAYER}.{a}"):
        merge_loras(params, [(file, 1.0)])


def test_model_in_place_of_a_lora(tmp_path, params):
    file = save(tmp_path / "m.safetensors", original_transformer(STATES["transformer"]))
    with pytest.raises(ConversionError, match=r"has whole weights .* expected a LoRA, not a model"):
        merge_loras(params, [(file, 1.0)])


def test_setting_that_is_given_twice(tmp_path, params):
    text = '{"transformer.lora_alpha": 2, "transformer.lora_alpha": 16}'
    file = save(tmp_path / "l.safetensors", pair(), {"lora_adapter_metadata": text})
    with pytest.raises(
        ConversionError, match=r"lora_adapter_metadata .* gives the key .*lora_alpha' two values"
    ):
        merge_loras(params, [(file, 1.0)])


def test_paths_that_are_no_files(tmp_path, capsys):
    os.symlink(tmp_path / "one", tmp_path / "two")
    os.symlink(tmp_path / "two", tmp_path / "one")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("one", "one is a circle of symbolic links; expected a file or folder"),
        ("pipe", "pipe is a pipe or a device; expected a file or folder"),
    ):
        out = str(tmp_path / "out")
        assert main(["--transformer", str(tmp_path / name), "--out", out]) == 2
        assert message in capsys.readouterr().err


def test_shards_of_which_the_index_lists_one(tmp_path):
    """The layout is named that the first shard fits, and what it lacks."""
    state = STATES["transformer"]
    first = {name: value for name, value in state.items() if "single" not in name}
    with pytest.raises(ValueError, match=r"shares (\d+) of \1 names .* but lacks 'single_transf"):
        read_files([save(tmp_path / "first.safetensors", first)])


def test_damaged_gguf(tmp_path):
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in original_transformer(STATES["transformer"]).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    assert read_files([path]).config.transformer == CONFIGS["transformer"]
    number = (2**60).to_bytes(8, "little")
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"GGUF" + (99).to_bytes(4, "little") + whole[8:],
        whole[:8] + number + whole[16:],  # tensors
        whole[:16] + number + whole[24:],  # settings
        b"GGUF" + bytes(range(256)),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete GGUF file") as caught:
            read_files([path])
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
