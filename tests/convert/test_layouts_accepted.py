"""Names that other programs write, float64, and the schedule that single files do not have."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_layouts import (
    CONFIGS,
    assert_equal,
    original_transformer,
    prefixed,
    random_states,
    read_files,
    write,
)

import jitjax
from jitjax.convert.__main__ import main
from jitjax.convert.components import from_state
from jitjax.convert.sources.single_files import open_sources
from jitjax.loading import BUNDLED


@pytest.fixture(scope="module")
def states():
    return random_states()


@pytest.fixture
def tokenizers(tmp_path):
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_norms_saved_by_comfyui(tmp_path, states, prefix):
    state = original_transformer(states["transformer"])
    renamed = {re.sub(r"_norm\.scale$", "_norm.weight", name): v for name, v in state.items()}
    assert len(renamed.keys() - state.keys()) == 2 * (2 * 2 + 3)
    params = read_files([write(tmp_path, "flux", prefixed(prefix, renamed))])
    assert_equal(params.transformer, from_state("transformer", states["transformer"],
                                                CONFIGS["transformer"]))  # fmt: skip


def test_clip_of_transformers_5_and_whole_clip(tmp_path, states, tokenizers):
    state = states["clip"]
    expected = from_state("clip", state, CONFIGS["clip"])
    short = {name.removeprefix("text_model."): value for name, value in state.items()}
    one = np.ones((4, 4), np.float32)
    vision = {"vision_model.encoder.layers.0.self_attn.q_proj.weight": one,
              "visual_projection.weight": one, "text_projection.weight": one,
              "logit_scale": np.ones((), np.float32)}  # fmt: skip
    in_comfyui = prefixed("text_encoders.clip_l.transformer.", short)
    for number, names in enumerate((short, short | vision, state | vision, in_comfyui)):
        params = read_files([write(tmp_path, f"{number}", names)], tokenizers=tokenizers)
        assert params.config.clip == CONFIGS["clip"]
        assert_equal(params.clip, expected)


def test_t5_in_llama_cpp_names_and_whole_t5(tmp_path, states, tokenizers):
    """The GGUF names come from gguf-py's own map, which llama.cpp's converter uses."""
    import gguf

    state, config = states["t5"], CONFIGS["t5"]
    expected = from_state("t5", state, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config.num_layers)
    writer = gguf.GGUFWriter(tmp_path / "t5.GGUF", "t5encoder")
    for name, value in state.items():
        converted = names.get_name(name, try_suffixes=(".weight",))
        assert converted is not None
        writer.add_tensor(converted, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = state | {"decoder.final_layer_norm.weight": np.ones(6, np.float32),
                     "lm_head.weight": np.ones((11, 6), np.float32)}  # fmt: skip
    for path in (tmp_path / "t5.GGUF", write(tmp_path, "whole", whole)):
        params = read_files([path], tokenizers=tokenizers)
        assert params.config.t5 == config
        assert_equal(params.t5, expected)


def test_float64_becomes_float32(tmp_path, states):
    state = {name: value.astype(np.float64) for name, value in states["transformer"].items()}
    path, out = write(tmp_path, "flux", state), tmp_path / "out"
    assert main([str(path), "--dtype", "auto", "--out", str(out)]) == 0
    assert main(["--verify", str(out)]) == 0
    expected = from_state("transformer", states["transformer"], CONFIGS["transformer"])
    assert_equal(jitjax.load(out).transformer, expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("auto", (256, False, 1.0)), ("dev", (512, True, 3.0)), ("schnell", (256, False, 1.0))],
)
def test_schedule_of_a_transformer_without_guidance(tmp_path, states, capsys, schedule, expected):
    state = {n: v for n, v in states["transformer"].items() if "guidance" not in n}
    path, out = str(write(tmp_path, "flux", state)), str(tmp_path / "out")
    assert main([path, "--schedule", schedule, "--out", out]) == 0
    config = jitjax.load(out).config
    assert (config.text_length, config.dynamic_shift, config.shift) == expected
    notes = [line for line in capsys.readouterr().err.splitlines() if "--schedule" in line]
    assert len(notes) == (schedule == "auto")


def test_transformer_of_another_kind_in_a_folder(tmp_path):
    """The schedule is the folder's, with a warning, or the one that is asked for."""
    state = load_file(BUNDLED / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors")
    other = {name: value for name, value in state.items() if "guidance" not in name}
    files = {"transformer": write(tmp_path, "other", other)}
    with pytest.warns(UserWarning, match="has no guidance, unlike that of .* --schedule dev or"):
        kept = open_sources(BUNDLED / "tiny", files).config
    assert not kept.transformer.guidance_embeds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = open_sources(BUNDLED / "tiny", {}).config
        asked = open_sources(BUNDLED / "tiny", files, schedule="schnell").config
    assert (kept.text_length, kept.dynamic_shift) == (own.text_length, own.dynamic_shift)
    assert (asked.text_length, asked.dynamic_shift, asked.shift) == (256, False, 1.0)


def test_clip_saved_by_transformers_5_in_a_folder_of_its_own(tmp_path, states, tokenizers):
    folder = tmp_path / "clip"
    folder.mkdir()
    short = {name.removeprefix("text_model."): value for name, value in states["clip"].items()}
    write(folder, "model", short)
    config = {"model_type": "clip_text_model"} | dataclasses.asdict(CONFIGS["clip"])
    (folder / "config.json").write_text(json.dumps(config))
    params = read_files([folder], tokenizers=tokenizers)
    assert_equal(params.clip, from_state("clip", states["clip"], CONFIGS["clip"]))
    # The settings of the text half of a whole CLIP; no shape shows the number of heads.
    whole = {"model_type": "clip", "text_config": config, "vision_config": {}, "hidden_size": 3}
    (folder / "config.json").write_text(json.dumps(whole))
    assert read_files([folder], tokenizers=tokenizers).config.clip == CONFIGS["clip"]
    (folder / "config.json").write_text(json.dumps(whole | {"text_config": None}))
    with pytest.raises(ValueError, match="text_config is None; expected"):
        read_files([folder], tokenizers=tokenizers)
