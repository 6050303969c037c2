"""Single files: layouts recognised, configurations inferred, fp8, prefixes, parts.

The same random weights go into every layout, by hand: `original` below is written from the
description of the original release and shares nothing with `convert/tables/original.py`.
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
    """Weights of every model under the names of diffusers and transformers."""
    rng, found = np.random.default_rng(0), {}
    for component in COMPONENTS:
        config = CONFIGS[component.name]
        found[component.name] = {
            n: rng.standard_normal(s, np.float32).astype(dtype)
            for n, s in component.source_shapes(config).items()
        }
    return found


@pytest.fixture(scope="module")
def states():
    return random_states()


@pytest.fixture(scope="module")
def trees(states):
    return {name: from_state(name, state, CONFIGS[name]) for name, state in states.items()}


def original_transformer(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors as the original release has them."""
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
            for ours, theirs in (("to_{}", "img"), ("add_{}_proj", "txt")):
                three = [
                    state.pop(f"transformer_blocks.{i}.attn.{ours.format(c)}.{kind}") for c in "qkv"
                ]
                out[f"double_blocks.{i}.{theirs}_attn.qkv.{kind}"] = np.concatenate(three)
        for i in range(TRANSFORMER.num_single_layers):
            block = f"single_transformer_blocks.{i}"
            four = [state.pop(f"{block}.attn.to_{c}.{kind}") for c in "qkv"]
            four.append(state.pop(f"{block}.proj_mlp.{kind}"))
            out[f"single_blocks.{i}.linear1.{kind}"] = np.concatenate(four)
        scale, shift = np.split(state.pop(f"norm_out.linear.{kind}"), 2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = np.concatenate([shift, scale])
    for name, value in state.items():
        for pattern, replacement in renames:
            changed = re.sub(f"^{pattern}", replacement, name)
            if changed != name:
                break
        else:
            raise AssertionError(name)
        out[changed] = value
    return out


def original_autoencoder(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors as the original release has them."""
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
            for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out")):
                name = name.replace(ours, theirs)
            name = re.sub(r"to_([qkv])\.", r"\1.", name)
        out[name] = value
    return out


def prefixed(prefix: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in state.items()}


def write(folder, name: str, *states: dict[str, np.ndarray]):
    path = folder / f"{name}.safetensors"
    together = {key: value for state in states for key, value in state.items()}
    save_file({k: np.ascontiguousarray(v) for k, v in together.items()}, path)
    return path


def assert_equal(got, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("layout", ["diffusers", "original", "prefix"])
def test_a_transformers_file(tmp_path, states, trees, layout):
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
def test_an_autoencoders_file(tmp_path, states, trees, layout):
    state = states["autoencoder"]
    state = original_autoencoder(state) if layout == "original" else state
    params = read_files([write(tmp_path, "ae", state)])
    assert params.config.autoencoder == CONFIGS["autoencoder"]
    assert_equal(params.autoencoder, trees["autoencoder"])


def test_all_models_in_one_file_and_in_four(tmp_path, states, trees):
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    clip = states["clip"] | {
        "text_projection.weight": np.eye(64, dtype=np.float32),
        "logit_scale": np.zeros((), np.float32),
    }
    one = write(
        tmp_path,
        "all",
        prefixed("model.diffusion_model.", original_transformer(states["transformer"])),
        prefixed("vae.", original_autoencoder(states["autoencoder"])),
        prefixed("text_encoders.t5xxl.transformer.", states["t5"]),
        prefixed("text_encoders.clip_l.transformer.", clip),
    )
    four = [
        write(tmp_path, "flux", original_transformer(states["transformer"])),
        write(tmp_path, "ae", original_autoencoder(states["autoencoder"])),
        write(tmp_path, "t5", states["t5"]),
        write(tmp_path, "clip", clip),
    ]
    for files in ([one], four):
        params = read_files(files, tokenizers=tmp_path)
        assert params.config == FluxConfig(**CONFIGS)
        for name, tree in trees.items():
            assert_equal(getattr(params, name), tree)
    alone = read_files([one], parts=["transformer"])
    assert_equal(alone.transformer, trees["transformer"])
    assert not alone.clip
    assert alone.tokenizer == ""
    with pytest.raises(FileNotFoundError, match="need their tokenizers"):
        read_files(four)
    with pytest.raises(ValueError, match=r"no file holds t5; found autoencoder"):
        read_files(four[1:2], parts=["autoencoder", "t5"])
    with pytest.raises(ValueError, match=r"transformer is both in .*all.* and in .*flux"):
        read_files([one, four[0]], tokenizers=tmp_path)


@pytest.mark.parametrize("scaled", ["", "scale_weight", "weight_scale", "rows"])
def test_fp8(tmp_path, states, scaled):
    """Every fp8 number, times its layer's scale, arrives as it is."""
    state = original_transformer(states["transformer"])
    stored, exact = {}, {}
    for name, value in state.items():
        small = value.astype(jnp.float8_e4m3fn)
        stored[name] = exact[name] = value
        if name.endswith("weight") and value.ndim == 2:
            stored[name], exact[name] = small, small.astype(np.float32)
            if scaled:
                layer = name.removesuffix(".weight")
                scale = np.float32(0.125 if scaled != "rows" else 1) * np.ones((), np.float32)
                if scaled == "rows":
                    scale = 2.0 ** (np.arange(len(value), dtype=np.float32) % 5)
                ending = "weight_scale" if scaled == "rows" else scaled
                stored[f"{layer}.{ending}"] = scale
                stored[f"{layer}.{ending.replace('weight', 'input')}"] = np.ones((), np.float32)
                exact[name] = exact[name] * (scale[:, None] if scaled == "rows" else scale)
    if scaled:
        stored["scaled_fp8"] = np.zeros(0, jnp.float8_e4m3fn)
    got = read_files([write(tmp_path, "fp8", stored)], jnp.float32)
    plain = read_files([write(tmp_path, "plain", exact)])
    assert_equal(got.transformer, plain.transformer)
    halved = read_files([tmp_path / "fp8.safetensors"])
    assert halved.transformer["image_in"]["kernel"].dtype == jnp.bfloat16


def test_gguf(tmp_path, states):
    """Q8_0 and BF16 as the package itself reads them; Q4_K from random blocks."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, quants

    rng, exact = np.random.default_rng(5), {}
    writer = GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, value in original_transformer(states["transformer"]).items():
        kind = Kind.BF16 if value.ndim == 1 else Kind.Q8_0
        if name.endswith("linear2.weight"):  # 5 * 64 columns do not fill blocks of 256
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
    got = read_files([tmp_path / "flux.gguf"], jnp.float32)
    assert_equal(got.transformer, read_files([write(tmp_path, "exact", exact)]).transformer)
    half = tmp_path / "half.gguf"
    half.write_bytes((tmp_path / "flux.gguf").read_bytes()[:999])
    with pytest.raises(ValueError, match="no complete GGUF file"):
        read_files([half])


def test_schnell_has_no_guidance(tmp_path, states):
    state = original_transformer(states["transformer"])
    state = {name: value for name, value in state.items() if "guidance_in" not in name}
    config = read_files([write(tmp_path, "schnell", state)]).config
    assert not config.transformer.guidance_embeds
    assert (config.text_length, config.dynamic_shift, config.shift) == (256, False, 1.0)


def test_what_does_not_fit_is_told_in_the_files_own_names(tmp_path, states):
    state = original_transformer(states["transformer"])
    state["single_blocks.1.linear1.weight"] = state["single_blocks.1.linear1.weight"][:-1]
    del state["txt_in.bias"]
    state["double_blocks.0.img_attn.scale_weight"] = np.ones((), np.float32)
    with pytest.raises(ConversionError) as told:
        read_files([write(tmp_path, "bad", state)])
    for line in (
        "wrong shape: single_blocks.1.linear1.weight is [447, 64], expected [448, 64]",
        "missing key: txt_in.bias [64]",
        "unmatched key: double_blocks.0.img_attn.scale_weight",
        "3 key(s)",
    ):
        assert line in str(told.value)
    del state["img_in.weight"]
    with pytest.raises(ConversionError, match=r"missing key: img_in\.weight"):
        read_files([write(tmp_path, "worse", state)])


def test_another_model_is_named_by_what_is_nearest(tmp_path):
    state = {f"double_blocks.{i}.img_mlp.0.weight": np.ones((2, 2), np.float32) for i in range(3)}
    with pytest.raises(ValueError, match=r"nearest is 'FLUX transformer, original release'"):
        read_files([write(tmp_path, "chroma", state)])
    (tmp_path / "text.safetensors").write_text("not at all")
    with pytest.raises(ValueError, match="no complete safetensors file"):
        read_files([tmp_path / "text.safetensors"])
    with pytest.raises(FileNotFoundError, match="is neither a safetensors"):
        read_files([tmp_path / "nowhere.safetensors"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_full_size_layouts(layout):
    """FLUX.1-dev's names and shapes are recognised, and give FLUX.1-dev's configuration."""
    shapes = full_size_names(layout)
    (found,) = recognise(shapes, "file")
    assert found.layout is layout
    assert layout.config(shapes) == type(CONFIGS[layout.model])()


def test_parts_are_saved_and_loaded(tmp_path, states):
    params = read_files([write(tmp_path, "flux", original_transformer(states["transformer"]))])
    jitjax.save(params, tmp_path / "saved")
    loaded = jitjax.load(tmp_path / "saved")
    assert loaded.config == params.config
    assert_equal(loaded.transformer, params.transformer)
    given = jitjax.Conditioning(text=jnp.ones((1, 5, 6)), pooled=jnp.ones((1, 64)))
    noise = jax.random.normal(jax.random.key(0), (1, 16, 16))
    plan = jitjax.Plan(2)
    out = jitjax.denoise(loaded, given, noise, plan=plan)
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="have no autoencoder, only transformer"):
        jitjax.decode(loaded, out, grid=(4, 4))
    with pytest.raises(ValueError, match=r"have no t5.*pass a Conditioning"):
        jitjax.encode_prompt(loaded, "a red circle")
    with pytest.raises(ValueError, match="has no clip, only transformer"):
        jitjax.load(tmp_path / "saved", parts=("transformer", "clip"))
    with pytest.raises(ValueError, match="parts is 'transformer'; expected some of"):
        jitjax.load(tmp_path / "saved", parts="transformer")


def test_the_command_takes_parts_from_different_places(tmp_path, states, trees, capsys):
    """Single files by option, then a folder with another transformer."""
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    flux = str(write(tmp_path, "flux", original_transformer(states["transformer"])))
    ae = str(write(tmp_path, "ae", original_autoencoder(states["autoencoder"])))
    t5, clip = (str(write(tmp_path, name, states[name])) for name in ("t5", "clip"))
    encoders = ["--t5", t5, "--clip", clip, "--tokenizers", str(tmp_path)]
    exact, first = ["--dtype", "float32"], str(tmp_path / "first")
    assert main([flux, "--vae", ae, *encoders, *exact, "--out", first]) == 0
    loaded = jitjax.load(first)
    assert loaded.config == FluxConfig(**CONFIGS)
    for name, tree in trees.items():
        assert_equal(getattr(loaded, name), tree)

    folder, other = str(tmp_path / "folder"), dict(states["transformer"])
    assert main([first, "--to-diffusers", "--out", folder]) == 0
    other["proj_out.bias"] = other["proj_out.bias"] + 1
    changed = str(write(tmp_path, "other", original_transformer(other)))
    second = str(tmp_path / "second")
    assert main([folder, "--transformer", changed, "--out", second]) == 0
    loaded = jitjax.load(second)
    bias = np.asarray(other["proj_out.bias"].astype(jnp.bfloat16))  # bfloat16 by default
    np.testing.assert_array_equal(loaded.transformer["image_out"]["bias"], bias)
    assert_equal(
        loaded.t5["final_norm"]["scale"], trees["t5"]["final_norm"]["scale"].astype(jnp.bfloat16)
    )

    third = ["--transformer", f"{folder}/transformer", "--out", str(tmp_path / "third")]
    assert main([*third, *exact]) == 0  # the folder of one model
    assert_equal(jitjax.load(tmp_path / "third").transformer, trees["transformer"])

    alone = ["--parts", "transformer", "--out", str(tmp_path / "alone")]
    assert main([folder, *alone]) == 0
    assert not jitjax.load(tmp_path / "alone").t5
    out = ["--out", str(tmp_path / "none")]
    for arguments, message in (
        (out, "nothing to convert"),
        ([ae, "--parts", "t5", *out], "no file holds t5; found nothing"),
        ([ae, "--t5", ae, *out], "no file holds t5"),
        ([flux, "--t5", t5, *out], "need their tokenizers"),
        ([folder, "--tokenizers", str(tmp_path), *out], "has its own tokenizers"),
        ([first, "--to-diffusers", "--vae", ae, *out], "takes a checkpoint, --out, and nothing"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_repository_on_the_hub(tmp_path, states, trees, monkeypatch, capsys):
    """The hub itself is stood in for: nothing can be fetched here."""
    import huggingface_hub
    from huggingface_hub import errors

    folder = tmp_path / "cache"
    for component in COMPONENTS:
        (folder / component.folder).mkdir(parents=True)
    asked = {}

    def stand_in(repository, *, allow_patterns):
        asked[repository] = allow_patterns
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    def http(kind):
        error = kind.__new__(kind)  # it wants a response, of a library that depends on the version
        Exception.__init__(error, "told so")
        return error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = ["--out", str(tmp_path / "out")]
    name = "black-forest-labs/FLUX.1-dev"
    for outcome, message in (  # noqa: B007
        (http(errors.GatedRepoError), "is gated: log in with `hf auth login`"),
        (http(errors.RepositoryNotFoundError), f"has no repository {name}, or not for no token"),
        (errors.LocalEntryNotFoundError("nothing"), "the hub cannot be reached"),
        (http(errors.HfHubHTTPError), "broke off (told so)"),
    ):
        assert main([name, *out]) == 2
        assert message in capsys.readouterr().err
    assert "transformer/*.safetensors" in asked[name]
    assert not any("flux1" in pattern or pattern.startswith("*") for pattern in asked[name])
    outcome = folder
    assert main([name, "--parts", "transformer", *out]) == 2  # it was taken for the folder
    assert "is no complete diffusers folder" in capsys.readouterr().err
    assert "text_encoder_2/*.safetensors" not in asked[name]
    assert main(["nowhere", *out]) == 2
    assert "nowhere is neither a safetensors or GGUF file nor" in capsys.readouterr().err
