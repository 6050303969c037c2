"""The same weights converted from every layout give exactly the same transformer output."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layouts import TRANSFORMER, original_transformer, prefixed, random_states, write

import jitjax
from jitjax.convert.__main__ import main
from jitjax.convert.sources import diffusers_folder
from jitjax.models.flux import FluxTransformer

FP8 = jnp.float8_e4m3fn


@pytest.fixture(scope="module")
def state():
    """Weights that fp8 represents exactly, so that no layout rounds them."""
    random = random_states()["transformer"]
    return {name: (0.1 * value).astype(FP8).astype(np.float32) for name, value in random.items()}


def sharded_folder(path, state):
    """Write a diffusers folder in four shards with an index."""
    folder = path / "transformer"
    folder.mkdir()
    names = sorted(state)
    weight_map = {}
    for i in range(4):
        stem = f"diffusion_pytorch_model-{i + 1:05d}-of-00004"
        write(folder, stem, {name: state[name].astype(jnp.bfloat16) for name in names[i::4]})
        weight_map |= dict.fromkeys(names[i::4], f"{stem}.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(TRANSFORMER)))
    return folder


def gguf(path, state):
    """Write a GGUF file with original names; vectors are float32, all others bfloat16."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, quants

    writer = GGUFWriter(path / "flux.gguf", "flux")
    for name, value in original_transformer(state).items():
        kind = Kind.F32 if value.ndim == 1 else Kind.BF16
        writer.add_tensor(name, quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "flux.gguf"


def fp8(path, state, scaled=False):
    """Write a ComfyUI file with matrices in fp8; if `scaled`, doubled with a scale of 0.5."""
    stored = {}
    for name, value in original_transformer(state).items():
        is_matrix = name.endswith("weight") and value.ndim == 2
        stored[name] = value.astype(FP8) if is_matrix else value
        if is_matrix and scaled:
            layer = name.removesuffix(".weight")
            stored[name] = (value * 2).astype(FP8)
            stored[f"{layer}.scale_weight"] = np.full((), 0.5, np.float32)
    return write(path, "fp8", prefixed("model.diffusion_model.", stored))


LAYOUTS = {
    "diffusers": lambda path, state: write(path, "flux", state),
    "shards": sharded_folder,
    "original": lambda path, state: write(path, "flux", original_transformer(state)),
    "prefix": lambda path, state: write(
        path, "flux", prefixed("model.diffusion_model.", original_transformer(state))
    ),
    "fp8": fp8,
    "scaled fp8": lambda path, state: fp8(path, state, scaled=True),
    "gguf": gguf,
}


@jax.jit
def velocity(params):
    rng = np.random.default_rng(1)
    positions = np.stack([np.zeros(5), np.arange(5) // 2, np.arange(5) % 2], axis=-1)
    inputs = {
        "tokens": rng.standard_normal((1, 5, TRANSFORMER.in_channels)),
        "positions": positions[None],
        "text": rng.standard_normal((1, 3, TRANSFORMER.joint_attention_dim)),
        "pooled": rng.standard_normal((1, TRANSFORMER.pooled_projection_dim)),
        "sigma": np.array([0.6]),
        "guidance": np.array([3.5]),
    }
    inputs = {name: jnp.asarray(value, jnp.float32) for name, value in inputs.items()}
    return FluxTransformer(TRANSFORMER).apply({"params": params}, **inputs)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("expected")
    file = str(LAYOUTS["diffusers"](path, state))
    assert main([file, "--dtype", "float32", "--out", str(path / "out")]) == 0
    output = np.asarray(velocity(jitjax.load(path / "out").transformer))
    assert np.abs(output).max() > 1e-3
    return output


@pytest.mark.parametrize("by_block", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_output(
    tmp_path, state, expected, layout, by_block, monkeypatch
):
    """With `by_block`, every stacked leaf is written block by block, as large leaves are."""
    if by_block:
        monkeypatch.setattr(diffusers_folder, "SPLIT_BYTES", 0)
    source = str(LAYOUTS[layout](tmp_path, state))
    out = ["--dtype", "float32", "--out", str(tmp_path / "out")]
    assert main(["--transformer", source, *out]) == 0
    params = jitjax.load(tmp_path / "out")
    np.testing.assert_array_equal(velocity(params.transformer), expected)
