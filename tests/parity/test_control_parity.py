"""Fill, Canny and Kontext pipelines that diffusers saves, and control LoRAs that it merges."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

from common import TOLERANCE, numpy_state, randomised, relative_error  # noqa: E402
from diffusers.loaders import lora_conversion_utils, lora_pipeline  # noqa: E402
from golden.full_size import __file__ as script  # noqa: E402
from golden.full_size import unfold  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_flux_parity import CONFIGS, random_inputs, reference, run, run_reference  # noqa: E402

import jitjax  # noqa: E402
from jitjax.checkpoint import FluxParams  # noqa: E402
from jitjax.convert.__main__ import main  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.lora import merge_loras  # noqa: E402
from jitjax.convert.sources.single_files import whole_config  # noqa: E402
from jitjax.convert.tables.engine import leaves_by_path  # noqa: E402
from jitjax.loading import BUNDLED  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG = CONFIGS["guidance"]
CONVERTER = "_convert_bfl_flux_control_lora_to_diffusers"


@pytest.fixture(scope="module")
def components() -> dict:
    """The models of `tiny`, as diffusers loads them."""
    return diffusers.FluxPipeline.from_pretrained(BUNDLED / "tiny").components


@pytest.mark.parametrize(
    ("name", "channels"),
    [("FluxFillPipeline", 384), ("FluxControlPipeline", 128), ("FluxKontextPipeline", 64)],
)
def test_pipelines(tmp_path, components, name, channels):
    """Saved by diffusers, converted, and written back: the same velocities at each place."""
    config = dict(components["transformer"].config) | {"in_channels": channels, "out_channels": 64}
    config |= {"num_layers": 1, "num_single_layers": 1}
    model = randomised(diffusers.FluxTransformer2DModel.from_config(config), seed=5)
    cls = getattr(diffusers, name)
    pipeline = cls(
        **{
            key: components[key]
            for key in ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2",
                        "tokenizer_2")
        },
        transformer=model,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "source")
    options = ["--dtype", "float32", "--out"]
    assert main([str(tmp_path / "source"), *options, str(tmp_path / "out")]) == 0
    params = jitjax.load(tmp_path / "out")
    assert params.config.transformer.control == {384: "fill", 128: "picture", 64: "none"}[channels]
    assert params.config.uses_reference == ("Kontext" in name)
    inputs = random_inputs(params.config.transformer, 1, (3, 4), 5, seed=6)
    expected = run_reference(model, params.config.transformer, inputs)
    got = run(params.config.transformer, params.transformer, inputs)
    assert relative_error(got, expected) < TOLERANCE

    assert main([str(tmp_path / "out"), "--to-diffusers", "--out", str(tmp_path / "back")]) == 0
    back = cls.from_pretrained(tmp_path / "back")
    assert back.transformer.config.in_channels == channels
    assert back.transformer.out_channels == 64
    again = run_reference(back.transformer, params.config.transformer, inputs)
    np.testing.assert_array_equal(again, expected)


def control_lora(model, channels: int, names) -> dict[str, torch.Tensor]:
    """Updates of rank 4 of every linear layer, with biases, and whole norms.

    Args:
        model: the transformer that they are for.
        channels: input channels of the layer of the image.
        names: returns the names in the file of a layer and of its kind of tensor.
    """
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            inputs = channels if name == "x_embedder" else module.in_features
            tensors[names(name, "lora_A.weight")] = torch.randn(4, inputs, generator=generator)
            b = torch.randn(module.out_features, 4, generator=generator) / 10
            tensors[names(name, "lora_B.weight")] = b
            bias = torch.randn(module.out_features, generator=generator)
            tensors[names(name, "lora_B.bias")] = bias
        elif name.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
            tensors[names(name, "weight")] = torch.rand(module.weight.shape, generator=generator)
    return tensors


def original_lora(channels: int) -> dict[str, torch.Tensor]:
    """The same in the names of Black Forest Labs' files: those of the original release."""
    h = CONFIG.hidden
    generator = torch.Generator().manual_seed(4)
    layers = {
        "img_in": (h, channels), "txt_in": (h, CONFIG.joint_attention_dim),
        "time_in.in_layer": (h, 256), "time_in.out_layer": (h, h),
        "guidance_in.in_layer": (h, 256), "guidance_in.out_layer": (h, h),
        "vector_in.in_layer": (h, CONFIG.pooled_projection_dim), "vector_in.out_layer": (h, h),
        "final_layer.linear": (CONFIG.out_channels, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }  # fmt: skip
    norms = []
    for i in range(CONFIG.num_layers):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            layers |= {
                f"{block}_mod.lin": (6 * h, h), f"{block}_attn.qkv": (3 * h, h),
                f"{block}_attn.proj": (h, h), f"{block}_mlp.0": (4 * h, h),
                f"{block}_mlp.2": (h, 4 * h),
            }  # fmt: skip
            norms += [f"{block}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
    for i in range(CONFIG.num_single_layers):
        block = f"single_blocks.{i}"
        layers |= {f"{block}.linear1": (7 * h, h), f"{block}.linear2": (h, 5 * h)}
        layers[f"{block}.modulation.lin"] = (3 * h, h)
        norms += [f"{block}.norm.{kind}_norm.scale" for kind in ("query", "key")]
    tensors = {name: torch.rand(CONFIG.attention_head_dim, generator=generator) for name in norms}
    for name, (rows, columns) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 10
        tensors[f"{name}.lora_B.bias"] = torch.randn(rows, generator=generator)
    return tensors


def small_converter():
    """diffusers' converter of these files, whose sizes are written in it, for the small model."""
    source = inspect.getsource(getattr(lora_conversion_utils, CONVERTER))
    for old, new in (
        ("num_layers = 19", f"num_layers = {CONFIG.num_layers}"),
        ("num_single_layers = 38", f"num_single_layers = {CONFIG.num_single_layers}"),
        ("inner_dim = 3072", f"inner_dim = {CONFIG.hidden}"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    names = dict(vars(lora_conversion_utils))
    exec(source, names)
    return names[CONVERTER]


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_control_lora_equals_diffusers(tmp_path, monkeypatch, layout, channels):
    model = reference(CONFIG, 0)
    tree = from_state("transformer", numpy_state(model), CONFIG)
    if layout == "original":
        tensors = original_lora(channels)
        monkeypatch.setattr(lora_pipeline, CONVERTER, small_converter())
    else:
        tensors = control_lora(model, channels, "transformer.{}.{}".format)
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    if layout == "original":
        # The original layer returns (shift, scale), so diffusers swaps the halves of B's rows. It
        # swaps those of A too (as of 0.42), which are ranks, not rows of the layer; B's columns
        # stay, so the product would be another one. Swapped before, they come out right.
        name = "final_layer.adaLN_modulation.1.lora_A.weight"
        tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])
    (tmp_path / "diffusers").mkdir()
    save_file(tensors, tmp_path / "diffusers/lora.safetensors")

    others = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxControlPipeline(transformer=model, **dict.fromkeys(others))
    pipeline.load_lora_weights(tmp_path / "diffusers", weight_name="lora.safetensors")
    pipeline.fuse_lora()
    wide = pipeline.transformer
    assert wide.config.in_channels == channels

    params = FluxParams(tree, {}, {}, {}, whole_config({"transformer": CONFIG}), "")
    merged = merge_loras(params, [(file, 1.0)])
    config = merged.config.transformer
    assert (config.in_channels, config.out_channels) == (channels, CONFIG.in_channels)
    inputs = random_inputs(config, 2, (3, 4), 5, seed=6)
    expected = run_reference(wide, config, inputs)
    assert relative_error(run(config, merged.transformer, inputs), expected) < TOLERANCE

    # The norms replace the model's, which `unload_lora_weights` would put back.
    state = {
        name.replace(".base_layer", ""): value
        for name, value in numpy_state(wide).items()
        if ".lora_" not in name
    }
    want = leaves_by_path(from_state("transformer", state, config))
    before, got = leaves_by_path(tree), leaves_by_path(merged.transformer)
    assert got.keys() == want.keys()
    for name, value in want.items():
        # The order of the float32 sums differs.
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.array_equal(value, before[name])


def test_full_size_names_are_those_that_diffusers_converts():
    """Its converter takes every tensor of our list, misses none, and fits the wider model."""
    path = Path(script).with_suffix(".json")
    shapes = unfold(json.loads(path.read_text())["control LoRA"]["tensors"])
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted = getattr(lora_conversion_utils, CONVERTER)(tensors)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            in_channels=128, out_channels=64, guidance_embeds=True
        )
    expected = {}
    for name, value in model.state_dict().items():
        layer, _, kind = f"transformer.{name}".rpartition(".")
        if value.ndim == 2:
            expected[f"{layer}.lora_A.weight"] = (128, value.shape[1])
            expected[f"{layer}.lora_B.weight"] = (value.shape[0], 128)
        elif kind == "bias":
            expected[f"{layer}.lora_B.bias"] = tuple(value.shape)
        else:
            expected[f"transformer.{name}"] = tuple(value.shape)
    assert {name: tuple(value.shape) for name, value in converted.items()} == expected
