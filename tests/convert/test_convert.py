"""Conversion: all mismatches are reported, round trips are exact, results are never partial.

The tests use small random folders with the real layout. Parity of the tables with torch is tested
in tests/parity.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import jitjax
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import COMPONENTS, from_state
from jitjax.convert.sources.diffusers_folder import read_config, read_folder
from jitjax.convert.tables.engine import (
    STRIP,
    TILE,
    ConversionError,
    Rule,
    check_keys,
    expected_sources,
    leaf_shapes,
    transpose,
)
from jitjax.convert.tables.transformer import transformer_rules
from jitjax.convert.targets import diffusers_folder
from jitjax.convert.targets.diffusers_folder import write_folder
from jitjax.models import param_shapes

TRANSFORMER = TransformerConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=8,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
CONFIG = FluxConfig(
    transformer=TRANSFORMER,
    t5=T5Config(vocab_size=11, d_model=6, d_kv=3, d_ff=8, num_layers=2, num_heads=2),
    clip=CLIPConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    autoencoder=AutoencoderConfig(
        latent_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2
    ),
    text_length=20,
    image_size=64,
    dynamic_shift=True,
    base_shift=0.6,
    max_shift=1.2,
    base_seq=16,
    max_seq=64,
    shift=2.0,
)
SOURCE_DTYPES = {
    "transformer": jnp.bfloat16,
    "text_encoder": np.float16,
    "text_encoder_2": np.float32,
    "vae": jnp.bfloat16,
}


def random_state(rules, shapes, dtype, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sources = expected_sources(rules, shapes)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in sources.items()
    }


def weight_file(folder: Path, component: str) -> Path:
    stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
    return folder / component / f"{stem}.safetensors"


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def change_weights(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    path.unlink()
    save_file(state, path)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A diffusers folder like that on the hub, written without this project's writer."""
    folder = tmp_path_factory.mktemp("original") / "FLUX"
    write_json(folder / "model_index.json", {"_class_name": "FluxPipeline", "vae": ["a", "b"]})
    transformer = {name: getattr(TRANSFORMER, name) for name in TRANSFORMER.__dataclass_fields__}
    write_json(folder / "transformer/config.json", transformer | {"patch_size": 1})
    write_json(
        folder / "text_encoder/config.json",
        {
            "vocab_size": 12,
            "hidden_size": 8,
            "intermediate_size": 10,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "eos_token_id": 2,
        },
    )
    write_json(
        folder / "text_encoder_2/config.json",
        {
            "vocab_size": 11,
            "d_model": 6,
            "d_kv": 3,
            "d_ff": 8,
            "num_layers": 2,
            "num_heads": 2,
            "feed_forward_proj": "gated-gelu",
        },
    )
    write_json(
        folder / "vae/config.json",
        {
            "latent_channels": 4,
            "block_out_channels": [4, 8],
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "use_quant_conv": False,
            "sample_size": 64,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    )
    write_json(
        folder / "scheduler/scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "use_dynamic_shifting": True,
            "base_shift": 0.6,
            "max_shift": 1.2,
            "base_image_seq_len": 16,
            "max_image_seq_len": 64,
            "shift": 2.0,
        },
    )
    write_json(folder / "tokenizer/tokenizer_config.json", {"model_max_length": 77})
    write_json(folder / "tokenizer_2/tokenizer_config.json", {"model_max_length": 20})
    (folder / "tokenizer_2/spiece.model").write_bytes(b"\0sentence")
    for seed, component in enumerate(COMPONENTS):
        config = getattr(CONFIG, component.name)
        shapes = leaf_shapes(component.abstract_params(config))
        dtype = SOURCE_DTYPES[component.folder]
        state = random_state(component.rules(config), shapes, dtype, seed)
        save_file(state, weight_file(folder, component.folder))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(original, tmp_path / "FLUX")


@pytest.fixture(scope="module")
def params(original: Path):
    return read_folder(original)


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def assert_same_params(actual, expected) -> None:
    assert actual.config == expected.config
    for name in ("transformer", "t5", "clip", "autoencoder"):
        trees = (flatten_dict(getattr(p, name), sep="/") for p in (actual, expected))
        assert_same_bits(*({k: np.asarray(v) for k, v in tree.items()} for tree in trees))


# ---------------------------------------------------------------------------------- the engine


