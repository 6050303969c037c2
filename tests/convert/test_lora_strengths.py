"""alpha / rank from every place where a LoRA file may state it, and files that contradict."""

from __future__ import annotations

import json
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, H, random_states

import jitjax
from jitjax.config import FluxConfig
from jitjax.convert.components import from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.tables.engine import ConversionError

RANK, COLUMNS = 4, CONFIGS["transformer"].in_channels
A, B = np.ones((RANK, COLUMNS), np.float32), np.ones((H, RANK), np.float32)
FULL = RANK  # each entry of B A


@pytest.fixture(scope="module")
def params():
    states = random_states()
    trees = {n: from_state(n, states[n], CONFIGS[n]) for n in ("transformer", "clip")}
    return jitjax.checkpoint.FluxParams(
        **trees, t5={}, autoencoder={}, config=FluxConfig(**CONFIGS), tokenizer=""
    )


def save(path, state, metadata=None):
    state = {k: np.array(v, order="C") for k, v in state.items()}  # keeps 0-d arrays
    save_file(state, path, metadata=metadata)
    return path


def pair(layer="transformer.x_embedder", a=A, b=B):
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


def change(params, file, scale=1.0) -> float:
    """Return the mean change of the first layer."""
    kernel = np.asarray(params.transformer["image_in"]["kernel"])
    merged = merge_loras(params, [(file, scale)]).transformer["image_in"]["kernel"]
    difference = merged - kernel
    np.testing.assert_allclose(difference, difference.mean(), atol=1e-4)
    return float(difference.mean())


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float32, np.float16, jnp.bfloat16, np.int64, np.int32, np.int16, np.int8,
     np.uint8, jnp.float8_e4m3fn],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_any_number_type(tmp_path, params, dtype, shape):
    state = pair() | {"transformer.x_embedder.alpha": np.full(shape, 2).astype(dtype)}
    file = save(tmp_path / "l.safetensors", state)
    assert change(params, file) == pytest.approx(FULL * 2 / RANK, rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (np.asarray(True), r"alpha is BOOL \[\]; expected one number"),
        (np.asarray([1.0, 2.0]), r"alpha is F64 \[2\]; expected one number"),
        (np.zeros((0,), np.float32), r"alpha is F32 \[0\]; expected one number"),
        (np.asarray(math.nan), "alpha is nan; expected a finite number"),
        (np.asarray(math.inf, np.float16), "alpha is inf; expected a finite number"),
    ],
)
def test_alpha_that_is_no_number(tmp_path, params, alpha, message):
    state = pair() | {"transformer.x_embedder.alpha": alpha}
    file = save(tmp_path / "l.safetensors", state)
    with pytest.raises(
        ConversionError, match=rf"l\.safetensors: transformer\.x_embedder\.{message}"
    ):
        merge_loras(params, [(file, 1.0)])


HEADERS = {
    "diffusers": {"lora_adapter_metadata": {"transformer.lora_alpha": 16, "transformer.r": 4}},
    "without prefix": {"lora_adapter_metadata": {"lora_alpha": 16, "r": 4, "alpha_pattern": {}}},
    "plain": {"lora_alpha": "16", "r": "4"},
    "plain prefix": {"transformer.lora_alpha": "16.0"},
    "both": {"lora_alpha": "16", "lora_adapter_metadata": {"transformer.lora_alpha": 16}},
    "pattern": {"lora_adapter_metadata": {"lora_alpha": 1, "alpha_pattern": {"x_embedder": 16}}},
    "first pattern": {
        "lora_adapter_metadata": {"alpha_pattern": {".*_embedder": 16, "x_embedder": 1}}
    },
    "rslora": {"lora_alpha": "8", "use_rslora": "True"},
    "other model": {"lora_alpha": "16", "text_encoder.lora_alpha": "2"},
}


def header(fields):
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}


@pytest.mark.parametrize("name", HEADERS)
def test_alpha_in_the_header(tmp_path, params, name):
    file = save(tmp_path / "l.safetensors", pair(), header(HEADERS[name]))
    assert change(params, file) == pytest.approx(16, rel=1e-4)


