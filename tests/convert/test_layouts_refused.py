"""What cannot be read is named for what it is, in one line; NaN and infinity name their tensor."""

from __future__ import annotations

import json
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import original_transformer, prefixed, random_states, write

from jitjax.convert.__main__ import main
from jitjax.convert.sources.hub import is_repository
from jitjax.convert.sources.other_models import explain_format, explain_pipeline
from jitjax.convert.sources.single_files import open_files
from jitjax.convert.sources.tensors import Tensor
from jitjax.convert.tables.engine import ConversionError
from jitjax.convert.tables.finite import CHUNK, all_finite


@pytest.fixture(scope="module")
def states():
    return random_states()


@pytest.fixture(scope="module")
def original(states):
    return original_transformer(states["transformer"])


def refusal(path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        open_files([path])
    message = str(caught.value)
    assert str(path) in message
    return message


def tensors(**kinds):
    """Tensors without a file: name (with _ for .) -> (dtype name, shape)."""
    return {
        name.replace("__", "."): Tensor(None, shape, kind, 0)  # type: ignore[arg-type]
        for name, (kind, shape) in kinds.items()
    }


ONE = np.ones((4, 4), np.float32)
OTHER_FILES = {
    "in_channels is 49 and out_channels is 16": {"img_in.weight": np.ones((64, 49), np.float32)},
    "Chroma": {"distilled_guidance_layer.in_proj.weight": ONE},
    "FLUX.2": {"model.diffusion_model.double_stream_modulation_img.lin.weight": ONE},
    "bitsandbytes (NF4)": {"img_in.weight.quant_state.bitsandbytes__nf4": np.ones(8, np.uint8)},
    "bitsandbytes (int8)": {"txt_in.SCB": ONE},
    "nunchaku": {"transformer_blocks.0.qkv_proj.wscales": ONE},
    "quanto": {"proj_out.weight._data": ONE},
    "torchao": {"proj_out._weight_qdata": ONE},
    "NVFP4": {"txt_in.weight_scale_2": ONE},
    "int8": {"txt_in.weight": np.ones((4, 4), np.int8)},
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_variants_and_formats_of_flux(tmp_path, original, name, prefix):
    changed = OTHER_FILES[name]
    changed = changed if next(iter(changed)).startswith("model.") else prefixed(prefix, changed)
    message = refusal(write(tmp_path, "x", prefixed(prefix, original), changed))
    assert name in message
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "--lora FILE"),
        (["transformer.proj_out.lora_A.weight", "transformer.proj_out.lora_B.weight"], "LoRA"),
        (["lycoris_double_blocks_0_img_mlp_0.lokr_w1"], "LoRA"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "LoRA"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "ControlNet"),
        (["controlnet_mode_embedder.weight", "x_embedder.weight"], "ControlNet"),
        (["redux_up.weight", "redux_down.weight"], "Redux"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "IP-Adapter"),
        (["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
          "model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion XL"),
        (["model.diffusion_model.input_blocks.1.0.in_layers.0.weight"], "Stable Diffusion"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "image encoder"),
        (["transformer.resblocks.0.attn.in_proj_weight"], "OpenAI's names"),
        (["model.layers.0.self_attn.q_proj.weight"], "language model"),
    ],
)  # fmt: skip
def test_other_models(tmp_path, names, what):
    message = refusal(write(tmp_path, "x", dict.fromkeys(names, ONE)))
    assert what in message
    assert "\n" not in message


def test_control_lora(tmp_path):
    state = {"img_in.lora_A.weight": np.ones((2, 128), np.float32), "img_in.lora_B.weight": ONE}
    assert "--lora FILE" in refusal(write(tmp_path, "x", state))


def test_scales_of_fp8():
    """One scale, or one per row; blocks of any kind are named."""
    weight = ("F8_E4M3", (64, 64))
    for shape in ((), (1,), (64,), (64, 1)):
        assert explain_format(tensors(a__weight=weight, a__weight_scale=("F32", shape))) is None
    blocks = explain_format(tensors(a__weight=weight, a__weight_scale=("F32", (2, 2))))
    assert "a.weight [64, 64] has scales of shape [2, 2]" in blocks
    for kind in ("U8", "F8_E8M0"):
        assert "MXFP8" in explain_format(tensors(a__weight=weight, a__weight_scale=(kind, (64, 2))))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("FluxControlNetPipeline", "ControlNet"),
        ("Flux2Pipeline", "FLUX.2"),
        ("ChromaPipeline", "Chroma"),
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
    ],
)
def test_pipelines(name, what):
    assert what in explain_pipeline(name)


