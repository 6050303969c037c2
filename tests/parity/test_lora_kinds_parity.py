"""Merged DoRA, LoHa, LoKr, biases and PEFT's settings against PEFT, at two ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

from common import numpy_state  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_flux_parity import CONFIGS, reference  # noqa: E402

from jitjax.checkpoint import FluxParams  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.lora import merge_loras  # noqa: E402
from jitjax.convert.sources.single_files import whole_config  # noqa: E402
from jitjax.convert.tables.engine import leaves_by_path  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG = CONFIGS["guidance"]
TARGETS = ["to_q", "to_v", "add_k_proj", "to_out.0", "proj_mlp", "x_embedder", "norm1.linear"]


def parameters(model) -> FluxParams:
    return FluxParams(
        transformer=from_state("transformer", numpy_state(model), CONFIG),
        t5={}, clip={}, autoencoder={},
        config=whole_config({"transformer": CONFIG}), tokenizer="",
    )  # fmt: skip


def randomise(model) -> None:
    """Give every parameter of the adapter random values; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value *= 0.5 + torch.rand(value.shape, generator=generator)
            elif any(kind in name for kind in ("lora_", "hada_", "lokr_")):
                value.copy_(torch.randn(value.shape, generator=generator) / 4)


def assert_merged(result: FluxParams, model, before: FluxParams) -> None:
    """Compare with PEFT's merged model; at least 5 leaves have changed."""
    expected = leaves_by_path(from_state("transformer", numpy_state(model), CONFIG))
    old, changed = leaves_by_path(before.transformer), 0
    for name, value in leaves_by_path(result.transformer).items():
        # The order of the float32 sums differs.
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-5, err_msg=name)
        changed += not np.array_equal(value, old[name])
    assert changed >= 5


CONFIGURATIONS = {
    "plain": lambda r: peft.LoraConfig(r=r, lora_alpha=3, target_modules=TARGETS),
    "rslora": lambda r: peft.LoraConfig(r=r, lora_alpha=3, use_rslora=True, target_modules=TARGETS),
    "patterns": lambda r: peft.LoraConfig(
        r=r,
        lora_alpha=3,
        target_modules=TARGETS,
        rank_pattern={r"transformer_blocks.1.attn.to_q": r + 1, "proj_mlp": 1},
        # The first pattern that matches counts.
        alpha_pattern={r".*\.to_v": 7, "transformer_blocks.0.attn.to_v": 11, "x_embedder": 5},
    ),
    "bias": lambda r: peft.LoraConfig(r=r, lora_alpha=3, lora_bias=True, target_modules=TARGETS),
    "dora": lambda r: peft.LoraConfig(r=r, lora_alpha=3, use_dora=True, target_modules=TARGETS),
    "loha": lambda r: peft.LoHaConfig(r=r, alpha=3, target_modules=TARGETS),
    "lokr": lambda r: peft.LoKrConfig(r=r, alpha=3, target_modules=TARGETS),
    "lokr both": lambda r: peft.LoKrConfig(
        r=r, alpha=3, decompose_both=True, decompose_factor=4, target_modules=TARGETS
    ),
}


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_equals_merged_peft(tmp_path, kind, rank):
    """A folder that PEFT saved, its file, and merging by PEFT."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    wrapped = peft.get_peft_model(model, CONFIGURATIONS[kind](rank))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload()
    assert_merged(merge_loras(before, [(tmp_path, 1.0)]), merged, before)
    file = tmp_path / "adapter_model.safetensors"
    assert_merged(merge_loras(before, [(file, 1.0)]), merged, before)


def test_two_dora_in_order(tmp_path):
    """The second DoRA normalises what the first has made, also in fused leaves."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    for name in ("first", "second"):
        config = peft.LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=TARGETS)
        wrapped = peft.get_peft_model(model, config)
        randomise(wrapped)
        wrapped.save_pretrained(tmp_path / name)
        model = wrapped.merge_and_unload()
    loras = [(tmp_path / "first", 1.0), (tmp_path / "second", 1.0)]
    assert_merged(merge_loras(before, loras), model, before)


@pytest.mark.parametrize("rslora", [False, True])
def test_save_lora_adapter(tmp_path, rslora):
    """diffusers' own file of a model has names and metadata without prefix."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    patterns = {"alpha_pattern": {"x_embedder": 9}, "rank_pattern": {"proj_mlp": 1}}
    model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules=TARGETS, **patterns)
    )
    randomise(model)
    model.save_lora_adapter(tmp_path)
    model.fuse_lora()
    model.unload_lora()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert_merged(merge_loras(before, [(file, 1.0)]), model, before)


def test_save_lora_weights(tmp_path):
    """diffusers' own file of a pipeline has names and metadata with the prefix `transformer.`."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    patterns = {"alpha_pattern": {"x_embedder": 9}, "rank_pattern": {"proj_mlp": 1}}
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, **patterns))
    randomise(model)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    model.fuse_lora()
    model.unload_lora()
    assert_merged(merge_loras(before, [(tmp_path, 1.0)]), model, before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_and_modules(tmp_path, bias):
    """PEFT saves the biases and modules that were trained besides as whole tensors."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    config = peft.LoraConfig(
        r=3, lora_alpha=4, bias=bias, target_modules=TARGETS, modules_to_save=["proj_out"]
    )
    wrapped = peft.get_peft_model(model, config)
    randomise(wrapped)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if value.requires_grad and "lora_" not in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(tmp_path)
    assert_merged(merge_loras(before, [(tmp_path, 1.0)]), wrapped.merge_and_unload(), before)


def test_scale_is_linear_in_the_trained_change(tmp_path):
    """Also DoRA at scale s is W + s (trained - W); 0 changes nothing."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    wrapped = peft.get_peft_model(model, CONFIGURATIONS["dora"](3))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    whole = leaves_by_path(merge_loras(before, [(tmp_path, 1.0)]).transformer)
    old = leaves_by_path(before.transformer)
    for scale in (0.0, 0.3, -0.5):
        for name, value in leaves_by_path(
            merge_loras(before, [(tmp_path, scale)]).transformer
        ).items():
            expected = old[name] + scale * (whole[name] - old[name])
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_disagreeing_strengths(tmp_path):
    """An adapter_config.json that does not belong to the file is noticed."""
    model = reference(CONFIG, 0)
    before = parameters(model)
    wrapped = peft.get_peft_model(model, CONFIGURATIONS["plain"](2))
    wrapped.save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(file), file, metadata={"lora_alpha": "6"})
    with pytest.raises(ValueError, match=r"strength 6 / 2 by header of .*, but 3 / 2 by .*json"):
        merge_loras(before, [(file, 1.0)])
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"lora_alpha": 6, "r": 4}))
    with pytest.raises(ValueError, match=r"has rank 2, but .*adapter_config.json says rank 4"):
        merge_loras(before, [(file, 1.0)])
