"""Single files: recognised layouts, inferred configurations, fp8, GGUF, prefixes, parts.

The same random weights are written in every layout. `original_transformer` and
`original_autoencoder` below follow the description of the original release and share no code with
`jitjax/convert/original.py`.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jitjax
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import COMPONENTS, from_state
from jitjax.convert.sources.layouts import LAYOUTS, full_size_names, recognise
from jitjax.convert.sources.single_files import open_files
from jitjax.convert.tables.engine import ConversionError

TRANSFORMER = TransformerConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=64,
    axes_dims_rope=(4, 14, 14),
)
CONFIGS = {
    "transformer": TRANSFORMER,
    "t5": T5Config(vocab_size=11, d_model=6, d_kv=3, d_ff=8, num_layers=2, num_heads=2),
    "clip": CLIPConfig(
        vocab_size=12,
        hidden_size=64,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=1,
    ),
    "autoencoder": AutoencoderConfig(
        latent_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1
    ),
}
H = TRANSFORMER.hidden


def read_files(files, dtype=None, **options):
    return open_files(files, dtype, **options).read()


def random_states(dtype=np.float32) -> dict[str, dict[str, np.ndarray]]:
    """Random weights of every model under the names of diffusers and transformers."""
    rng, states = np.random.default_rng(0), {}
    for component in COMPONENTS:
        config = CONFIGS[component.name]
        states[component.name] = {
            name: rng.standard_normal(shape, np.float32).astype(dtype)
            for name, shape in component.source_shapes(config).items()
        }
    return states


@pytest.fixture(scope="module")
def states():
    return random_states()


@pytest.fixture(scope="module")
def trees(states):
    return {name: from_state(name, state, CONFIGS[name]) for name, state in states.items()}


def original_transformer(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename, fuse and swap diffusers tensors to those of the original release."""
    renames = [
        (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight",
         r"single_blocks.\1.norm.query_norm.scale"),
        (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight",
         r"single_blocks.\1.norm.key_norm.scale"),
        (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
        (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
        (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
        (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight",
         r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight",
         r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight",
         r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight",
         r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
        ("proj_out", "final_layer.linear"),
    ]  # fmt: skip
    state, out = dict(state), {}
    for kind in ("weight", "bias"):
        for i in range(TRANSFORMER.num_layers):
            for projection, stream in (("to_{}", "img"), ("add_{}_proj", "txt")):
                attention = f"transformer_blocks.{i}.attn"
                qkv = [
                    state.pop(f"{attention}.{projection.format(letter)}.{kind}") for letter in "qkv"
                ]
                out[f"double_blocks.{i}.{stream}_attn.qkv.{kind}"] = np.concatenate(qkv)
        for i in range(TRANSFORMER.num_single_layers):
            block = f"single_transformer_blocks.{i}"
            qkv_mlp = [state.pop(f"{block}.attn.to_{letter}.{kind}") for letter in "qkv"]
            qkv_mlp.append(state.pop(f"{block}.proj_mlp.{kind}"))
            out[f"single_blocks.{i}.linear1.{kind}"] = np.concatenate(qkv_mlp)
        scale, shift = np.split(state.pop(f"norm_out.linear.{kind}"), 2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = np.concatenate([shift, scale])
    for name, value in state.items():
        for pattern, replacement in renames:
            renamed = re.sub(f"^{pattern}", replacement, name)
            if renamed != name:
                break
        else:
            raise AssertionError(name)
        out[renamed] = value
    return out


def original_autoencoder(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename and reshape diffusers tensors to those of the original release."""
    top, out = len(CONFIGS["autoencoder"].block_out_channels) - 1, {}
    for name, value in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)",
            lambda m: f"up.{top - int(m[1])}.block.{m[2]}",
            name,
        )
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", name
        )
        name = (
            re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
            .replace("conv_shortcut", "nin_shortcut")
            .replace("conv_norm_out", "norm_out")
        )
        if "mid_block.attentions.0" in name:
            value = value[..., None, None] if value.ndim == 2 else value
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
            for old, new in (("group_norm", "norm"), ("to_out.0", "proj_out")):
                name = name.replace(old, new)
            name = re.sub(r"to_([qkv])\.", r"\1.", name)
        out[name] = value
    return out


def prefixed(prefix: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in state.items()}


def write(folder, name: str, *states: dict[str, np.ndarray]):
    path = folder / f"{name}.safetensors"
    merged = {name: value for state in states for name, value in state.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in merged.items()}, path)
    return path


def assert_equal(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("layout", ["diffusers", "original", "prefix"])
def test_transformer_file(tmp_path, states, trees, layout):
    state = states["transformer"]
    if layout != "diffusers":
        state = original_transformer(state)
    if layout == "prefix":
        state = prefixed("model.diffusion_model.", state)
    params = read_files([write(tmp_path, "flux", state)])
    assert params.config.transformer == TRANSFORMER
    assert params.t5 == params.clip == params.autoencoder == {}
    assert_equal(params.transformer, trees["transformer"])


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_autoencoder_file(tmp_path, states, trees, layout):
    state = states["autoencoder"]
    state = original_autoencoder(state) if layout == "original" else state
    params = read_files([write(tmp_path, "ae", state)])
    assert params.config.autoencoder == CONFIGS["autoencoder"]
    assert_equal(params.autoencoder, trees["autoencoder"])


def test_all_models_in_one_file_or_in_four(tmp_path, states, trees):
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    clip = states["clip"] | {
        "text_projection.weight": np.eye(64, dtype=np.float32),
        "logit_scale": np.zeros((), np.float32),
    }
    single_file = write(
        tmp_path,
        "all",
        prefixed("model.diffusion_model.", original_transformer(states["transformer"])),
        prefixed("vae.", original_autoencoder(states["autoencoder"])),
        prefixed("text_encoders.t5xxl.transformer.", states["t5"]),
        prefixed("text_encoders.clip_l.transformer.", clip),
    )
    four_files = [
        write(tmp_path, "flux", original_transformer(states["transformer"])),
        write(tmp_path, "ae", original_autoencoder(states["autoencoder"])),
        write(tmp_path, "t5", states["t5"]),
        write(tmp_path, "clip", clip),
    ]
    for files in ([single_file], four_files):
        params = read_files(files, tokenizers=tmp_path)
        assert params.config == FluxConfig(**CONFIGS)
        for name, tree in trees.items():
            assert_equal(getattr(params, name), tree)
    transformer_only = read_files([single_file], parts=["transformer"])
    assert_equal(transformer_only.transformer, trees["transformer"])
    assert not transformer_only.clip
    assert transformer_only.tokenizer == ""
    with pytest.raises(FileNotFoundError, match="text encoders need tokenizers"):
        read_files(four_files)
    missing = r"no file contains t5; requested models found: autoencoder"
    with pytest.raises(ValueError, match=missing):
        read_files(four_files[1:2], parts=["autoencoder", "t5"])
    with pytest.raises(ValueError, match=r"transformer is both in .*all.* and in .*flux"):
        read_files([single_file, four_files[0]], tokenizers=tmp_path)


@pytest.mark.parametrize("scaled", ["", "scale_weight", "weight_scale", "rows"])
def test_fp8(tmp_path, states, scaled):
    """fp8 values times the scale of their layer are read exactly."""
    state = original_transformer(states["transformer"])
    stored, exact = {}, {}
    for name, value in state.items():
        rounded = value.astype(jnp.float8_e4m3fn)
        stored[name] = exact[name] = value
        if name.endswith("weight") and value.ndim == 2:
            stored[name], exact[name] = rounded, rounded.astype(np.float32)
            if scaled:
                layer = name.removesuffix(".weight")
                scale = np.float32(0.125 if scaled != "rows" else 1) * np.ones((), np.float32)
                if scaled == "rows":
                    scale = 2.0 ** (np.arange(len(value), dtype=np.float32) % 5)
                suffix = "weight_scale" if scaled == "rows" else scaled
                stored[f"{layer}.{suffix}"] = scale
                stored[f"{layer}.{suffix.replace('weight', 'input')}"] = np.ones((), np.float32)
                exact[name] = exact[name] * (scale[:, None] if scaled == "rows" else scale)
    if scaled:
        stored["scaled_fp8"] = np.zeros(0, jnp.float8_e4m3fn)
    actual = read_files([write(tmp_path, "fp8", stored)], jnp.float32)
    expected = read_files([write(tmp_path, "exact", exact)])
    assert_equal(actual.transformer, expected.transformer)
    default_dtype = read_files([tmp_path / "fp8.safetensors"])
    assert default_dtype.transformer["image_in"]["kernel"].dtype == jnp.bfloat16


def test_gguf(tmp_path, states):
    """Q8_0, BF16 and Q4_K (random blocks) are read as the `gguf` package dequantises them."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, quants

    rng, exact = np.random.default_rng(5), {}
    writer = GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, value in original_transformer(states["transformer"]).items():
        kind = Kind.BF16 if value.ndim == 1 else Kind.Q8_0
        if name.endswith("linear2.weight"):  # 5 * 64 columns are not a multiple of 256
            kind = Kind.F32
        if value.shape[-1] % 32:
            kind = Kind.F16
        data = value if kind is Kind.F32 else quants.quantize(value, kind)
        if name == "double_blocks.0.img_mlp.2.weight":
            kind, data = Kind.Q4_K, rng.integers(0, 60, (64, 144), np.uint8)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
        exact[name] = quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    actual = read_files([tmp_path / "flux.gguf"], jnp.float32)
    assert_equal(actual.transformer, read_files([write(tmp_path, "exact", exact)]).transformer)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes((tmp_path / "flux.gguf").read_bytes()[:999])
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        read_files([truncated])


def test_schnell_has_no_guidance(tmp_path, states):
    state = original_transformer(states["transformer"])
    state = {name: value for name, value in state.items() if "guidance_in" not in name}
    with pytest.warns(UserWarning, match=r"no guidance, so FLUX.1-schnell's schedule"):
        config = read_files([write(tmp_path, "schnell", state)]).config
    assert not config.transformer.guidance_embeds
    assert (config.text_length, config.dynamic_shift, config.shift) == (256, False, 1.0)


def test_mismatches_are_reported_with_the_names_in_the_file(tmp_path, states):
    state = original_transformer(states["transformer"])
    state["single_blocks.1.linear1.weight"] = state["single_blocks.1.linear1.weight"][:-1]
    del state["txt_in.bias"]
    state["double_blocks.0.img_attn.scale_weight"] = np.ones((), np.float32)
    with pytest.raises(ConversionError) as caught:
        read_files([write(tmp_path, "bad", state)])
    for line in (
        "wrong shape: single_blocks.1.linear1.weight has shape [447, 64]; expected [448, 64]",
        "missing key: txt_in.bias [64]",
        "unmatched key: double_blocks.0.img_attn.scale_weight",
        "3 mismatched key(s)",
    ):
        assert line in str(caught.value)
    del state["img_in.weight"]
    with pytest.raises(ConversionError, match=r"missing key: img_in\.weight"):
        read_files([write(tmp_path, "worse", state)])


def test_unknown_model_is_reported_with_the_closest_layout(tmp_path):
    state = {f"double_blocks.{i}.img_mlp.0.weight": np.ones((2, 2), np.float32) for i in range(3)}
    closest = r"closest layout is 'FLUX transformer, original release': it shares 1 of 1 names"
    with pytest.raises(ValueError, match=closest):
        read_files([write(tmp_path, "parts", state)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_full_size_layouts(layout):
    """The names and shapes of FLUX.1-dev give its layout and configuration."""
    shapes = full_size_names(layout)
    (model,) = recognise(shapes, "file")
    assert model.layout is layout
    assert layout.config(shapes) == type(CONFIGS[layout.model])()


def test_parts_are_saved_and_loaded(tmp_path, states):
    params = read_files([write(tmp_path, "flux", original_transformer(states["transformer"]))])
    jitjax.save(params, tmp_path / "saved")
    loaded = jitjax.load(tmp_path / "saved")
    assert loaded.config == params.config
    assert_equal(loaded.transformer, params.transformer)
    conditioning = jitjax.Conditioning(text=jnp.ones((1, 5, 6)), pooled=jnp.ones((1, 64)))
    noise = jax.random.normal(jax.random.key(0), (1, 16, 16))
    plan = jitjax.Plan(2)
    out = jitjax.denoise(loaded, conditioning, noise, plan=plan)
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="have no autoencoder, only transformer"):
        jitjax.decode(loaded, out, grid=(4, 4))
    with pytest.raises(ValueError, match=r"have no t5.*pass a Conditioning"):
        jitjax.encode_prompt(loaded, "a red circle")
    with pytest.raises(ValueError, match="has no clip, only transformer"):
        jitjax.load(tmp_path / "saved", parts=("transformer", "clip"))
    with pytest.raises(ValueError, match="parts is 'transformer'; expected some of"):
        jitjax.load(tmp_path / "saved", parts="transformer")


@pytest.mark.slow
def test_command_with_models_from_several_files(tmp_path, states, trees, capsys):
    """Single files given by option, then a folder with another transformer."""
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    flux = str(write(tmp_path, "flux", original_transformer(states["transformer"])))
    ae = str(write(tmp_path, "ae", original_autoencoder(states["autoencoder"])))
    t5, clip = (str(write(tmp_path, name, states[name])) for name in ("t5", "clip"))
    encoders = ["--t5", t5, "--clip", clip, "--tokenizers", str(tmp_path)]
    dtype, first = ["--dtype", "float32"], str(tmp_path / "first")
    assert main([flux, "--vae", ae, *encoders, *dtype, "--out", first]) == 0
    loaded = jitjax.load(first)
    assert loaded.config == FluxConfig(**CONFIGS)
    for name, tree in trees.items():
        assert_equal(getattr(loaded, name), tree)

    folder, changed_state = str(tmp_path / "folder"), dict(states["transformer"])
    assert main([first, "--to-diffusers", "--out", folder]) == 0
    changed_state["proj_out.bias"] = changed_state["proj_out.bias"] + 1
    changed = str(write(tmp_path, "changed", original_transformer(changed_state)))
    second = str(tmp_path / "second")
    assert main([folder, "--transformer", changed, "--out", second]) == 0
    loaded = jitjax.load(second, parts=("transformer", "t5"))
    # The command's default dtype is bfloat16.
    bias = np.asarray(changed_state["proj_out.bias"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(loaded.transformer["image_out"]["bias"], bias)
    assert_equal(
        loaded.t5["final_norm"]["scale"], trees["t5"]["final_norm"]["scale"].astype(jnp.bfloat16)
    )

    third = ["--transformer", f"{folder}/transformer", "--out", str(tmp_path / "third")]
    assert main([*third, *dtype]) == 0  # the folder of one model
    assert_equal(jitjax.load(tmp_path / "third").transformer, trees["transformer"])

    transformer_only = ["--parts", "transformer", "--out", str(tmp_path / "transformer_only")]
    assert main([folder, *transformer_only]) == 0
    assert not jitjax.load(tmp_path / "transformer_only").t5
    out = ["--out", str(tmp_path / "none")]
    for arguments, message in (
        (out, "nothing to convert"),
        ([ae, "--parts", "t5", *out], "no file contains t5; requested models found: none"),
        ([ae, "--t5", ae, *out], "no file contains t5"),
        ([flux, "--t5", t5, *out], "text encoders need tokenizers"),
        ([folder, "--tokenizers", str(tmp_path), *out], "has its own tokenizers"),
        ([first, "--to-diffusers", "--vae", ae, *out], "--to-diffusers does not go with --vae"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_repository_on_the_hub(tmp_path, states, trees, monkeypatch, capsys):
    """With a fake `snapshot_download`, since tests have no network."""
    import huggingface_hub
    from huggingface_hub import errors

    folder = tmp_path / "cache"
    for component in COMPONENTS:
        (folder / component.folder).mkdir(parents=True)
    requested = {}

    def fake_download(repository, *, allow_patterns):
        requested[repository] = allow_patterns
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    def http_error(cls):
        # `__init__` needs a response object whose class depends on the version of huggingface_hub.
        error = cls.__new__(cls)
        Exception.__init__(error, "server error")
        return error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = ["--out", str(tmp_path / "out")]
    name = "black-forest-labs/FLUX.1-dev"
    for outcome, message in (  # noqa: B007
        (http_error(errors.GatedRepoError), "is gated; log in with `hf auth login`"),
        (http_error(errors.RepositoryNotFoundError), f"{name} does not exist on the hub, or it is"),
        (errors.LocalEntryNotFoundError("nothing"), "the hub cannot be reached"),
        (http_error(errors.HfHubHTTPError), f"download of {name} failed (server error)"),
    ):
        assert main([name, *out]) == 2
        assert message in capsys.readouterr().err
    assert "transformer/*.safetensors" in requested[name]
    assert not any("flux1" in pattern or pattern.startswith("*") for pattern in requested[name])
    outcome = folder
    files = ["README.md", "flux1-dev-Q4_0.gguf", "flux1-dev-Q8_0.gguf"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: files)
    assert main([name, *out]) == 2
    error = capsys.readouterr().err
    assert "single files (flux1-dev-Q4_0.gguf, flux1-dev-Q8_0.gguf)" in error
    assert f"`hf download {name} flux1-dev-Q4_0.gguf --local-dir .`" in error
    assert error.count("\n") == 1
    (folder / "model_index.json").write_text("{}")
    assert main([name, "--parts", "transformer", *out]) == 2  # the downloaded folder is opened
    assert "is not a complete diffusers folder" in capsys.readouterr().err
    assert "text_encoder_2/*.safetensors" not in requested[name]
    assert main(["nowhere", *out]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
