"""Names of LoRA files in use, and each kind of update against a calculation by hand in float64."""

from __future__ import annotations

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, H, original_transformer, random_states

import jitjax
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import component_of, from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.lora.names import (
    OTHER_KINDS,
    OTHER_MODELS,
    Key,
    layers_by_name,
    match_layer,
    parse_key,
)
from jitjax.convert.sources import diffusers_folder
from jitjax.convert.sources.single_files import open_files
from jitjax.convert.tables.engine import ConversionError, invert_rule, leaves_by_path

RNG = np.random.default_rng(11)
STATES = random_states()
SIZES = {  # layer of the original release -> (its diffusers layers and their rows, columns)
    "double_blocks.0.img_attn.qkv": (
        {f"transformer_blocks.0.attn.to_{c}": H for c in "qkv"}, H),
    "double_blocks.1.txt_attn.qkv": (
        {f"transformer_blocks.1.attn.add_{c}_proj": H for c in "qkv"}, H),
    "double_blocks.0.img_attn.proj": ({"transformer_blocks.0.attn.to_out.0": H}, H),
    "double_blocks.1.txt_attn.proj": ({"transformer_blocks.1.attn.to_add_out": H}, H),
    "double_blocks.1.img_mlp.2": ({"transformer_blocks.1.ff.net.2": H}, 4 * H),
    "single_blocks.1.linear1": (
        {**{f"single_transformer_blocks.1.attn.to_{c}": H for c in "qkv"},
         "single_transformer_blocks.1.proj_mlp": 4 * H}, H),
    "single_blocks.1.linear2": ({"single_transformer_blocks.1.proj_out": H}, 5 * H),
    "img_in": ({"x_embedder": H}, 16),
}  # fmt: skip
TEXT = {"clip": "text_model.encoder.layers.1.mlp.fc1",
        "t5": "encoder.block.1.layer.0.SelfAttention.q"}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    trees = {name: from_state(name, state, CONFIGS[name]) for name, state in STATES.items()}
    return jitjax.checkpoint.FluxParams(**trees, config=FluxConfig(**CONFIGS), tokenizer="")


def save(path, state, metadata=None):
    save_file({k: np.array(v, order="C") for k, v in state.items()}, path, metadata=metadata)
    return path


def random(*shape):
    return RNG.standard_normal(shape, np.float32) / 2


def low_rank(rows, columns, rank):
    """Return A, B and their product in float64."""
    a, b = random(rank, columns), random(rows, rank)
    return a, b, b.astype(np.float64) @ a


def weights(params, model="transformer") -> dict[str, np.ndarray]:
    """Return all weights of a model by diffusers name."""
    leaves, out = leaves_by_path(params.part(model)), {}
    for rule in component_of(model).rules(CONFIGS[model]):
        out |= invert_rule(rule, np.asarray(leaves[rule.target]))
    return out


def check(params, loras, expected, model="transformer"):
    """Compare merged weights; `expected` has the changed ones, float64."""
    merged = merge_loras(params, loras)
    compare(weights(merged, model), expected, model)


def compare(got, expected, model="transformer"):
    assert expected
    for name, value in STATES[model].items():
        if name in expected:
            np.testing.assert_allclose(
                got[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name
            )
            assert not np.allclose(got[name], value, atol=1e-3)
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)


def base(layer) -> np.ndarray:
    """Return the weight of an original layer, float64."""
    targets, _ = SIZES[layer]
    parts = [STATES["transformer"][f"{t}.weight"].astype(np.float64) for t in targets]
    return np.concatenate(parts)


def split(layer, weight) -> dict[str, np.ndarray]:
    """Return the diffusers weights of an original layer's weight."""
    targets, _ = SIZES[layer]
    parts = np.split(weight, np.cumsum(list(targets.values()))[:-1])
    return {f"{target}.weight": part for target, part in zip(targets, parts, strict=True)}


