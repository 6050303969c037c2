"""Control LoRAs, which widen a model, against a calculation by hand; and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import TRANSFORMER, H, original_transformer, random_states, write

import jitjax
from jitjax.checkpoint import FluxParams, quantise_params
from jitjax.config import TransformerConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import component_of, from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.sources.single_files import whole_config
from jitjax.convert.tables.engine import ConversionError
from jitjax.models.quantised import Quantised

LATENTS, RANK = TRANSFORMER.in_channels, 3
WIDE = dataclasses.replace(TRANSFORMER, in_channels=2 * LATENTS)
STATE = random_states()["transformer"]


def params_of(config: TransformerConfig = TRANSFORMER) -> FluxParams:
    rng = np.random.default_rng(2)
    state = STATE
    if config != TRANSFORMER:
        image = rng.standard_normal((H, config.in_channels), np.float32)
        state = STATE | {"x_embedder.weight": image}
    tree = from_state("transformer", state, config)
    return FluxParams(tree, {}, {}, {}, whole_config({"transformer": config}), "")


def control_lora(seed: int = 3, columns: int = 2 * LATENTS) -> dict[str, np.ndarray]:
    """Return a LoRA with the names of Black Forest Labs' files: every layer, biases, norms."""
    rng, wide = np.random.default_rng(seed), STATE
    wide = STATE | {"x_embedder.weight": np.zeros((H, columns), np.float32)}
    out = {}
    for name, value in original_transformer(wide).items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale":
            out[name] = rng.standard_normal(value.shape, np.float32)
        elif kind == "weight":
            rows, inputs = value.shape
            out[f"{layer}.lora_A.weight"] = rng.standard_normal((RANK, inputs), np.float32)
            out[f"{layer}.lora_B.weight"] = rng.standard_normal((rows, RANK), np.float32) / 4
            out[f"{layer}.lora_B.bias"] = rng.standard_normal(rows, np.float32)
    return out


def by_hand(lora: dict[str, np.ndarray], scale: float) -> dict:
    """Return the merged transformer: computed in float64 on the original names."""
    wide = np.zeros((H, 2 * LATENTS), np.float32)
    wide[:, :LATENTS] = STATE["x_embedder.weight"]
    state = original_transformer(STATE | {"x_embedder.weight": wide})
    merged = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        value = value.astype(np.float64)
        if kind == "scale":
            value = value + scale * (lora[name] - value)
        elif kind == "bias":
            value = value + scale * lora[f"{layer}.lora_B.bias"]
        else:
            a, b = lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"]
            value = value + scale * b.astype(np.float64) @ a
        merged[name] = value.astype(np.float32)
    return merged


def assert_close(got, expected) -> None:
    # Sums of three products of order 1, in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def save(path, state):
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)
    return path


@pytest.fixture
def lora(tmp_path):
    return save(tmp_path / "canny.safetensors", control_lora())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merged_at_conversion(tmp_path, lora, scale):
    source = write(tmp_path, "flux", original_transformer(STATE))
    expected = tmp_path / "expected"
    merged = write(tmp_path, "merged", by_hand(control_lora(), scale))
    out = tmp_path / "canny"
    options = ["--dtype", "float32", "--out"]
    assert main([str(merged), *options, str(expected)]) == 0
    assert main([str(source), "--lora", f"{lora}:{scale}", *options, str(out)]) == 0
    got, expected = jitjax.load(out), jitjax.load(expected)
    assert got.config == expected.config
    assert got.config.transformer == WIDE
    assert_close(got.transformer, expected.transformer)


def test_merged_into_loaded_parameters(tmp_path, lora):
    params = params_of()
    before = np.array(params.transformer["image_in"]["kernel"])
    merged = merge_loras(params, [(lora, 1.0)])
    (tmp_path / "x").mkdir()
    expected = write(tmp_path / "x", "merged", by_hand(control_lora(), 1.0))
    assert main([str(expected), "--dtype", "float32", "--out", str(tmp_path / "out")]) == 0
    assert_close(merged.transformer, jitjax.load(tmp_path / "out").transformer)
    assert merged.config.transformer == WIDE
    assert params.config.transformer == TRANSFORMER
    np.testing.assert_array_equal(params.transformer["image_in"]["kernel"], before)
    # Without its update the model ignores the control picture.
    off = merge_loras(params, [(lora, 0.0)])
    assert off.config.transformer == WIDE
    np.testing.assert_array_equal(off.transformer["image_in"]["kernel"][:LATENTS], before)
    assert not off.transformer["image_in"]["kernel"][LATENTS:].any()


