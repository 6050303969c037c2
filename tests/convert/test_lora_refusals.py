"""LoRA files that are refused: by one line that names file and tensor, or by a short list."""

from __future__ import annotations

import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, H, original_transformer, random_states

import jitjax
from jitjax.config import FluxConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.tables.engine import ConversionError

COLUMNS = CONFIGS["transformer"].in_channels
A, B = np.ones((4, COLUMNS), np.float32), np.ones((H, 4), np.float32)
X = "transformer.x_embedder"
STATES = random_states()


@pytest.fixture(scope="module")
def params():
    tree = from_state("transformer", STATES["transformer"], CONFIGS["transformer"])
    return jitjax.checkpoint.FluxParams(
        transformer=tree, clip={}, t5={}, autoencoder={}, config=FluxConfig(**CONFIGS), tokenizer=""
    )


def save(path, state):
    save_file({k: np.array(v, order="C") for k, v in state.items()}, path)
    return path


def pair(layer=X, a=A, b=B):
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


def refusal(params, loras) -> str:
    """Return the message of the refusal, of one line; no warning appears."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            merge_loras(params, loras)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_value(array, value, dtype=np.float32):
    array = np.array(array, dtype)
    array.reshape(-1)[-1] = value
    return array


VECTOR = np.ones(H, np.float32)
SQUARE = np.ones((H, 4), np.float32)
LOKR = {
    f"{X}.lokr_w1": np.ones((4, 4), np.float32),
    f"{X}.lokr_w2": np.ones((H // 4, 4), np.float32),
}
REFUSED = {
    # not finite
    "nan A": (pair(a=with_value(A, np.nan)), f"{X}.lora_A.weight contains NaN or infinity"),
    "inf B": (pair(b=with_value(B, np.inf, np.float16)), f"{X}.lora_B.weight contains NaN or inf"),
    "nan bfloat16": (pair(b=with_value(B, np.nan, jnp.bfloat16)), "lora_B.weight contains NaN"),
    "too large for float32": (pair(b=with_value(B, 1e300, np.float64)), "lora_B.weight contains"),
    "nan bias": (pair() | {f"{X}.lora_B.bias": with_value(VECTOR, np.nan)}, "B.bias contains NaN"),
    "nan magnitude": (
        pair() | {f"{X}.dora_scale": with_value(VECTOR, np.nan)},
        "dora_scale contains",
    ),
    "nan diff": (
        {f"{X}.diff": np.full((H, COLUMNS), np.nan, np.float32)},
        f"{X}.diff contains NaN",
    ),
    "inf lokr": (LOKR | {f"{X}.lokr_w1": np.full((4, 4), np.inf)}, f"{X}.lokr_w1 contains NaN or"),
    # twice
    "two names": (
        pair() | {"lora_unet_img_in.lora_down.weight": A, "lora_unet_img_in.lora_up.weight": B},
        f"{X}.lora_A.weight updates the same weight as lora_unet_img_in.lora_down.weight",
    ),
    "two pairs": (pair() | {f"{X}.lora_down.weight": A, f"{X}.lora_up.weight": B}, "2 mismatched"),
    "one matrix twice": (
        pair() | {f"{X}.lora_up.weight": B},
        f"{X}.lora_up.weight stands for the same as {X}.lora_B.weight",
    ),
    "fused and split": (
        pair("double_blocks.0.img_attn.qkv", np.ones((2, H)), np.ones((3 * H, 2)))
        | pair("transformer_blocks.0.attn.to_k", np.ones((2, H)), np.ones((H, 2))),
        "transformer_blocks.0.attn.to_k.lora_A.weight updates the same weight as "
        "double_blocks.0.img_attn.qkv.lora_A.weight",
    ),
    "lora and diff": (
        pair() | {f"{X}.diff": np.ones((H, COLUMNS))},
        f"{X} is updated in two ways, by {X}.lora_A.weight and",
    ),
    "two biases": (
        pair() | {f"{X}.diff_b": VECTOR, f"{X}.lora_B.bias": VECTOR},
        f"is updated in two ways, by {X}.lora_B.bias and {X}.diff_b",
    ),
    "bias by two names": (
        pair() | {f"{X}.diff_b": VECTOR, "diffusion_model.img_in.diff_b": VECTOR},
        f"{X}.diff_b updates the same bias as diffusion_model.img_in.diff_b",
    ),
    # shapes and dtypes
    "rank 0": (pair(a=A[:0], b=B[:, :0]), f"{X} has rank 0; expected at least 1"),
    "int8": (pair(a=A.astype(np.int8)), f"{X}.lora_A.weight has dtype I8; expected a floating"),
    "vector": (pair(a=A[0]), f"{X}.lora_A.weight has shape [{COLUMNS}]; expected a matrix"),
    "number": (pair(b=np.float32(1)), f"{X}.lora_B.weight has shape []; expected a matrix"),
    "3 x 3": (pair(a=np.ones((4, COLUMNS, 3, 3), np.float32)), "[4, 16, 3, 3], of a convolution"),
    "wrong width": (pair(a=A[:, 1:]), f"{X} has A [4, 15] and B [64, 4]; expected [rank, 16] and"),
    "no B": ({f"{X}.lora_A.weight": A}, f"{X} has no B"),
    "alpha alone": ({f"{X}.alpha": np.float32(1)}, f"{X} has no A and no B"),
    "magnitude alone": ({f"{X}.dora_scale": VECTOR}, f"{X} has no A and no B"),
    "magnitude shape": (
        pair() | {f"{X}.dora_scale": np.ones((3, 1))},
        "dora_scale has shape [3, 1]",
    ),
    "magnitude and bias of B": (
        pair() | {f"{X}.dora_scale": VECTOR, f"{X}.lora_B.bias": VECTOR},
        f"{X}.lora_B.bias is a bias of B, which DoRA cannot have",
    ),
    "bias shape": (
        pair() | {f"{X}.diff_b": VECTOR[1:]},
        f"{X}.diff_b has shape [63]; expected [64]",
    ),
    "diff shape": ({f"{X}.diff": A}, f"{X}.diff has shape [4, 16]; expected [64, 16]"),
    "norm": (
        pair("transformer_blocks.0.attn.norm_q", A, B),
        "has a LoRA; expected a difference of",
    ),
    "half a LoKr": (
        {f"{X}.lokr_w1": SQUARE},
        f"{X} has no lokr_w2; expected lokr_w2, or lokr_w2_a",
    ),
    "LoKr shape": (LOKR | {f"{X}.lokr_w1": A[:, :2]}, f"{X} has shape [64, 8]; expected [64, 16]"),
    "LoKr with both": (LOKR | {f"{X}.lokr_w1_a": A}, f"{X} has lokr_w1 and lokr_w1_a; expected"),
    # other formats
    "no tensors": ({}, "has no tensors; expected a LoRA"),
    "whole model": (
        {"x_embedder.weight": SQUARE, "x_embedder.bias": VECTOR},
        "whole weights (such as",
    ),
    "OFT": ({f"{X}.oft_blocks": SQUARE}, f"{X}.oft_blocks is of OFT; expected LoRA, DoRA, LoHa or"),
    "GLoRA": (
        {f"{X}.a1.weight": A, f"{X}.a2.weight": B},
        f"{X}.a1.weight (and 1 more) is of GLoRA",
    ),
    "SDXL": (
        pair() | pair("lora_unet_down_blocks_1_attentions_0"),
        "is a LoRA of Stable Diffusion 1",
    ),
    "FLUX.2": (
        pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
        "LoRA of FLUX.2",
    ),
    "IP-Adapter": (
        {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": SQUARE},
        "is of an IP-Adapter",
    ),
    "whole norm": (
        pair() | {"double_blocks.0.img_attn.norm.key_norm.scale": VECTOR},
        "double_blocks.0.img_attn.norm.key_norm.scale has shape [64]; expected [32]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, params, name):
    state, message = REFUSED[name]
    file = save(tmp_path / "ink.safetensors", state)
    if name == "two pairs":  # two lines, one for each matrix
        with pytest.raises(ConversionError) as caught:
            merge_loras(params, [(file, 1.0)])
        assert f"{X}.lora_down.weight stands for the same as {X}.lora_A.weight" in str(caught.value)
        return
    got = refusal(params, [(file, 1.0)])
    assert message in got
    assert str(file) in got


def test_lists_are_short(tmp_path, params):
    """At most 20 lines and a count; equal faults of many tensors are one line."""
    state = {f"transformer.nothing.{i}.lora_A.weight": A for i in range(506)}
    file = save(tmp_path / "ink.safetensors", state)
    with pytest.raises(ConversionError, match=r"506 mismatched key\(s\)") as caught:
        merge_loras(params, [(file, 1.0)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1].strip() == "and 487 more"
    blocks = {}
    for i in range(3):
        layer = f"transformer.single_transformer_blocks.{i}.attn.to_q"
        blocks |= pair(layer, np.ones((2, H), np.int8), np.ones((H, 2), np.int8))
    message = refusal(params, [(save(file, blocks), 1.0)])
    assert (
        "single_transformer_blocks.0.attn.to_q.lora_A.weight (and 2 more) has dtype I8" in message
    )


def test_no_safetensors(tmp_path, params):
    for name in ("l.bin", "l.pt", "l.ckpt", "l.PTH"):
        (tmp_path / name).write_bytes(pickle.dumps({}))
        message = refusal(params, [(tmp_path / name, 1.0)])
        assert message == (
            f"{tmp_path / name} is a pickle, which is not read, since it may run code; save it as "
            "safetensors"
        )
    folder = tmp_path / "old"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="old has no safetensors file; expected one LoRA"):
        merge_loras(params, [(folder, 1.0)])
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    assert "adapter_model.bin is a pickle" in refusal(params, [(folder, 1.0)])
    for name in ("a.safetensors", "b.safetensors"):
        save(folder / name, pair())
    with pytest.raises(
        FileNotFoundError, match=r"old has a\.safetensors, b\.safetensors; expected"
    ):
        merge_loras(params, [(folder, 1.0)])
    (tmp_path / "l.gguf").write_bytes(b"GGUF")
    assert "l.gguf is a GGUF file; expected" in refusal(params, [(tmp_path / "l.gguf", 1.0)])
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    assert "cut.safetensors" in refusal(params, [(tmp_path / "cut.safetensors", 1.0)])


@pytest.mark.parametrize(
    "loras",
    ["x", ["x"], ("x", 0.7), {"x": 0.7}, [("x",)], [("x", 1, 2)], [(1, 0.5)], [{"x": 0.7}], 3,
     [("x", "0.5")], [("x", None)], [("x", float("nan"))], [("x", 10**400)], [("x", True)],
     [("x", 1j)], [("", 1.0)]],
)  # fmt: skip
def test_argument(params, loras):
    message = refusal(params, loras)
    assert "expected a list of (file, scale) pairs" in message or (
        "x: scale is" in message and "expected a finite number" in message
    )


def test_load_says_so_first(tmp_path):
    """Before the checkpoint is looked for."""
    with pytest.raises(FileNotFoundError, match="gone is not a file"):
        jitjax.load(tmp_path / "no checkpoint", loras=[("gone", 1.0)])
    with pytest.raises(ValueError, match="x: scale is nan; expected a finite number"):
        jitjax.load(tmp_path / "no checkpoint", loras=[("x", float("nan"))])


def test_scale_of_other_types(tmp_path, params):
    file = save(tmp_path / "ink.safetensors", pair())
    for scale in (2, np.float16(2), np.asarray(2.0), jnp.asarray(2.0)):
        leaf = merge_loras(params, [(str(file), scale)]).transformer["image_in"]["kernel"]
        np.testing.assert_allclose(leaf - params.transformer["image_in"]["kernel"], 8, atol=1e-4)


def test_overflow(tmp_path, params, capfd):
    """Sums that do not fit are errors naming the leaf, in `load` and in the conversion."""
    file = save(tmp_path / "big.safetensors", pair(a=1e4 * A, b=1e4 * B))
    half = jax.tree.map(lambda x: x.astype(np.float16), params)
    expected = "transformer/image_in/kernel has values that are not finite in float16"
    assert expected in refusal(half, [(file, 1.0)])
    assert "not finite in float32" in refusal(params, [(file, 1e38)])
    merge_loras(half, [(file, 1e-6)])
    huge = np.full((4, 4), 1e30, np.float32)
    lokr = {f"{X}.lokr_w1_a": huge, f"{X}.lokr_w1_b": huge, f"{X}.lokr_w2": np.ones((H // 4, 4))}
    message = refusal(params, [(save(tmp_path / "lokr.safetensors", lokr), 1.0)])
    assert "not finite in float32" in message

    folder = tmp_path / "checkpoint"
    jitjax.save(half, folder)
    with pytest.raises(ConversionError, match=expected):
        jitjax.load(folder, parts=("transformer",), loras=[(file, 1.0)])
    flux = save(tmp_path / "flux.safetensors", original_transformer(STATES["transformer"]))
    out = tmp_path / "out"
    options = ["--dtype", "float16", "--lora", str(file), "--out", str(out)]
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([str(flux), *options]) == 2
    assert expected in capfd.readouterr().err
    assert not out.exists()


def test_folder_in_a_conversion(tmp_path, params):
    """The record of the sources has the file in the folder of PEFT."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save(folder / "adapter_model.safetensors", pair("base_model.model.x_embedder"))
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    flux = save(tmp_path / "flux.safetensors", original_transformer(STATES["transformer"]))
    out = tmp_path / "out"
    assert main([str(flux), "--dtype", "float32", "--lora", str(folder), "--out", str(out)]) == 0
    kernel = np.asarray(jitjax.load(out).transformer["image_in"]["kernel"])
    np.testing.assert_allclose(kernel - params.transformer["image_in"]["kernel"], 2, atol=1e-4)
    assert main(["--verify", str(out)]) == 0
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    assert main(["--verify", str(out)]) == 1


def test_nothing_is_changed_by_a_refusal(tmp_path, params):
    """A good file before a bad one leaves the parameters alone."""
    good = save(tmp_path / "good.safetensors", pair())
    before = np.array(params.transformer["image_in"]["kernel"])
    refusal(params, [(good, 1.0), (save(tmp_path / "bad.safetensors", {}), 1.0)])
    np.testing.assert_array_equal(params.transformer["image_in"]["kernel"], before)