XLABS = {
    "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
    "double_blocks.1.processor.qkv_lora2": "double_blocks.1.txt_attn.qkv",
    "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
    "double_blocks.1.processor.proj_lora2": "double_blocks.1.txt_attn.proj",
    "single_blocks.1.processor.proj_lora": "single_blocks.1.linear2",
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(tmp_path, params, prefix):
    state, expected = {}, {}
    for name, layer in XLABS.items():
        targets, columns = SIZES[layer]
        a, b, product = low_rank(sum(targets.values()), columns, 3)
        state |= {f"{prefix}{name}.down.weight": a, f"{prefix}{name}.up.weight": b}
        expected |= split(layer, base(layer) + product)
    # `qkv_lora` of a single block is the first three quarters of `linear1`'s rows, without the MLP.
    a, b, product = low_rank(3 * H, H, 3)
    name = f"{prefix}single_blocks.2.processor.qkv_lora"
    state |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
    for c, part in zip("qkv", np.split(product, 3), strict=True):
        target = f"single_transformer_blocks.2.attn.to_{c}.weight"
        expected[target] = STATES["transformer"][target] + part
    check(params, [(save(tmp_path / "x.safetensors", state), 1.0)], expected)


@pytest.mark.parametrize(
    ("model", "prefixes"),
    [
        ("clip", ["text_encoder.text_model.", "text_encoder.", "lora_te1_text_model_", "lora_te1_",
                  "text_encoders.clip_l.transformer.text_model.", "base_model.model.text_model.",
                  "text_encoder.base_model.model."]),
        ("t5", ["text_encoder_2.", "lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer.",
                "base_model.model."]),
    ],
)  # fmt: skip
def test_names_of_text_encoders(tmp_path, params, model, prefixes):
    weight = f"{TEXT[model]}.weight"
    a, b, product = low_rank(*STATES[model][weight].shape, 2)
    for prefix in prefixes:
        name = TEXT[model].removeprefix("text_model.")
        name = prefix + (name.replace(".", "_") if prefix.startswith("lora_") else name)
        pair = ("lora_down", "lora_up") if "lora_" in prefix or "xl" in prefix else (
            "lora_A", "lora_B")  # fmt: skip
        state = {f"{name}.{pair[0]}.weight": a, f"{name}.{pair[1]}.weight": b}
        file = save(tmp_path / "te.safetensors", state)
        check(params, [(file, 1.0)], {weight: STATES[model][weight] + product}, model)


@pytest.mark.parametrize(
    "suffixes",
    [("lora_A.style.weight", "lora_B.style.weight"), ("lora_A.default_0.weight",
     "lora_B.default_0.weight"), ("lora_A", "lora_B"), ("lora.down.weight", "lora.up.weight"),
     ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")],
)  # fmt: skip
def test_suffixes(tmp_path, params, suffixes):
    a, b, product = low_rank(H, 16, 2)
    for prefix in ("transformer.", "transformer._orig_mod.", "transformer.base_model.model."):
        state = {f"{prefix}x_embedder.{s}": v for s, v in zip(suffixes, (a, b), strict=True)}
        file = save(tmp_path / "s.safetensors", state)
        check(params, [(file, 1.0)], split("img_in", base("img_in") + product))


def test_two_adapters_are_refused(tmp_path, params):
    a, b, _ = low_rank(H, 16, 2)
    state = {}
    for name in ("ink", "grain"):
        state |= {f"x_embedder.lora_A.{name}.weight": a, f"x_embedder.lora_B.{name}.weight": b}
    file = save(tmp_path / "two.safetensors", state)
    with pytest.raises(ConversionError, match="has 2 PEFT adapters: grain, ink; expected one"):
        merge_loras(params, [(file, 1.0)])


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "lycoris_"])
@pytest.mark.parametrize("rank", [1, 3])
def test_loha(tmp_path, params, prefix, rank):
    """alpha / rank * (B1 A1) * (B2 A2), elementwise; fused layers are split."""
    state, expected = {}, {}
    for layer in SIZES:
        targets, columns = SIZES[layer]
        rows = sum(targets.values())
        (a1, b1, first), (a2, b2, second) = (low_rank(rows, columns, rank) for _ in range(2))
        name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
        state |= {f"{name}.hada_w1_a": b1, f"{name}.hada_w1_b": a1,
                  f"{name}.hada_w2_a": b2, f"{name}.hada_w2_b": a2,
                  f"{name}.alpha": np.asarray(2.0, np.float32)}  # fmt: skip
        expected |= split(layer, base(layer) + 2 / rank * first * second)
    check(params, [(save(tmp_path / "h.safetensors", state), 1.0)], expected)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("low", ["", "1", "2", "12"])