def test_files_without_weights(tmp_path, original):
    whole = write(tmp_path, "whole", original)
    content = whole.read_bytes()

    def message(name, data) -> str:
        (tmp_path / name).write_bytes(data)
        return refusal(tmp_path / name)

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n"
    assert "Git LFS pointer, not the file of 23802932552 bytes" in message("a.gguf", pointer)
    assert "web page" in message("b.safetensors", b"<!DOCTYPE html><html>Sign in</html>")
    assert "JSON, not weights: '{\"error\": 1}'" in message("c.safetensors", b'{"error": 1}')
    assert "is empty" in message("d.safetensors", b"")
    assert "is text, not weights: 'Access denied'" in message("e.safetensors", b"Access denied\n")
    cut = f"it has {len(content) - 7} of {len(content)} bytes"
    assert cut in message("f.safetensors", content[:-7])
    assert "its header alone has" in message("g.safetensors", content[:50])
    assert "begins with zeros" in message("h.safetensors", bytes(100))
    assert "no other known one" in message("i.safetensors", bytes(range(255, 0, -1)))
    assert "PyTorch pickle" in message("j.safetensors", pickle.dumps({}))
    with zipfile.ZipFile(tmp_path / "k.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert "PyTorch pickle" in refusal(tmp_path / "k.ckpt")
    assert "is not a complete GGUF file: it has 9 bytes" in message("L.GGUF", b"GGUF\3\0\0\0\0")
    whole.rename(tmp_path / "weights.sft")  # other names are read
    assert open_files([tmp_path / "weights.sft"]).models


def test_paths(tmp_path, monkeypatch, capsys):
    (tmp_path / "flux1-dev.safetensors").write_text("")
    (tmp_path / "link.safetensors").symlink_to("../blobs/gone")
    assert "did you mean flux1-dev.safetensors?" in refusal(tmp_path / "flux1_dev.safetensors")
    assert "is a symlink to ../blobs/gone, which is gone" in refusal(tmp_path / "link.safetensors")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "ae.sft").write_text("")
    assert main([str(tmp_path / "files"), "--out", str(tmp_path / "out")]) == 2
    assert "it has single files: ae.sft" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for path in ("weights/flux1-dev.safetensors", "files/flux1-dev", "./files", "~/x", "../x"):
        assert not is_repository(path)
    assert is_repository("black-forest-labs/FLUX.1-dev")


def test_shapes_that_no_model_has(tmp_path, states, original):
    """Each is one line with the tensor's name, whatever the number of its axes."""
    t5, clip = states["t5"], states["clip"]
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    rank = "relative_attention_bias.weight"
    for number, (state, name, shape) in enumerate([
        (original, "img_in.weight", (64,)),
        (original, "img_in.weight", ()),
        (original, "img_in.weight", (0, 16)),
        (original, "txt_in.weight", (64,)),
        (original, "double_blocks.0.img_attn.norm.query_norm.scale", ()),
        (original, "double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        (original, "double_blocks.0.img_attn.norm.query_norm.scale", (24,)),
        (t5, f"encoder.block.0.layer.0.SelfAttention.{rank}", (32, 0)),
        (t5, f"encoder.block.0.layer.0.SelfAttention.{rank}", (32, 5)),
        (t5, "shared.weight", ()),
        (clip, "text_model.embeddings.token_embedding.weight", (3,)),
        (states["autoencoder"], "encoder.conv_in.weight", (3,)),
    ]):  # fmt: skip
        path = write(tmp_path, f"{number}", state, {name: np.zeros(shape, np.float32)})
        with pytest.raises(ValueError, match="expected") as caught:
            open_files([path], tokenizers=tmp_path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_stray_tensors_and_copies(tmp_path, original):
    model = prefixed("model.diffusion_model.", original)
    with pytest.raises(ConversionError) as caught:
        open_files([write(tmp_path, "stray", model, {"denoiser.sigmas": ONE, "lora_x.up": ONE})])
    for name in ("denoiser.sigmas", "lora_x.up"):
        assert f"unmatched key: {name}" in str(caught.value)
    open_files([write(tmp_path, "fine", model, {"text_encoders.clip_l.logit_scale": ONE})])
    copy = write(tmp_path, "ema", model, prefixed("model_ema.", original))
    assert "twice, under model.diffusion_model. and model_ema." in refusal(copy)


def test_all_misfits_are_kept_and_twenty_are_listed(tmp_path, original):
    state = {name: np.ones(1, np.float32) if "bias" in name else t for name, t in original.items()}
    with pytest.raises(ConversionError) as caught:
        open_files([write(tmp_path, "x", state)])
    ((_, problems),) = caught.value.lists.items()
    lines = str(caught.value).splitlines()
    assert len(problems) == sum("bias" in name for name in original)
    assert len(lines) == 22
    assert lines[-1].strip() == f"... and {len(problems) - 20} more"


def test_missing_tensors_are_all_named_where_shapes_cannot_be_inferred(tmp_path, original):
    names = ("img_in.weight", "txt_in.bias", "double_blocks.1.img_mod.lin.bias")
    state = {name: value for name, value in original.items() if name not in names[:2]}
    with pytest.raises(ConversionError) as caught:
        open_files([write(tmp_path, "x", state, {"img_in.extra": ONE})])
    text = str(caught.value)
    for line in ("missing key: img_in.weight", "missing key: txt_in.bias",
                 "unmatched key: img_in.extra", "3 mismatched"):  # fmt: skip
        assert line in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, np.float16])