def test_one_error_lists_all_mismatches():
    shapes = {"a/kernel": (3, 2), "b/kernel": (2, 3, 2), "c/bias": (4,), "d/bias": (4,)}
    rules = [
        Rule("a/kernel", ("a.weight",), "linear"),
        Rule("a/kernel", ("a.weight",), "linear"),
        Rule("b/kernel", ("b.{i}.weight",), "linear", blocks=2),
        Rule("c/bias", ("c.bias",)),
        Rule("e/bias", ("e.bias",)),
    ]
    sources = {"a.weight": (3, 2), "b.0.weight": (2, 3), "c.bias": (4,), "x": (1,), "ids": (1,)}
    with pytest.raises(ConversionError) as caught:
        check_keys(rules, shapes, sources, label="toy", ignored=("ids",))
    for line in (
        "leaf filled twice: a/kernel",
        "leaf without a rule: d/bias",
        "rule for a leaf that does not exist: e/bias",
        "key used twice: a.weight",
        "unmatched key: x",
        "wrong shape: a.weight has shape [3, 2]; expected [2, 3]",
        "missing key: b.1.weight [2, 3]",
    ):
        assert f"\n  {line}" in str(caught.value)
    assert str(caught.value).startswith("toy: 7 mismatched key(s)")


def test_from_state():
    shapes = leaf_shapes(param_shapes.transformer(TRANSFORMER))
    state = random_state(transformer_rules(TRANSFORMER), shapes, np.float32)
    tree = from_state("transformer", state, TRANSFORMER)
    assert leaf_shapes(tree) == shapes
    kernel = tree["double_blocks"]["image_attention"]["qkv"]["kernel"]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        expected = state[f"transformer_blocks.1.attn.{name}.weight"]
        np.testing.assert_array_equal(kernel[1, :, i].reshape(16, 16), expected.T)
    cast = from_state("transformer", state, TRANSFORMER, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(jnp.bfloat16)}
    state["lora.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError, match=r"unmatched key: lora\.weight"):
        from_state("transformer", state, TRANSFORMER)


@pytest.mark.parametrize("shape", [(1, 1), (TILE, STRIP), (2 * TILE + 3, STRIP + 7), (5, 3)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_transpose(shape: tuple[int, int], dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(jnp.bfloat16)
    out = np.zeros((shape[1], 2, shape[0]), dtype)  # strided rows, as in a fused kernel
    transpose(values, out[:, 1])
    np.testing.assert_array_equal(out[:, 1], values.T.astype(dtype))
    assert not out[:, 0].any()


def test_leaf_with_mixed_source_dtypes_is_exact():
    shapes = leaf_shapes(param_shapes.transformer(TRANSFORMER))
    state = random_state(transformer_rules(TRANSFORMER), shapes, jnp.bfloat16)
    name = "transformer_blocks.0.attn.norm_q.weight"
    state[name] = (np.arange(8) / 3).astype(np.float32)
    scale = from_state("transformer", state, TRANSFORMER)["double_blocks"]["image_attention"]
    scale = scale["query_norm"]["scale"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale[0], state[name])


def test_float16_overflow_is_an_error():
    shapes = leaf_shapes(param_shapes.transformer(TRANSFORMER))
    state = random_state(transformer_rules(TRANSFORMER), shapes, np.float32)
    state["proj_out.bias"][0] = 1e5
    with pytest.raises(ConversionError, match="image_out/bias does not fit into float16"):
        from_state("transformer", state, TRANSFORMER, np.float16)


# --------------------------------------------------------------------------------- the folders


def test_config_is_read(original: Path):
    assert read_config(original) == CONFIG


def test_round_trip_is_exact(original: Path, params, tmp_path: Path):
    write_folder(params, tmp_path / "deep/again")
    assert read_config(tmp_path / "deep/again") == CONFIG
    for component in SOURCE_DTYPES:
        state = load_file(weight_file(original, component))
        assert {v.dtype for v in state.values()} == {np.dtype(SOURCE_DTYPES[component])}
        assert_same_bits(load_file(weight_file(tmp_path / "deep/again", component)), state)
    assert_same_params(read_folder(tmp_path / "deep/again"), params)
    copied = tmp_path / "deep/again/tokenizer_2/spiece.model"
    assert copied.read_bytes() == b"\0sentence"


def test_shards(original: Path, params, tmp_path: Path):
    write_folder(params, tmp_path / "sharded", shard_bytes=4000)
    files = sorted(p.name for p in (tmp_path / "sharded/transformer").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    index = tmp_path / "sharded/transformer/diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    assert names.keys() == load_file(weight_file(original, "transformer")).keys()
    assert_same_params(read_folder(tmp_path / "sharded"), params)
    (index.parent / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=files[1]):
        read_folder(tmp_path / "sharded")


def test_dtype(original: Path):
    cast = read_folder(original, np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(np.float32)}
    stored = load_file(weight_file(original, "transformer"))["x_embedder.bias"]
    np.testing.assert_array_equal(cast.transformer["image_in"]["bias"], stored.astype(np.float32))


def test_one_error_lists_the_mismatches_of_all_models(folder: Path):
    def damage(state):
        state["lora"] = np.zeros(1, np.float32)
        del state["proj_out.bias"]

    change_weights(weight_file(folder, "transformer"), damage)
    name = "decoder.conv_in.bias"
    change_weights(weight_file(folder, "vae"), lambda s: s.update({name: s[name][:-1].copy()}))
    with pytest.raises(ConversionError) as caught:
        read_folder(folder)
    for line in (
        "transformer: 2 mismatched key(s)",
        "unmatched key: lora",
        "missing key: proj_out.bias [16]",
        "vae: 1 mismatched key(s)",
        "wrong shape: decoder.conv_in.bias has shape [7]; expected [8]",
    ):
        assert line in str(caught.value)


def test_position_ids_are_ignored(folder: Path, params):
    ids = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    change_weights(weight_file(folder, "text_encoder"), lambda s: s.update(ids))
    assert_same_params(read_folder(folder), params)


def test_integer_weights_are_an_error(folder: Path):
    change = {"proj_out.bias": np.zeros(16, np.int64)}
    change_weights(weight_file(folder, "transformer"), lambda s: s.update(change))
    message = r"transformer: unsupported dtype I64 of proj_out\.bias in .*; expected one of BF16"
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    "path",
    [
        "model_index.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer_2/tokenizer_config.json",
        "text_encoder_2/model.safetensors",
    ],
)
def test_missing_file(folder: Path, path: str):
    (folder / path).unlink()
    with pytest.raises(FileNotFoundError, match=path.rsplit("/", 1)[-1]):
        read_folder(folder)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="not a folder; expected a diffusers folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json, transformer/config\.json"):
        read_folder(tmp_path)


@pytest.mark.parametrize("path", ["vae/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_truncated_file(folder: Path, path: str):
    content = (folder / path).read_bytes()
    (folder / path).write_bytes(content[: len(content) - 40])
    with pytest.raises(ValueError, match=f"{path} is not (a complete safetensors|complete JSON)"):
        read_folder(folder)


def test_weight_files_of_another_format(folder: Path):
    weights = weight_file(folder, "vae")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"has diffusion_pytorch_model\.bin; expected"):
        read_folder(folder)


def test_single_and_sharded_weights_are_ambiguous(folder: Path):
    write_json(folder / "vae/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}})
    with pytest.raises(ValueError, match="expected one of them"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxControlNetPipeline"}, "expected FluxPipeline"),
        ("transformer/config.json", {"patch_size": 2}, "only 1 is implemented"),
        ("vae/config.json", {"use_quant_conv": True}, "only False is implemented"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIM"}, "_class_name is 'DDIM'"),
    ],
)
def test_unsupported_settings_are_errors(folder: Path, path: str, changes: dict, message: str):
    change_json(folder / path, **changes)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_write_changes_nothing(params, tmp_path: Path, monkeypatch, exists: bool):
    target = tmp_path / "out"
    if exists:
        write_folder(params, target)
    before = sorted(tmp_path.rglob("*"))
    written = []

    def interrupted(tensors, path, metadata):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    monkeypatch.setattr(diffusers_folder, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(params, target, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_folder_is_replaced_only_with_overwrite(params, folder: Path, tmp_path: Path):
    with pytest.raises(FileExistsError, match="already exists"):
        write_folder(params, folder)
    write_folder(params, folder, overwrite=True)
    assert_same_params(read_folder(folder), params)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    with pytest.raises(FileExistsError, match="is not a diffusers folder"):
        write_folder(params, tmp_path / "photos", overwrite=True)


def test_parameters_that_do_not_match_their_config(params, tmp_path: Path):
    tree = {k: v for k, v in params.transformer.items() if k != "image_in"}
    tree["extra"] = {"bias": np.zeros(3, np.float32)}
    tree["image_out"] = tree["image_out"] | {"bias": np.zeros(5, np.float32)}
    changed = type(params)(**(vars(params) | {"transformer": tree}))
    with pytest.raises(ConversionError) as caught:
        write_folder(changed, tmp_path / "out")
    for line in (
        "transformer/image_in/bias is missing; expected shape [16]",
        "transformer/extra/bias is not expected; its shape is [3]",
        "transformer/image_out/bias has shape [5]; expected [16]",
    ):
        assert f"\n  {line}" in str(caught.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the command line


def test_command_line_round_trip(original: Path, tmp_path: Path, capsys):
    checkpoint, folder = str(tmp_path / "checkpoint"), str(tmp_path / "folder")
    assert main([str(original), "--dtype", "auto", "--out", checkpoint]) == 0
    assert_same_params(jitjax.load(checkpoint), read_folder(original))
    assert main([checkpoint, "--to-diffusers", "--out", folder]) == 0
    for component in SOURCE_DTYPES:
        state = load_file(weight_file(original, component))
        assert_same_bits(load_file(weight_file(Path(folder), component)), state)
    assert main([str(original), "--out", checkpoint]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err


def test_command_line_errors(original: Path, tmp_path: Path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "nowhere"), *out]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(original), "--to-diffusers", "--dtype", "float32", *out]) == 2
    assert main([str(original)]) == 2
    assert "expected --out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "python -m jitjax.convert FLUX.1-dev --out flux-dev" in text
    assert "--to-diffusers" in text
