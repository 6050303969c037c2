"""Diffusers folders with wrong JSON: one line that names the file, the key and what is expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jitjax
from jitjax.config import AutoencoderConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.convert.__main__ import main
from jitjax.convert.sources.diffusers_folder import read_config, weight_files
from jitjax.convert.targets.diffusers_folder import write_folder
from jitjax.loading import BUNDLED
from jitjax.validation import MAX_LINES, listed


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(BUNDLED / "tiny", tmp_path / "FLUX"))


TRANSFORMER, VAE = "transformer/config.json", "vae/config.json"
T5, CLIP = "text_encoder_2/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer_2/tokenizer_config.json"
NAN, INF = float("nan"), float("inf")

CASES = [
    *((TRANSFORMER, "num_layers", v) for v in (10**9, "3", None, 0, -1, 1.5, True, [3], {}, NAN)),
    *((TRANSFORMER, "axes_dims_rope", v) for v in (5, "abc", None, [1], [[1]], {"a": 1}, ["4"])),
    *((TRANSFORMER, "guidance_embeds", v) for v in ("false", 0, None, [])),
    *((TRANSFORMER, key, "64") for key in ("in_channels", "out_channels", "patch_size")),
    *((VAE, "block_out_channels", v) for v in ("64", 64, None, [], [None], [64] * 99, ["64"])),
    *((VAE, "scaling_factor", v) for v in (INF, NAN, 0, -1, "1", None, True, 10**400)),
    *((VAE, "shift_factor", v) for v in ("x", None, NAN, [])),
    *((VAE, "sample_size", v) for v in ("64", 0, 10**9, [64, 64], 64.5)),
    *((T5, "layer_norm_epsilon", v) for v in ("1e-6", -5, NAN, None, [])),
    *((T5, "relative_attention_num_buckets", v) for v in (1, "32", 10**9)),
    *((CLIP, "eos_token_id", v) for v in ([1], None, -1, "2")),
    *((CLIP, "hidden_act", v) for v in (None, 3, "relu", ["gelu"])),
    *((SCHEDULER, "shift", v) for v in (0, None, "3", NAN, INF, -1, True)),
    *((SCHEDULER, "base_shift", v) for v in ("a", None, 1e308)),
    *((SCHEDULER, "base_image_seq_len", v) for v in ("256", None, 0, 256.5)),
    *((SCHEDULER, "use_dynamic_shifting", v) for v in ("false", 1, None)),
    *((TOKENIZER, "model_max_length", v) for v in ("512", 0, -1, NAN, [], {})),
    *(("model_index.json", "_class_name", v) for v in (None, 3, [], "x" * 999)),
]


@pytest.mark.parametrize(("file", "key", "value"), CASES)
def test_wrong_value(folder, file, key, value):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=key) as caught:
        read_config(folder)
    message = str(caught.value)
    assert str(folder / file) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(folder))


@pytest.mark.parametrize(
    ("key", "usual"), [("scaling_factor", "0.3611"), ("shift_factor", "0.1159")]
)
def test_missing_factor_of_the_latents(folder, key, usual):
    """diffusers takes 0.18215 without a word, or fails with `None`."""
    content = json.loads((folder / VAE).read_text())
    del content[key]
    (folder / VAE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{key} is missing; .*{usual}") as caught:
        read_config(folder)
    assert str(folder / VAE) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value", "read", "expected"),
    [
        (TOKENIZER, "model_max_length", 10**30, lambda c: c.text_length, 512),
        (TOKENIZER, "model_max_length", 100, lambda c: c.text_length, 100),
        (TOKENIZER, "model_max_length", None, lambda c: c.text_length, 512),
        (VAE, "scaling_factor", 1, lambda c: c.autoencoder.scaling_factor, 1.0),
        (VAE, "sample_size", None, lambda c: c.image_size, 1024),
    ],
)
def test_value_that_is_right(folder, file, key, value, read, expected):
    """Also after a byte order mark, which editors on Windows write."""
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text("\ufeff" + json.dumps(content | {key: value}), encoding="utf-8")
    got = read(read_config(folder))
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    "text", ["", "null", "3", "[]", "[" * 10**5, '{"a": ' * 10**5, '{"a": 1, "a": 2}', '{"a": 1'],
)  # fmt: skip
def test_broken_file(folder, text):
    for file in (TRANSFORMER, SCHEDULER, TOKENIZER, "model_index.json"):
        before = (folder / file).read_text()
        (folder / file).write_text(text)
        with pytest.raises(ValueError, match=file.rpartition("/")[2]) as caught:
            read_config(folder)
        assert "\n" not in str(caught.value)
        (folder / file).write_text(before)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], 3, {"a": 3}, {"a": None}, {"a": ["b"]}, {"a": "../x.safetensors"},
     {"a": "/x.safetensors"}, {"a": "sub/x.safetensors"}, {"a": "..\\x"}, {"a": ""}, {"a": ".."}],
)  # fmt: skip
def test_wrong_index(tmp_path, weight_map):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json") as caught:
        weight_files(tmp_path, "model")
    assert "\n" not in str(caught.value)


def test_numpy_values_and_lists_are_normalised(unchecked):
    config = FluxConfig(
        transformer=TransformerConfig(num_layers=np.int64(3), axes_dims_rope=[16, 56, 56]),  # pyright: ignore[reportArgumentType]
        autoencoder=AutoencoderConfig(block_out_channels=np.array([128, 256]), scaling_factor=1),  # pyright: ignore[reportArgumentType]
        shift=np.float32(0.5),  # pyright: ignore[reportArgumentType]
    )
    assert type(config.transformer.num_layers) is int
    assert config.transformer.axes_dims_rope == (16, 56, 56)
    assert config.autoencoder.block_out_channels == (128, 256)
    assert type(config.autoencoder.scaling_factor) is float
    assert hash(config) == hash(config)
    for value in ("3", True, 3.0, np.bool_(True), np.array([3]), 10**5000):
        with pytest.raises(ValueError, match=r"T5Config.num_layers is .*; expected an integer"):
            T5Config(num_layers=value)  # pyright: ignore[reportArgumentType]


def test_lists_are_cut():
    lines = listed(str(i) for i in range(100)).splitlines()
    assert len(lines) == MAX_LINES + 2
    assert lines[-1] == "  and 80 more"


def test_overwrite_keeps_what_it_did_not_write(small, tmp_path):
    out = tmp_path / "FLUX"
    write_folder(small, out)
    (out / "flux1-dev.safetensors").write_bytes(b"the user's")
    (out / "notes.txt").write_text("text")
    write_folder(small, out, overwrite=True)
    assert (out / "flux1-dev.safetensors").read_bytes() == b"the user's"
    assert (out / "notes.txt").read_text() == "text"
    (out / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(FileExistsError, match="is a diffusers folder of 'StableDiffusionXL"):
        write_folder(small, out, overwrite=True)


def test_transformer_alone_is_no_diffusers_folder(small, tmp_path, capsys):
    alone = jitjax.FluxParams(small.transformer, {}, {}, {}, small.config, "")
    message = "has no t5, clip, autoencoder; a diffusers folder needs transformer, t5, clip"
    with pytest.raises(ValueError, match=message):
        write_folder(alone, tmp_path / "out")
    jitjax.save(alone, tmp_path / "saved")
    assert main([str(tmp_path / "saved"), "--to-diffusers", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