@pytest.mark.slow
def test_beside_quantised_weights(lora):
    """The kernels of the blocks keep their values; the update stands beside them."""
    quantised = merge_loras(quantise_params(params_of(), "int8"), [(lora, 1.0)])
    plain = merge_loras(params_of(), [(lora, 1.0)])
    assert quantised.config == plain.config
    kernel = quantised.transformer["single_blocks"]["out"]["kernel"]
    assert isinstance(kernel, Quantised)
    assert kernel.down is not None
    assert kernel.down.shape == (TRANSFORMER.num_single_layers, 5 * H, RANK)
    for name in ("image_in", "image_out", "final_modulation"):
        assert_close(quantised.transformer[name], plain.transformer[name])
    norms = [p.transformer["double_blocks"]["image_attention"] for p in (quantised, plain)]
    assert_close(norms[0]["query_norm"], norms[1]["query_norm"])
    assert_close(norms[0]["qkv"]["bias"], norms[1]["qkv"]["bias"])


@pytest.mark.slow
def test_quantised_at_conversion(tmp_path, lora):
    source = write(tmp_path, "flux", original_transformer(STATE))
    out = tmp_path / "canny"
    options = ["--quantise", "int8", "--dtype", "float32", "--out", str(out)]
    assert main([str(source), "--lora", str(lora), *options]) == 0
    got = jitjax.load(out)
    expected = quantise_params(merge_loras(params_of(), [(lora, 1.0)]), "int8")
    assert got.config.transformer == WIDE
    assert_close(got.transformer["image_in"], expected.transformer["image_in"])
    leaves = [p.transformer["single_blocks"]["out"]["kernel"] for p in (got, expected)]
    np.testing.assert_allclose(leaves[0].scales, leaves[1].scales, rtol=1e-5)


def narrow_lora() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    return {
        "transformer.x_embedder.lora_A.weight": rng.standard_normal((2, LATENTS), np.float32),
        "transformer.x_embedder.lora_B.weight": rng.standard_normal((H, 2), np.float32),
    }


@pytest.mark.parametrize("kind", ["LoRA", "difference"])
@pytest.mark.parametrize("width", [2 * LATENTS, 2 * LATENTS + 256])
def test_an_update_of_latents_alone_leaves_the_other_channels(tmp_path, width, kind):
    config = dataclasses.replace(TRANSFORMER, in_channels=width)
    params, state = params_of(config), narrow_lora()
    a, b = state.values()
    if kind == "difference":
        state = {"transformer.x_embedder.diff": b @ a}
    merged = merge_loras(params, [(save(tmp_path / "ink.safetensors", state), 0.5)])
    assert merged.config == params.config
    got = merged.transformer["image_in"]["kernel"]
    before = params.transformer["image_in"]["kernel"]
    np.testing.assert_array_equal(got[LATENTS:], before[LATENTS:])
    np.testing.assert_allclose(got[:LATENTS], before[:LATENTS] + 0.5 * (b @ a).T, rtol=1e-5)


def test_beside_another_lora_in_any_order(tmp_path, lora):
    ink = save(tmp_path / "ink.safetensors", narrow_lora())
    merged = [
        merge_loras(params_of(), loras)
        for loras in ([(lora, 1.0), (ink, 0.5)], [(ink, 0.5), (lora, 1.0)])
    ]
    alone = merge_loras(params_of(), [(lora, 1.0)])
    assert_close(merged[0].transformer, merged[1].transformer)
    assert merged[0].config == merged[1].config == alone.config
    difference = np.asarray(merged[0].transformer["image_in"]["kernel"]) - np.asarray(
        alone.transformer["image_in"]["kernel"]
    )
    a, b = narrow_lora().values()
    np.testing.assert_allclose(difference[:LATENTS], 0.5 * (b @ a).T, atol=1e-5)
    assert not difference[LATENTS:].any()


