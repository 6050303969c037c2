"""Low-rank updates against a NumPy product, with all supported layer names."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, TRANSFORMER, H, original_transformer, random_states, write

import jitjax
from jitjax.config import FluxConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.sources import diffusers_folder
from jitjax.convert.tables.engine import ConversionError

RNG = np.random.default_rng(7)
ORIGINAL = {  # layer of the original release -> (its diffusers layers, output width of each)
    "double_blocks.1.img_attn.qkv": (
        [f"transformer_blocks.1.attn.to_{c}" for c in "qkv"],
        [H, H, H],
    ),
    "single_blocks.2.linear1": (
        [*(f"single_transformer_blocks.2.attn.to_{c}" for c in "qkv"),
         "single_transformer_blocks.2.proj_mlp"],
        [H, H, H, 4 * H],
    ),
    "double_blocks.0.txt_mlp.2": (["transformer_blocks.0.ff_context.net.2"], [H]),
}  # fmt: skip
INPUT_WIDTHS = {"double_blocks.0.txt_mlp.2": 4 * H}


def random_update(rank: int, scale: float = 0.1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return random A [rank, in] and B [out, rank] for each layer in `ORIGINAL`."""
    update = {}
    for name, (_, widths) in ORIGINAL.items():
        a = RNG.standard_normal((rank, INPUT_WIDTHS.get(name, H)), np.float32)
        b = RNG.standard_normal((sum(widths), rank), np.float32) * np.float32(scale)
        update[name] = a, b
    return update


@pytest.fixture(scope="module")
def states():
    return random_states()


@pytest.fixture(scope="module")
def params(states):
    trees = {name: from_state(name, state, CONFIGS[name]) for name, state in states.items()}
    return jitjax.checkpoint.FluxParams(**trees, config=FluxConfig(**CONFIGS), tokenizer="")


def merged(states, *updates: tuple[dict, float]) -> dict:
    """Return the expected transformer: `factor * B A` added in float64, rows split here."""
    state = {name: value.astype(np.float64) for name, value in states["transformer"].items()}
    for update, factor in updates:
        for name, (a, b) in update.items():
            layers, widths = ORIGINAL[name]
            rows = np.split(b, np.cumsum(widths)[:-1])
            for layer, part in zip(layers, rows, strict=True):
                state[f"{layer}.weight"] += factor * part.astype(np.float64) @ a
    state = {name: value.astype(np.float32) for name, value in state.items()}
    return from_state("transformer", state, TRANSFORMER)


def assert_close(actual, expected) -> None:
    # Sums of at most 8 products of order 1, in float32.
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(compare, actual, expected)


def peft(update: dict, prefix: str = "transformer.") -> dict[str, np.ndarray]:
    """Return the update with diffusers names; the parts of a fused layer share its A."""
    out = {}
    for name, (a, b) in update.items():
        layers, widths = ORIGINAL[name]
        for layer, part in zip(layers, np.split(b, np.cumsum(widths)[:-1]), strict=True):
            out[f"{prefix}{layer}.lora_A.weight"], out[f"{prefix}{layer}.lora_B.weight"] = a, part
    return out


def original(update: dict, prefix: str = "diffusion_model.") -> dict[str, np.ndarray]:
    out = {}
    for name, (a, b) in update.items():
        out[f"{prefix}{name}.lora_A.weight"], out[f"{prefix}{name}.lora_B.weight"] = a, b
    return out


def kohya(update: dict, alpha: float) -> dict[str, np.ndarray]:
    out = {}
    for name, (a, b) in update.items():
        key = "lora_unet_" + name.replace(".", "_")
        out |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        out[f"{key}.alpha"] = np.asarray(alpha, np.float32)
    return out