def test_lokr(tmp_path, params, low, rank):
    """kron(W1, W2), with alpha / rank only if a factor is of low rank."""
    state, expected = {}, {}
    for layer in SIZES:
        targets, columns = SIZES[layer]
        shapes = (4, 2), (sum(targets.values()) // 4, columns // 2)
        name = f"lycoris_{layer.replace('.', '_')}"
        factors = []
        for number, (rows, width) in zip("12", shapes, strict=True):
            if number in low:
                a, b, product = low_rank(rows, width, rank)
                state |= {f"{name}.lokr_w{number}_a": b, f"{name}.lokr_w{number}_b": a}
                factors.append(product)
            else:
                state[f"{name}.lokr_w{number}"] = random(rows, width)
                factors.append(state[f"{name}.lokr_w{number}"].astype(np.float64))
        state[f"{name}.alpha"] = np.asarray(2.0, np.float32)
        factor = 0.5 * (2 / rank if low else 1)
        expected |= split(layer, base(layer) + factor * np.kron(*factors))
    check(params, [(save(tmp_path / "k.safetensors", state), 0.5)], expected)


def dora(weight, change, magnitude):
    """The merged weight: magnitudes of rows [out, 1] or of columns [1, in]."""
    direction = weight + change
    axis = 1 if magnitude.shape[1] == 1 else 0
    return magnitude * direction / np.linalg.norm(direction, axis=axis, keepdims=True)


def dora_file(path, layers, axis, prefix, rank):
    """Write a DoRA file; return layer -> (change, magnitude)."""
    state, out = {}, {}
    for layer, (rows, columns) in layers.items():
        a, b, product = low_rank(rows, columns, rank)
        magnitude = 1 + np.abs(random(*((rows, 1) if axis == 1 else (1, columns))))
        name = prefix + layer.replace(".", "_")
        state |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b,
                  f"{name}.dora_scale": magnitude, f"{name}.alpha": np.float32(3)}  # fmt: skip
        out[layer] = (3 / rank * product, magnitude)
    save(path, state)
    return out


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_original_layers(tmp_path, params, axis, rank):
    """Norms of columns go over all rows of a fused layer, in one leaf (qkv) or two (linear1)."""
    sizes = {n: (sum(t.values()), columns) for n, (t, columns) in SIZES.items()}
    file = tmp_path / "d.safetensors"
    content = dora_file(file, sizes, axis, "lora_unet_", rank)
    expected = {}
    for layer, (change, magnitude) in content.items():
        expected |= split(layer, dora(base(layer), change, magnitude))
    check(params, [(file, 1.0)], expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_diffusers_layers(tmp_path, params, axis):
    """OneTrainer's names; each of q, k and v has its own norms."""
    shapes = {n.removesuffix(".weight"): w.shape for n, w in STATES["transformer"].items()
              if w.ndim == 2 and "single_transformer_blocks.1." in n}  # fmt: skip
    file = tmp_path / "o.safetensors"
    expected = {}
    for layer, (change, magnitude) in dora_file(file, shapes, axis, "lora_transformer_", 2).items():
        weight = STATES["transformer"][f"{layer}.weight"].astype(np.float64)
        expected[f"{layer}.weight"] = dora(weight, change, magnitude)
    check(params, [(file, 1.0)], expected)


def test_dora_of_other_kinds(tmp_path, params):
    """LyCORIS also decomposes LoHa and LoKr."""
    qkv, mlp = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"
    (a1, b1, first), (a2, b2, second) = (low_rank(3 * H, H, 2) for _ in range(2))
    w1, w2 = random(7, 2), random(H, H // 2)
    rows, columns = 1 + random(3 * H, 1) ** 2, 1 + random(1, H) ** 2
    a, b = (f"lora_unet_{layer.replace('.', '_')}" for layer in (qkv, mlp))
    state = {f"{a}.hada_w1_a": b1, f"{a}.hada_w1_b": a1, f"{a}.hada_w2_a": b2,
             f"{a}.hada_w2_b": a2, f"{a}.dora_scale": rows,
             f"{b}.lokr_w1": w1, f"{b}.lokr_w2": w2, f"{b}.dora_scale": columns}  # fmt: skip
    expected = split(qkv, dora(base(qkv), first * second, rows))
    expected |= split(mlp, dora(base(mlp), np.kron(w1, w2).astype(np.float64), columns))
    check(params, [(save(tmp_path / "l.safetensors", state), 1.0)], expected)


@pytest.mark.parametrize("split_bytes", [0, diffusers_folder.SPLIT_BYTES])
def test_dora_after_others_and_by_conversion(tmp_path, params, monkeypatch, split_bytes):
    """A plain LoRA, DoRA by columns at scale 0.5, DoRA by rows, again a plain one: in this order.

    The conversion works on single blocks of stacked leaves.
    """
    monkeypatch.setattr(diffusers_folder, "SPLIT_BYTES", split_bytes)
    layers = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1")
    sizes = {n: (sum(SIZES[n][0].values()), SIZES[n][1]) for n in layers}
    plain, loras = [], []
    for i in (0, 3):
        state = {}
        plain.append({})
        for layer, (rows, columns) in sizes.items():
            a, b, product = low_rank(rows, columns, 2)
            state |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
            plain[-1][layer] = product
        loras.append((save(tmp_path / f"{i}.safetensors", state), 1.0))
    doras = [dora_file(tmp_path / f"{i}.safetensors", sizes, i - 1, "lora_unet_", 2)
             for i in (1, 2)]  # fmt: skip
    loras[1:1] = [(tmp_path / "1.safetensors", 0.5), (tmp_path / "2.safetensors", 1.0)]
    expected = {}
    for layer in layers:
        weight = base(layer) + plain[0][layer]
        weight = weight + 0.5 * (dora(weight, *doras[0][layer]) - weight)
        weight = dora(weight, *doras[1][layer])
        expected |= split(layer, weight + plain[1][layer])
    check(params, loras, expected)

    flux = save(tmp_path / "flux.safetensors", original_transformer(STATES["transformer"]))
    out = tmp_path / "out"
    options = [f"{file}:{scale}" for file, scale in loras]
    assert main([str(flux), "--dtype", "float32", "--out", str(out), "--lora", *options]) == 0
    compare(weights(jitjax.load(out)), expected)


def test_differences(tmp_path, params):
    """ComfyUI's `diff`, `diff_b`, also of norms and fused layers; LyCORIS' `w_norm`."""
    original = original_transformer(STATES["transformer"])
    names = {
        "diffusion_model.double_blocks.0.img_attn.qkv.diff": "double_blocks.0.img_attn.qkv.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": "double_blocks.0.img_attn.qkv.bias",
        "diffusion_model.single_blocks.1.linear1.diff_b": "single_blocks.1.linear1.bias",
        "diffusion_model.final_layer.adaLN_modulation.1.diff":
            "final_layer.adaLN_modulation.1.weight",
        "diffusion_model.double_blocks.1.txt_attn.norm.key_norm.scale.diff":
            "double_blocks.1.txt_attn.norm.key_norm.scale",
        "lora_unet_double_blocks_1_img_attn_norm_query_norm.w_norm":
            "double_blocks.1.img_attn.norm.query_norm.scale",
    }  # fmt: skip
    state = {key: random(*original[name].shape) for key, name in names.items()}
    for name, key in {name: key for key, name in names.items()}.items():
        original[name] = original[name] + np.float32(0.5) * state[key]
    file = save(tmp_path / "diff.safetensors", state)
    from_file = save(tmp_path / "flux.safetensors", original)
    expected = open_files([from_file]).read().transformer
    merged = merge_loras(params, [(file, 0.5)]).transformer
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, expected)

    norm = "text_model.encoder.layers.0.layer_norm1"
    prefix = f"text_encoders.clip_l.transformer.{norm}"
    state = {f"{prefix}.diff": random(64), f"{prefix}.diff_b": random(64)}
    file = save(tmp_path / "te.safetensors", state)
    check(params, [(file, 1.0)], {
        f"{norm}.weight": STATES["clip"][f"{norm}.weight"] + state[f"{prefix}.diff"],
        f"{norm}.bias": STATES["clip"][f"{norm}.bias"] + state[f"{prefix}.diff_b"],
    }, "clip")  # fmt: skip


def test_differences_of_zero_are_passed(tmp_path, params):
    """Also of layers and biases that FLUX does not have."""
    a, b, product = low_rank(H, 16, 2)
    state = {
        "diffusion_model.img_in.lora_down.weight": a,
        "diffusion_model.img_in.lora_up.weight": b,
        "diffusion_model.img_in.diff_b": np.zeros(H, np.float32),
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.diff_b": np.zeros(
            6, np.float32
        ),
        "diffusion_model.norm_that_is_not_there.diff": np.zeros(3, np.float32),
    }
    file = save(tmp_path / "zero.safetensors", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(params, [(file, 1.0)], split("img_in", base("img_in") + product))
    state["diffusion_model.norm_that_is_not_there.diff"] += 1
    with pytest.raises(ConversionError, match=r"unknown key: diffusion_model\.norm_that_is_not"):
        merge_loras(params, [(save(file, state), 1.0)])


def test_bias_of_b(tmp_path, params):
    """lora_B.bias is added to the layer's bias, scaled as the matrices are; split as the layer."""
    layer = "double_blocks.0.img_attn.qkv"
    a, b, product = low_rank(3 * H, H, 2)
    bias = random(3 * H)
    state = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b,
             f"{layer}.lora_B.bias": bias}  # fmt: skip
    expected = split(layer, base(layer) + 3 / 2 * product)
    for c, part in zip("qkv", np.split(bias, 3), strict=True):
        name = f"transformer_blocks.0.attn.to_{c}.bias"
        expected[name] = STATES["transformer"][name] + 3 / 2 * part
    check(params, [(save(tmp_path / "b.safetensors", state, {"lora_alpha": "3"}), 1.0)], expected)