def test_of_a_model_of_the_same_width(tmp_path):
    """A LoRA trained on FLUX.1 Canny itself has its width, and no norms."""
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 2 * LATENTS), np.float32), np.ones((H, 2), np.float32)
    state = {"img_in.lora_A.weight": a, "img_in.lora_B.weight": b}
    params = params_of(WIDE)
    merged = merge_loras(params, [(save(tmp_path / "ink.safetensors", state), 1.0)])
    expected = params.transformer["image_in"]["kernel"] + (b @ a).T
    np.testing.assert_allclose(merged.transformer["image_in"]["kernel"], expected, rtol=1e-5)


def norms_only(lora: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in lora.items() if "img_in" in name or "norm" in name}


REFUSED = {
    "on Canny": (2 * LATENTS, {}, "so it is a control LoRA for FLUX.1-dev; the model has 32"),
    "on Fill": (
        2 * LATENTS + 256,
        {},
        "is for a model of 32 input channels (img_in.lora_A.weight); expected 288, those of the "
        "model, or 16",
    ),
    "Fill's on Canny": (
        2 * LATENTS,
        {"img_in.lora_A.weight": np.ones((RANK, 2 * LATENTS + 256), np.float32)},
        "is for a model of 288 input channels (img_in.lora_A.weight); expected 32",
    ),
    "another width": (
        LATENTS,
        {"img_in.lora_A.weight": np.ones((RANK, 3 * LATENTS + 1), np.float32)},
        "img_in has A [3, 49] and B [64, 3]; expected [rank, 16] and [64, rank]",
    ),
    "other rows": (
        LATENTS,
        {"img_in.lora_B.weight": np.ones((H - 1, RANK), np.float32)},
        "img_in has A [3, 32] and B [63, 3]; expected [rank, 32] and [64, rank]",
    ),
    "a bias of another length": (
        LATENTS,
        {"img_in.lora_B.bias": np.ones(H + 1, np.float32)},
        "img_in.lora_B.bias has shape [65]; expected [64]",
    ),
    "a norm of another length": (
        LATENTS,
        {"single_blocks.2.norm.key_norm.scale": np.ones(31, np.float32)},
        "single_blocks.2.norm.key_norm.scale has shape [31]; expected [32]",
    ),
    "a norm of another model": (
        LATENTS,
        {"single_blocks.9.norm.key_norm.scale": np.ones(32, np.float32)},
        "unknown key: single_blocks.9.norm.key_norm.scale",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    width, changes, message = REFUSED[name]
    file = save(tmp_path / "canny.safetensors", norms_only(control_lora()) | changes)
    params = params_of(dataclasses.replace(TRANSFORMER, in_channels=width))
    with pytest.raises(ConversionError) as caught:
        merge_loras(params, [(file, 1.0)])
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_are_refused_before_anything_is_written(tmp_path, lora, capsys):
    other = save(tmp_path / "depth.safetensors", control_lora(seed=5))
    source = write(tmp_path, "flux", original_transformer(STATE))
    out = tmp_path / "out"
    assert main([str(source), "--lora", str(lora), str(other), "--out", str(out)]) == 2
    assert f"{other} and {lora} are both control LoRAs; expected one" in capsys.readouterr().err
    assert not out.exists()


def test_dora_of_latents_alone_is_refused(tmp_path):
    """Its magnitudes are of the norms of the narrow weight."""
    state = narrow_lora() | {"transformer.x_embedder.lora_magnitude_vector": np.ones(H, np.float32)}
    file = save(tmp_path / "ink.safetensors", state)
    with pytest.raises(ConversionError, match=r"x_embedder is DoRA for 16 of 32 channels"):
        merge_loras(params_of(WIDE), [(file, 1.0)])


def test_without_a_transformer_nothing_is_widened(lora):
    clip = component_of("clip")
    params = params_of()
    tree = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), clip.abstract_params(params.config.clip)
    )
    params = dataclasses.replace(params, transformer={}, clip=tree)
    with pytest.warns(UserWarning, match="passed over what is not loaded"):
        merged = merge_loras(params, [(lora, 1.0)])
    assert merged.config == params.config
