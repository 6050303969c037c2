"""The CLIP text encoder against transformers' `CLIPTextModel`, with weights by the rule table."""

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

from jitjax.config import CLIPConfig  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.tables import engine  # noqa: E402
from jitjax.convert.tables.text import clip_rules  # noqa: E402
from jitjax.models import param_shapes  # noqa: E402
from jitjax.models.clip import CLIPText  # noqa: E402
from jitjax.nested import flatten  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    "quick gelu, old end of text": CLIPConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=19,
        layer_norm_eps=1e-5,
        eos_token_id=2,
        hidden_act="quick_gelu",
    ),
    "gelu, new end of text": CLIPConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=23,
        layer_norm_eps=1e-3,
        eos_token_id=37,
        hidden_act="gelu",
    ),
}


def torch_config(config: CLIPConfig):
    special_ids = {"bos_token_id": 0, "pad_token_id": 1}
    return transformers.CLIPTextConfig(**dataclasses.asdict(config), **special_ids)


def reference(config: CLIPConfig, seed: int):
    return randomised(transformers.CLIPTextModel(torch_config(config)), seed)


def run(config: CLIPConfig, params, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with jax.default_matmul_precision("highest"):
        encode = jax.jit(CLIPText(config).apply)
        hidden, pooled = encode({"params": params}, jnp.asarray(ids))
    return np.asarray(hidden), np.asarray(pooled)


def random_ids(config: CLIPConfig, length: int) -> np.ndarray:
    """Random token ids [7, length], with the end-of-text token at a different place in each row."""
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = np.random.default_rng(length).integers(2, config.vocab_size, (7, length))
    ids[ids == end] = 5
    ids[0, 1:] = end  # One token, padded with the end of text.
    ids[1, 3:] = end  # Three tokens, padded with the end of text.
    ids[2, 4], ids[2, 5:] = end, 1  # Padded with another id.
    ids[3, [2, -1]] = end  # Two end-of-text tokens.
    ids[4, -1] = end  # No padding.
    ids[5, 0] = end  # The end of text comes first.
    return ids  # The last row has no end of text.


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (7, 19)])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, batch: int, length: int):
    config = CONFIGS[name]
    model = reference(config, seed=batch)
    ids = random_ids(config, length)[:batch]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids))
    hidden, pooled = run(config, from_state("clip", numpy_state(model), config), ids)
    hidden_error = relative_error(hidden, expected.last_hidden_state.numpy())
    pooled_error = relative_error(pooled, expected.pooler_output.numpy())
    print(f"CLIP {name}, {batch} x {length}: {hidden_error:.1e}, {pooled_error:.1e}")
    assert hidden_error < TOLERANCE
    assert pooled_error < TOLERANCE


def test_full_size_names_and_shapes():
    """Names are those of the published files, with the prefix that transformers 5 drops."""
    config = CLIPConfig()
    with torch.device("meta"):
        model = transformers.CLIPTextModel(torch_config(config))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in state.items()}
    shapes = engine.leaf_shapes(param_shapes.clip(config))
    assert engine.expected_sources(clip_rules(config), shapes) == state
    assert sum(p.numel() for p in model.parameters()) == 123_060_480


def test_tensor_names_with_and_without_prefix(tmp_path):
    """Files of transformers 5, and published files, which have the prefix and `position_ids`."""
    config = CONFIGS["gelu, new end of text"]
    model = reference(config, seed=0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    unprefixed = {name.removeprefix("text_model."): value for name, value in saved.items()}
    prefixed = {f"text_model.{name}": value for name, value in unprefixed.items()}
    published = prefixed | {"text_model.embeddings.position_ids": np.arange(23)[None]}
    ids = np.arange(7)[None]
    outputs = [
        run(config, from_state("clip", state, config), ids)[0]
        for state in (saved, unprefixed, published)
    ]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])
    name = "final_layer_norm.bias"
    with pytest.raises(engine.ConversionError, match=r"unmatched key: final_layer_norm.bias"):
        from_state("clip", prefixed | {name: unprefixed[name]}, config)


def test_transformers_loads_inverted_rules(tmp_path):
    """transformers loads the tensors of the inverted rule table: no missing or unexpected key."""
    config = CONFIGS["quick gelu, old end of text"]
    state = numpy_state(reference(config, seed=0))
    leaves = flatten(from_state("clip", state, config))
    tensors: dict[str, np.ndarray] = {}
    for rule in clip_rules(config):
        tensors |= engine.invert_rule(rule, leaves[rule.target])
    assert all(name.startswith("text_model.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    torch_config(config).save_pretrained(tmp_path)
    model, info = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name], err_msg=name)
