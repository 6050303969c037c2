"""Merged low-rank updates against diffusers, which merges the same files with peft."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

from common import numpy_state  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_flux_parity import CONFIGS, reference  # noqa: E402

from jitjax.checkpoint import FluxParams  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.lora import merge_loras  # noqa: E402
from jitjax.convert.sources.single_files import whole_config  # noqa: E402
from jitjax.convert.tables.engine import leaves_by_path  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG = CONFIGS["guidance"]
# kohya's layer name -> output and input features, in units of the hidden width. There is no
# linear1 here, because diffusers converts it at FLUX's full width only.
LAYERS = {
    "double_blocks_0_img_attn_qkv": (3, 1),
    "double_blocks_1_txt_attn_qkv": (3, 1),
    "double_blocks_1_img_attn_proj": (1, 1),
    "double_blocks_0_img_mlp_0": (4, 1),
    "double_blocks_0_txt_mlp_2": (1, 4),
    "double_blocks_1_img_mod_lin": (6, 1),
    "single_blocks_2_linear2": (1, 5),
    "single_blocks_0_modulation_lin": (3, 1),
}


def peft_file(model, generator) -> dict[str, torch.Tensor]:
    """Updates of every linear layer of the blocks, with ranks 2 and 3 in turn, in peft's format."""
    tensors = {}
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if "blocks." in name and hasattr(module, "in_features")
    ]
    for i, (name, layer) in enumerate(layers):
        rank = 2 + i % 2
        a = torch.randn(rank, layer.in_features, generator=generator)
        b = torch.randn(layer.out_features, rank, generator=generator) / 10
        tensors |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return tensors


def kohya_file(generator) -> dict[str, torch.Tensor]:
    """Updates of `LAYERS` with rank 4 and alpha 3, in kohya's format."""
    tensors, h = {}, CONFIG.hidden
    for name, (rows, columns) in LAYERS.items():
        key = f"lora_unet_{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, columns * h, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows * h, 4, generator=generator) / 10
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    return tensors


def xlabs_file(generator) -> dict[str, torch.Tensor]:
    """Updates of the attention's layers with rank 3, in XLabs' format, which has no alpha."""
    tensors, h = {}, CONFIG.hidden
    for block, layer, rows, columns in (
        ("double_blocks.0", "qkv_lora1", 3, 1), ("double_blocks.0", "proj_lora1", 1, 1),
        ("double_blocks.1", "qkv_lora2", 3, 1), ("double_blocks.1", "proj_lora2", 1, 1),
        ("single_blocks.2", "qkv_lora", 3, 1), ("single_blocks.1", "proj_lora", 1, 5),
        ("single_blocks.0", "qkv_lora", 3, 1), ("double_blocks.1", "qkv_lora1", 3, 1),
    ):  # fmt: skip
        key = f"{block}.processor.{layer}"
        tensors[f"{key}.down.weight"] = torch.randn(3, columns * h, generator=generator)
        tensors[f"{key}.up.weight"] = torch.randn(rows * h, 3, generator=generator) / 10
    return tensors


FILES = {"peft": peft_file, "kohya": kohya_file, "xlabs": xlabs_file}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_equals_diffusers(tmp_path, kind, scale):
    generator = torch.Generator().manual_seed(3)
    model = reference(CONFIG, 0)
    trees = {"transformer": from_state("transformer", numpy_state(model), CONFIG)}
    state = FILES[kind](*((model,) if kind == "peft" else ()), generator)
    save_file(state, tmp_path / "lora.safetensors")

    other_components = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    pipeline = diffusers.FluxPipeline(transformer=model, **other_components)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    expected = leaves_by_path(from_state("transformer", numpy_state(model), CONFIG))

    params = FluxParams(
        **trees, t5={}, clip={}, autoencoder={},
        config=whole_config({"transformer": CONFIG}), tokenizer="",
    )  # fmt: skip
    merged = merge_loras(params, [(tmp_path / "lora.safetensors", scale)])
    got, before = leaves_by_path(merged.transformer), leaves_by_path(params.transformer)
    changed = 0
    for name, value in expected.items():
        # The order of the float32 sums differs.
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        changed += not np.array_equal(value, before[name])
    assert changed >= (6 if kind == "xlabs" else 8)