def test_embeddings(tmp_path, params):
    """ComfyUI's extraction has them as lora_up and lora_down, PEFT as lora_embedding_A and B."""
    name = "text_model.embeddings.token_embedding"
    a, b, product = low_rank(*STATES["clip"][f"{name}.weight"].shape, 2)
    expected = {f"{name}.weight": STATES["clip"][f"{name}.weight"] + product}
    comfy = f"text_encoders.clip_l.transformer.{name}"
    for state in (
        {f"{comfy}.lora_down.weight": a, f"{comfy}.lora_up.weight": b},
        {
            f"text_encoder.{name}.lora_embedding_A": b.T,
            f"text_encoder.{name}.lora_embedding_B": a.T,
        },
    ):
        check(params, [(save(tmp_path / "e.safetensors", state), 1.0)], expected, "clip")


def test_other_dtypes(tmp_path, params):
    """float64, float16 and bfloat16 matrices."""
    for dtype in (np.float64, np.float16, jnp.bfloat16):
        a, b = random(2, 16).astype(dtype), random(H, 2).astype(dtype)
        state = {"x_embedder.lora_A.weight": a, "x_embedder.lora_B.weight": b}
        product = b.astype(np.float64) @ a.astype(np.float64)
        file = save(tmp_path / "t.safetensors", state)
        check(params, [(file, 1.0)], split("img_in", base("img_in") + product))