def test_non_finite_weights_name_their_tensor(tmp_path, original, value, dtype):
    name = "single_blocks.1.linear1.weight"
    bad = original[name].copy()
    bad[-1, 3] = value
    path = write(tmp_path, "x", prefixed("model.diffusion_model.", original | {name: bad}))
    source = open_files([path], dtype)
    with pytest.raises(ConversionError) as caught:
        source.read()
    kind = "NaN" if np.isnan(value) else "infinite"
    expected = f"model.diffusion_model.{name} in {path} has 1 value that is {kind}"
    assert str(caught.value).startswith(expected)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_overflow_is_told_from_infinity(tmp_path, original, dtype):
    largest = 1e5 if dtype == np.float16 else 3.4e38
    path = write(tmp_path, "x", original | {"txt_in.bias": np.full(64, largest, np.float32)})
    expected = (
        rf"does not fit into {np.dtype(dtype)}: txt_in\.bias in .* magnitudes up to {largest:.4g}"
    )
    with pytest.raises(ConversionError, match=expected.replace("+", r"\+")):
        open_files([path], dtype).read()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_all_finite_agrees_with_isfinite(dtype):
    """All bit patterns of 16 bits; extremes elsewhere; also at the end of the second chunk."""
    if np.dtype(dtype).itemsize == 2:
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
        expected = np.isfinite(every.astype(np.float32))
        assert [all_finite(every[i : i + 1]) for i in range(0, 2**16, 5)] == list(expected[::5])
    limits = np.finfo(np.float32 if dtype == jnp.bfloat16 else dtype)
    values = np.zeros(2 * CHUNK, dtype)
    values[:3] = [limits.tiny, 1, -1]
    assert all_finite(values)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values[-1] = bad
        assert not all_finite(values)
    assert all_finite(np.zeros((0, 3), dtype))


def test_unreadable_comfy_format(tmp_path, original):
    fp8 = {"txt_in.weight": original["txt_in.weight"].astype(jnp.float8_e4m3fn)}
    for stored, fine in (("float8_e4m3fn", True), ("int8_convrot", False)):
        raw = np.frombuffer(json.dumps({"format": stored}).encode(), np.uint8)
        path = write(tmp_path, stored, original, fp8, {"txt_in.comfy_quant": raw})
        if fine:
            assert open_files([path]).models
        else:
            assert "has format int8_convrot; expected float8_" in refusal(path)


def test_damaged_header_of_every_kind(tmp_path, original):
    """A header that is JSON but no list of tensors is an error, not a traceback."""
    for text in (b"{}", b'{"a": 1}', b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": []}}'):
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert "\n" not in refusal(path)
    save_file({"double_blocks.0.img_attn.qkv.weight": np.zeros((), np.float32)}, path)
    with pytest.raises(ConversionError, match=r"missing key: img_in\.weight"):
        open_files([path])
