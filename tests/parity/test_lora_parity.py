"""Low-rank updates merged here against diffusers (with peft) merging the same files."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

from common import state_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_flux_parity import CONFIGS, reference  # noqa: E402

from jitjax.checkpoint import FluxParams  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.lora import merge_loras  # noqa: E402
from jitjax.convert.sources.single_files import whole_config  # noqa: E402
from jitjax.convert.tables.engine import leaves  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG = CONFIGS["guidance"]
LAYERS = {  # kohya's name -> rows and columns, in widths; diffusers knows linear1 at full size only
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
    """An update of every linear layer of the blocks, ranks 2 and 3 in turn."""
    found = {}
    blocks = [(n, m) for n, m in model.named_modules() if "blocks." in n]
    for i, (name, module) in enumerate((n, m) for n, m in blocks if hasattr(m, "in_features")):
        rank = 2 + i % 2
        a = torch.randn(rank, module.in_features, generator=generator)
        b = torch.randn(module.out_features, rank, generator=generator) / 10
        found |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return found


def kohya_file(generator) -> dict[str, torch.Tensor]:
    found, h = {}, CONFIG.hidden
    for name, (out, into) in LAYERS.items():
        key = f"lora_unet_{name}"
        found[f"{key}.lora_down.weight"] = torch.randn(4, into * h, generator=generator)
        found[f"{key}.lora_up.weight"] = torch.randn(out * h, 4, generator=generator) / 10
        found[f"{key}.alpha"] = torch.tensor(3.0)
    return found


@pytest.mark.parametrize("kind", ["peft", "kohya"])
@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_merged_as_diffusers_does(tmp_path, kind, scale):
    generator = torch.Generator().manual_seed(3)
    model = reference(CONFIG, 0)
    trees = {"transformer": from_state("transformer", state_of(model), CONFIG)}
    state = peft_file(model, generator) if kind == "peft" else kohya_file(generator)
    save_file(state, tmp_path / "lora.safetensors")

    rest = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    pipe = diffusers.FluxPipeline(transformer=model, **rest)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    expected = leaves(from_state("transformer", state_of(model), CONFIG))

    params = FluxParams(
        **trees, t5={}, clip={}, autoencoder={},
        config=whole_config({"transformer": CONFIG}), tokenizer="",
    )  # fmt: skip
    merged = merge_loras(params, [(tmp_path / "lora.safetensors", scale)])
    got, before = leaves(merged.transformer), leaves(params.transformer)
    changed = 0
    for name, value in expected.items():
        # float32 sums of few products in another order.
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        changed += not np.array_equal(value, before[name])
    assert changed >= 8
