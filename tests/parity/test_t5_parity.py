"""The T5 encoder against transformers' `T5EncoderModel`, with weights by the rule table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from common import TOLERANCE, numpy_state, randomised, relative_error  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from jitjax.config import T5Config  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.tables import engine  # noqa: E402
from jitjax.convert.tables.text import t5_rules  # noqa: E402
from jitjax.models import param_shapes  # noqa: E402
from jitjax.models.t5 import T5Encoder, relative_buckets  # noqa: E402
from jitjax.nested import flatten  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    "wide heads": T5Config(
        vocab_size=61,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=3,
        num_heads=5,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=20,
    ),
    "default buckets": T5Config(
        vocab_size=33, d_model=32, d_kv=16, d_ff=20, num_layers=2, num_heads=2
    ),
}


def torch_config(config: T5Config):
    return transformers.T5Config(**dataclasses.asdict(config), feed_forward_proj="gated-gelu")


def reference(config: T5Config, seed: int):
    return randomised(transformers.T5EncoderModel(torch_config(config)), seed)


def run(config: T5Config, params, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    mask = None if mask is None else jnp.asarray(mask)
    with jax.default_matmul_precision("highest"):
        encode = jax.jit(T5Encoder(config).apply)
        return np.asarray(encode({"params": params}, jnp.asarray(ids), mask))


@pytest.mark.parametrize(
    ("batch", "length", "masked"), [(1, 7, False), (3, 45, True), (1, 150, False), (3, 150, True)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, batch: int, length: int, masked: bool):
    config = CONFIGS[name]
    model = reference(config, seed=batch)
    rng = np.random.default_rng(length)
    ids = rng.integers(0, config.vocab_size, (batch, length))
    mask = np.arange(length)[None] < rng.integers(1, length, (batch, 1)) if masked else None
    with torch.no_grad():
        expected = model(
            torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask)
        ).last_hidden_state.numpy()
    got = run(config, from_state("t5", numpy_state(model), config), ids, mask)
    error = relative_error(got, expected)
    print(f"T5 {name}, masked {masked}, {batch} x {length}: {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 128), (16, 20), (32, 100), (8, 64), (64, 999)]
)
def test_relative_buckets(buckets: int, distance: int):
    """Exactly equal, even where the logarithm lies on the boundary of two buckets."""
    length = 1200
    offset = torch.arange(length)[None] - torch.arange(length)[:, None]
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(offset, True, buckets, distance).numpy()
    np.testing.assert_array_equal(relative_buckets(length, buckets, distance), expected)


def test_full_size_names_and_shapes():
    config = T5Config()
    with torch.device("meta"):
        model = transformers.T5EncoderModel(torch_config(config))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = state.pop("encoder.embed_tokens.weight")
    assert tied == state["shared.weight"]
    shapes = engine.leaf_shapes(param_shapes.t5(config))
    assert engine.expected_sources(t5_rules(config), shapes) == state
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656


def test_tied_tensor_names(tmp_path):
    """Files of transformers 5, files with the other name of the tied tensor, files with both."""
    config = CONFIGS["wide heads"]
    model = reference(config, seed=0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = dict(saved)
    other["encoder.embed_tokens.weight"] = other.pop("shared.weight")
    ids = np.arange(7)[None]
    outputs = [
        run(config, from_state("t5", state, config), ids, None)
        for state in (saved, other, saved | other)
    ]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_transformers_loads_inverted_rules(tmp_path):
    """transformers loads the tensors of the inverted rule table: no missing or unexpected key."""
    config = CONFIGS["wide heads"]
    state = numpy_state(reference(config, seed=0))
    leaves = flatten(from_state("t5", state, config))
    tensors: dict[str, np.ndarray] = {}
    for rule in t5_rules(config):
        tensors |= engine.invert_rule(rule, leaves[rule.target])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    torch_config(config).save_pretrained(tmp_path)
    model, info = transformers.T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name], err_msg=name)