def test_models_that_are_not_loaded(tmp_path, params):
    """They are passed over with one line; a file with nothing else is refused."""
    a, b, product = low_rank(H, 16, 2)
    text = {f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1.{s}.weight": v for i in range(12)
            for s, v in (("lora_down", random(2, 64)), ("lora_up", random(10, 2)))}  # fmt: skip
    unet = {"lora_unet_img_in.lora_down.weight": a, "lora_unet_img_in.lora_up.weight": b}
    file = save(tmp_path / "te.safetensors", text | unet)
    alone = dataclasses.replace(params, clip={}, t5={}, autoencoder={})
    with pytest.warns(
        UserWarning, match=r"passed over .*: clip \(12 layers\); .*: transformer"
    ) as w:
        merged = merge_loras(alone, [(file, 1.0)])
    assert len(w) == 1
    expected = split("img_in", base("img_in") + product)
    compare(weights(merged), expected)
    with pytest.warns(UserWarning, match=r"clip \(12 layers\); .*; nothing of it is merged"):
        merged = merge_loras(alone, [(save(file, text), 1.0)])
    jax.tree.map(np.testing.assert_array_equal, merged.transformer, alone.transformer)
    encoder = dataclasses.replace(params, transformer={}, autoencoder={}, t5={})
    for state in (unet, {f"double_blocks.0.img_attn.proj.{s}": v for s, v in (
        ("lora_A.weight", random(2, H)), ("lora_B.weight", random(H, 2)))}):  # fmt: skip
        with pytest.warns(UserWarning, match=r"transformer \(1 layers\); .*; nothing of it"):
            merge_loras(encoder, [(save(file, state), 1.0)])


@pytest.mark.parametrize("model", ["transformer", "clip", "t5"])
def test_names_without_prefix_belong_to_one_model(model):
    """Loaded or not, at full size; and no name of FLUX.1 is taken for another model's."""
    config = FluxConfig(TransformerConfig(), T5Config(), CLIPConfig(), AutoencoderConfig())
    layers = {name: layers_by_name(name, config) for name in ("transformer", "clip", "t5")}
    others = {name: value for name, value in layers.items() if name != model}
    for name in layers[model]:
        key = f"{name}.lora_A.weight"
        assert parse_key(key) == Key(name, "A", None)
        assert not any(re.search(pattern, key) for pattern, _ in (*OTHER_MODELS, *OTHER_KINDS))
        assert match_layer(name, layers) == (model, name, layers[model][name])
        assert match_layer(name, others) == (model, name, None)
