"""Quantising at conversion, and LoRA beside quantised weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layouts import CONFIGS, TRANSFORMER, random_states, write
from test_lora import assert_close, merged, original, peft, random_update

import jitjax
from jitjax.checkpoint import FluxParams, quantise_params, read_metadata
from jitjax.config import FluxConfig
from jitjax.convert.__main__ import main
from jitjax.convert.components import from_state
from jitjax.convert.lora import merge_loras
from jitjax.convert.sources.diffusers_folder import read_folder
from jitjax.convert.tables.engine import ConversionError
from jitjax.loading import BUNDLED
from jitjax.models.quantised import KINDS, dequantise, is_quantised

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TINY = str(BUNDLED / "tiny")


@pytest.fixture(scope="module")
def states():
    return random_states()


@pytest.fixture(scope="module")
def plain(states) -> FluxParams:
    tree = from_state("transformer", states["transformer"], TRANSFORMER)
    return FluxParams(tree, {}, {}, {}, FluxConfig(**CONFIGS), "")


@pytest.mark.parametrize("kind", ["int8", slow("int4"), slow("float8")])
def test_quantising_at_conversion_is_quantising_at_load(tmp_path, kind):
    arguments = [TINY, "--parts", "transformer", "clip", "--dtype", "float32"]
    assert main([*arguments, "--quantise", kind, "--out", str(tmp_path / kind)]) == 0
    assert read_metadata(tmp_path / kind)["quantisation"] == {"transformer": kind}
    assert main(["--verify", str(tmp_path / kind)]) == 0
    got = jitjax.load(tmp_path / kind)
    expected = quantise_params(read_folder(TINY, np.float32, parts=("transformer", "clip")), kind)
    for part in ("transformer", "clip"):
        trees = getattr(got, part), getattr(expected, part)
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.slow
def test_a_quantised_checkpoint_has_no_diffusers_folder(tmp_path, capsys):
    checkpoint, folder = str(tmp_path / "int8"), tmp_path / "back"
    assert main([TINY, "--quantise", "int8", "--out", checkpoint]) == 0
    assert main([checkpoint, "--to-diffusers", "--out", str(folder)]) == 2
    assert "is quantised: transformer (int8), t5 (int8)" in capsys.readouterr().err
    assert not folder.exists()
    with pytest.raises(SystemExit):
        main([TINY, "--quantise", "int3", "--out", str(folder)])
    assert "--quantise: invalid choice: 'int3'" in capsys.readouterr().err


@jax.jit
def weights(tree):
    """Return a tree with quantised kernels as plain ones, their low-rank updates added."""

    def weight(leaf):
        if not is_quantised(leaf):
            return leaf
        kernel = jax.vmap(lambda block: dequantise(block, "float32"))(leaf)
        if leaf.down is not None:
            kernel += jnp.einsum("nir,nr...->ni...", leaf.down, leaf.up)
        return kernel

    return jax.tree.map(weight, tree, is_leaf=is_quantised)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_added_exactly(tmp_path, states, plain, kind):
    """What a LoRA changes is the same as without quantisation, however coarse the values are."""
    update, other = random_update(4), random_update(2)
    files = [write(tmp_path, "first", peft(update)), write(tmp_path, "second", original(other))]
    loras = [(files[0], 0.5), (files[1], -1.0)]
    params = quantise_params(plain, kind)
    jitjax.save(params, tmp_path / kind)
    loaded = jitjax.load(tmp_path / kind, loras=loras)
    exact = merged(states, (update, 0.5), (other, -1.0))
    change = jax.tree.map(np.subtract, weights(loaded.transformer), weights(params.transformer))
    assert_close(change, jax.tree.map(np.subtract, exact, plain.transformer))
    kernel = loaded.transformer["double_blocks"]["image_attention"]["qkv"]["kernel"]
    assert kernel.down.shape == (TRANSFORMER.num_layers, TRANSFORMER.hidden, 3 * (4 + 2))
    # One after another: the second is added beside the first.
    twice = merge_loras(merge_loras(params, loras[:1]), loras[1:])
    assert_close(weights(twice.transformer), weights(loaded.transformer))
    again = twice.transformer["double_blocks"]["image_attention"]["qkv"]["kernel"].values
    original_values = params.transformer["double_blocks"]["image_attention"]["qkv"]["kernel"].values
    assert again is original_values  # shared: switching a LoRA copies no weights
    with pytest.raises(ValueError, match="a LoRA is kept beside quantised weights"):
        jitjax.save(loaded, tmp_path / "with")


@pytest.mark.slow
def test_quantising_and_lora_in_one_load(tmp_path, plain):
    lora = write(tmp_path, "lora", peft(random_update(4)))
    jitjax.save(plain, tmp_path / "plain")
    got = jitjax.load(tmp_path / "plain", quantise="int4", loras=[(lora, 1.0)])
    expected = merge_loras(quantise_params(plain, "int4"), [(lora, 1.0)])
    jax.tree.map(np.testing.assert_array_equal, got.transformer, expected.transformer)


def test_lora_is_merged_before_conversion_quantises(tmp_path):
    name = "transformer_blocks.0.attn.to_q"
    rng = np.random.default_rng(0)
    state = {f"transformer.{name}.lora_{k}.weight": rng.standard_normal(s).astype(np.float32)
             for k, s in (("A", (2, 192)), ("B", (192, 2)))}  # fmt: skip
    save_file(state, tmp_path / "lora.safetensors")
    loras = ["--lora", str(tmp_path / "lora.safetensors")]
    arguments = [TINY, "--parts", "transformer", "--dtype", "float32"]
    assert main([*arguments, *loras, "--quantise", "int8", "--out", str(tmp_path / "int8")]) == 0
    base = read_folder(TINY, np.float32, parts=("transformer",))
    expected = quantise_params(merge_loras(base, [(tmp_path / "lora.safetensors", 1.0)]), "int8")
    got = jitjax.load(tmp_path / "int8")
    jax.tree.map(np.testing.assert_array_equal, got.transformer, expected.transformer)


def test_other_updates_are_refused(tmp_path, plain):
    params = quantise_params(plain, "int8")
    width = TRANSFORMER.hidden
    state = {
        "diffusion_model.single_blocks.0.linear2.diff": np.ones((width, 5 * width), np.float32)
    }
    save_file(state, tmp_path / "diff.safetensors")
    with pytest.raises(ConversionError, match="no plain LoRA; merge it before"):
        merge_loras(params, [(tmp_path / "diff.safetensors", 1.0)])


@pytest.mark.slow
def test_values_that_are_not_finite_in_the_dtype(tmp_path, plain):
    update = {name: (a, 1e6 * b) for name, (a, b) in random_update(2).items()}
    file = write(tmp_path, "large", peft(update))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), plain.transformer)
    params = quantise_params(dataclasses.replace(plain, transformer=half), "int8")
    with pytest.raises(ConversionError, match="not finite in float16"):
        merge_loras(params, [(file, 1.0)])