def test_adapter_config(tmp_path, params):
    """PEFT's file beside, or in a folder of another name; alpha 8 is PEFT's default."""
    file = save(tmp_path / "adapter_model.safetensors", pair("base_model.model.x_embedder"))
    config = tmp_path / "adapter_config.json"
    for settings, expected in (
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": False}, 16),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": True}, 32),
        ({"r": 8, "rank_pattern": {"x_embedder": 4}, "lora_alpha": 16}, 16),
        ({"r": 4}, 8),
    ):
        config.write_text(json.dumps(settings))
        assert change(params, file) == pytest.approx(expected, rel=1e-4)
        assert change(params, tmp_path) == pytest.approx(expected, rel=1e-4)
    renamed = file.rename(tmp_path / "ink.safetensors")
    assert change(params, renamed) == pytest.approx(8, rel=1e-4)
    # It belongs to PEFT's file, if there is one.
    save(file, pair("base_model.model.x_embedder"))
    assert change(params, renamed) == pytest.approx(FULL, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "alpha", "message"),
    [
        ({"lora_alpha": "16"}, 2, r"x_embedder has strength 2 / 4 by its \.alpha, but 16 / 4 by "
         r"header of .*l\.safetensors"),
        ({"lora_alpha": "2", "lora_adapter_metadata": {"lora_alpha": 4}}, None,
         r"4 / 4 by lora_adapter_metadata in the header of .*, but 2 / 4 by header of"),
        ({"lora_alpha": "2", "use_rslora": "true"}, 2, r"2 / 4 .*, but 2 / sqrt\(4\) by"),
        ({"r": "8"}, None, r"x_embedder has rank 4, but header of .*l\.safetensors says rank 8"),
        ({"lora_adapter_metadata": {"rank_pattern": {"x_embedder": 2}}}, None,
         "has rank 4, but .* says rank 2"),
    ],
)  # fmt: skip
def test_contradictions(tmp_path, params, fields, alpha, message):
    state = pair() | ({} if alpha is None else {"transformer.x_embedder.alpha": np.float32(alpha)})
    state = {k: np.asarray(v) for k, v in state.items()}
    file = save(tmp_path / "l.safetensors", state, header(fields))
    with pytest.raises(ConversionError, match=message) as caught:
        merge_loras(params, [(file, 1.0)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha is null; expected a finite number"),
        ({"transformer.lora_alpha": "16"}, 'transformer.lora_alpha is "16"; expected a finite'),
        ({"lora_alpha": [1]}, r"lora_alpha is \[1\]; expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha is true; expected a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha is NaN; expected a finite number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10*\.\.\.; expected a finite number"),
        ({"r": 0}, "r is 0; expected a positive integer"),
        ({"r": "4"}, 'r is "4"; expected a positive integer'),
        ({"alpha_pattern": None}, "alpha_pattern is null; expected an object of finite numbers"),
        ({"alpha_pattern": {"a": "b"}}, "expected an object of finite numbers"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; expected an object of positive integers"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\('; expected a regular expression"),
        ({"use_rslora": "yes"}, 'use_rslora is "yes"; expected true or false'),
        ({"peft_type": "OFT"}, 'peft_type is "OFT"; expected one of LORA, LOKR, LOHA'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true; expected it unset"),
        ({"init_lora_weights": "pissa_niter_4"}, "expected an initialisation that leaves the base"),
        ({"bias": 3}, 'bias is 3; expected "none", "all" or "lora_only"'),
        ({"modules_to_save": "x"}, "modules_to_save is .*; expected a list of names"),
        ([1], "contains a list; expected a JSON object"),
        ("{", "is not complete JSON"),
    ],
)
def test_settings_of_wrong_types(tmp_path, params, metadata, message):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    file = save(tmp_path / "l.safetensors", pair(), {"lora_adapter_metadata": text})
    with pytest.raises(ConversionError, match=message) as caught:
        merge_loras(params, [(file, 1.0)])
    assert "l.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kohyas_header_is_compared_only(tmp_path, params):
    """The .alpha tensors count; without them the alpha is in the matrices already."""
    state = {
        "lora_unet_img_in.lora_down.weight": A,
        "lora_unet_img_in.lora_up.weight": B,
        "lora_unet_img_in.alpha": np.asarray(2, np.int64),
    }
    path = tmp_path / "k.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = save(path, state, {"ss_network_alpha": "2.0", "ss_network_dim": "4"})
        assert change(params, file) == pytest.approx(2, rel=1e-4)
        save(path, state, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"})
        assert change(params, file) == pytest.approx(2, rel=1e-4)
    save(path, state, {"ss_network_alpha": "16", "ss_network_dim": "4"})
    with pytest.warns(
        UserWarning, match=r"is 16, but its \.alpha tensors are 2; the tensors count"
    ):
        assert change(params, file) == pytest.approx(2, rel=1e-4)
    del state["lora_unet_img_in.alpha"]
    save(path, state, {"ss_network_alpha": "1", "ss_network_dim": "4"})
    with pytest.warns(UserWarning, match="taken as already multiplied into the matrices"):
        assert change(params, file) == pytest.approx(FULL, rel=1e-4)