def test_supported_layer_names(tmp_path, states, params):
    update = random_update(4)
    full, half = merged(states, (update, 1.0)), merged(states, (update, 0.5))
    before = np.array(params.transformer["double_blocks"]["image_attention"]["qkv"]["kernel"])
    for file, expected in (
        (write(tmp_path, "peft", peft(update)), full),
        (write(tmp_path, "model", peft(update, "base_model.model.")), full),
        (write(tmp_path, "bare", peft(update, "")), full),
        (write(tmp_path, "original", original(update)), full),
        (write(tmp_path, "originalbare", original(update, "")), full),
        (write(tmp_path, "kohya", kohya(update, 2.0)), half),
    ):
        result = merge_loras(params, [(file, 1.0)])
        assert_close(result.transformer, expected)
        assert result.t5 is params.t5
    after = params.transformer["double_blocks"]["image_attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(after, before)


def test_several_updates_with_scales(tmp_path, states, params):
    first, second = random_update(4), random_update(8)
    files = [write(tmp_path, "first", peft(first)), write(tmp_path, "second", kohya(second, 4.0))]
    result = merge_loras(params, [(files[0], 0.7), (files[1], -0.5)])
    assert_close(result.transformer, merged(states, (first, 0.7), (second, -0.25)))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_metadata(tmp_path, states, params, rslora):
    update = random_update(4)
    metadata = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.use_rslora": rslora}
    metadata["transformer.alpha_pattern"] = {"transformer_blocks.0.ff_context.net.2": 2}
    path = tmp_path / "metadata.safetensors"
    state = {k: np.ascontiguousarray(v) for k, v in peft(update).items()}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    name, divisor = "double_blocks.0.txt_mlp.2", 2 if rslora else 4
    others = {k: v for k, v in update.items() if k != name}
    expected = merged(states, (others, 8 / divisor), ({name: update[name]}, 2 / divisor))
    assert_close(merge_loras(params, [(path, 1.0)]).transformer, expected)


@pytest.mark.slow
def test_load_merges_updates(tmp_path, states, params):
    """`load` returns merged device arrays of the requested dtype; the checkpoint is unchanged."""
    update, folder = random_update(4), tmp_path / "checkpoint"
    lora = write(tmp_path, "lora", original(update))
    jitjax.save(dataclasses.replace(params, t5={}, clip={}, autoencoder={}), folder)
    loaded = jitjax.load(folder, loras=[(lora, 0.5)])
    assert_close(loaded.transformer, merged(states, (update, 0.5)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.transformer))
    cast = jitjax.load(folder, parts=("transformer",), dtype=jnp.bfloat16, loras=[(lora, 0.5)])
    assert {leaf.dtype for leaf in jax.tree.leaves(cast.transformer)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, jitjax.load(folder).transformer, params.transformer)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        jitjax.load(folder, loras=[(tmp_path / "none.safetensors", 1.0)])


def test_text_encoders_and_bfloat16(tmp_path, states, params):
    a, b = (RNG.standard_normal(shape, np.float32) for shape in ((2, 64), (10, 2)))
    layer = "text_model_encoder_layers_1_mlp_fc1"
    state = {f"lora_te1_{layer}.lora_down.weight": a, f"lora_te1_{layer}.lora_up.weight": b}
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    result = merge_loras(cast, [(write(tmp_path, "te", state), 1.0)]).clip
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    exact = states["clip"][name].astype(jnp.bfloat16).astype(np.float32) + b @ a
    kernel = result["blocks"]["mlp"]["up"]["kernel"][1]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, exact.T.astype(jnp.bfloat16))


def test_mismatches_are_errors(tmp_path, params):
    a, b = np.ones((2, H), np.float32), np.ones((H, 2), np.float32)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    state = {
        f"{layer}.lora_A.weight": a,
        f"{layer}.lora_B.weight": b[1:],
        "transformer.transformer_blocks.9.attn.to_q.lora_A.weight": a,
        "transformer.proj_out.lora_B.weight": b,
    }
    with pytest.raises(ConversionError) as caught:
        merge_loras(params, [(write(tmp_path, "bad", state), 1.0)])
    for line in (
        "transformer.transformer_blocks.0.attn.to_q has A [2, 64] and B [63, 2]; expected",
        "unknown key: transformer.transformer_blocks.9.attn.to_q.lora_A.weight",
        "transformer.proj_out has no A",
        "3 mismatched key(s)",
    ):
        assert line in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        merge_loras(params, [(tmp_path / "nowhere", 1.0)])
    with pytest.raises(ValueError, match="scale is nan"):
        merge_loras(params, [(tmp_path / "bad.safetensors", float("nan"))])


@pytest.mark.parametrize("split_bytes", [0, diffusers_folder.SPLIT_BYTES])
def test_conversion_merges_updates(tmp_path, states, capsys, monkeypatch, split_bytes):
    """Stacked leaves are updated block by block, as large leaves are, and in one piece."""
    monkeypatch.setattr(diffusers_folder, "SPLIT_BYTES", split_bytes)
    update = random_update(4)
    flux = str(write(tmp_path, "flux", original_transformer(states["transformer"])))
    lora = str(write(tmp_path, "lora", original(update)))
    out = ["--dtype", "float32", "--out", str(tmp_path / "out")]
    assert main([flux, "--lora", f"{lora}:0.5", *out]) == 0
    assert_close(jitjax.load(tmp_path / "out").transformer, merged(states, (update, 0.5)))
    te = {f"lora_te1_text_model_encoder_layers_1_mlp_fc1.{k}.weight": v for k, v in (
        ("lora_down", np.ones((2, 64), np.float32)), ("lora_up", np.ones((10, 2), np.float32)),
    )}  # fmt: skip
    capsys.readouterr()
    out[-1] = str(tmp_path / "none")
    assert main([flux, "--lora", f"{lora}:much", *out]) == 2
    assert main([flux, "--lora", str(write(tmp_path, "te", te)), *out]) == 0
    error = capsys.readouterr().err
    assert "te.safetensors: passed over" in error
    assert "clip (1 layers); the loaded models are: transformer; nothing of it is merged" in error
    assert "'much' is not a number" in error
