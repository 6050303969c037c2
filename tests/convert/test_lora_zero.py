"""LoRA files whose updates are all 0: the parameters stay, and one line says so."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, H, random_states

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.convert.components import from_state
from jitjax.convert.lora import merge_loras


@pytest.fixture(scope="module")
def params():
    trees = {
        name: from_state(name, state, CONFIGS[name]) for name, state in random_states().items()
    }
    return FluxParams(**trees, config=FluxConfig(**CONFIGS), tokenizer="")


def ones(*shape):
    return np.ones(shape, np.float32)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def names(**kinds):
    return {f"transformer.x_embedder.{kind.replace('__', '.')}": v for kind, v in kinds.items()}


PAIR = {"lora_A__weight": ones(2, 16), "lora_B__weight": ones(H, 2)}
ZERO = {
    "B": PAIR | {"lora_B__weight": zeros(H, 2)},
    "A": PAIR | {"lora_A__weight": -zeros(2, 16)},
    "alpha": PAIR | {"alpha": zeros(1)},
    "LoHa": {"hada_w1_a": ones(H, 2), "hada_w1_b": ones(2, 16), "hada_w2_a": zeros(H, 2),
             "hada_w2_b": ones(2, 16)},
    "LoKr": {"lokr_w1": zeros(2, 2), "lokr_w2": ones(H // 2, 8)},
    "difference": {"diff": zeros(H, 16), "diff_b": zeros(H)},
}  # fmt: skip


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got.transformer, expected.transformer)


@pytest.mark.parametrize("name", ZERO)
def test_zero_is_told(tmp_path, params, name):
    file = tmp_path / "zero.safetensors"
    save_file(names(**ZERO[name]), file)
    reason = "alpha" if name == "alpha" else "B or A"
    with pytest.warns(UserWarning, match="changes nothing") as told:
        merged = merge_loras(params, [(file, 1.0)])
    assert [str(warning.message) for warning in told] == [
        f"{file}: changes nothing, because {reason} is 0 in all of its updates"
    ]
    assert_same(merged, params)


@pytest.mark.parametrize(
    ("state", "scale"),
    [
        (names(**ZERO["B"]), 0.0),  # asked for
        (names(**PAIR), 0.0),
        (names(**PAIR), 1.0),
        (names(**ZERO["B"], diff_b=ones(H)), 1.0),  # one of its updates is not 0
        # The magnitudes change the weight, though B is 0.
        (names(**ZERO["B"], lora_magnitude_vector=ones(H)), 1.0),
    ],
)
def test_nothing_is_told_otherwise(tmp_path, params, state, scale):
    file = tmp_path / "lora.safetensors"
    save_file(state, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_loras(params, [(file, scale)])
    if not scale:
        assert_same(merged, params)
    else:
        with pytest.raises(AssertionError):
            assert_same(merged, params)
