"""Quantised checkpoints: round trips, quantising while loading, older formats, damage, errors."""

from __future__ import annotations

import functools
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from jitjax.checkpoint import FORMAT, quantise_params, quantising, read_metadata, verify
from jitjax.checkpoint.array_layout import Digest
from jitjax.checkpoint.array_reader import StoredLeaf
from jitjax.checkpoint.saving import digest_of_config
from jitjax.models import quantised
from jitjax.models.quantised import as_dicts, is_quantisable
from jitjax.nested import flatten

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
KERNEL = "single_blocks/out/kernel"


def assert_equal(got: jitjax.FluxParams, expected: jitjax.FluxParams) -> None:
    for part in ("transformer", "t5", "clip", "autoencoder"):
        trees = (getattr(got, part), getattr(expected, part))
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def int8(few, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "int8"
    jitjax.save(quantise_params(few, "int8"), path)
    return path


@pytest.mark.parametrize("kind", ["int4", slow("int8"), slow("float8")])
def test_quantised_parameters_are_saved_and_loaded_as_they_are(kind, few, saved_few, tmp_path):
    params = quantise_params(few, kind)
    assert_equal(jitjax.load(saved_few, quantise=kind), params)
    jitjax.save(params, tmp_path / kind)
    metadata = read_metadata(tmp_path / kind)
    assert metadata["quantisation"] == {"transformer": kind, "t5": kind}
    verify(tmp_path / kind)
    assert_equal(jitjax.load(tmp_path / kind), params)
    assert_equal(jitjax.load(tmp_path / kind, quantise=kind), params)
    assert_equal(jitjax.load(tmp_path / kind, parts=("t5",)), jitjax.load(
        saved_few, quantise=kind, parts=("t5",)))  # fmt: skip


@pytest.mark.slow
def test_the_bundled_checkpoint_is_quantised(small):
    params = jitjax.load("tiny", quantise="int4", parts=("transformer",))
    assert quantised.kind_of(params.transformer) == "int4"
    assert quantised.float_dtype(params.transformer) == jnp.float32


def test_loading_reads_and_quantises_one_block_at_a_time(small, saved_few, monkeypatch):
    """No stack of what is quantised is read as a whole, neither by orbax nor here."""
    seen: list[tuple[int, ...]] = []
    quantise_stack, read_arrays = quantising.quantise_stack, jitjax.checkpoint.restoring.read_arrays
    whole: set[str] = set()

    def recorded(kernel, kind):
        if isinstance(kernel, np.ndarray):  # else the shapes alone
            seen.append(kernel.shape)
        return quantise_stack(kernel, kind)

    def reading(path, *arguments):
        for name, array, problem in read_arrays(path, *arguments):
            whole.add(f"{path.name}/{name}")
            yield name, array, problem

    monkeypatch.setattr(quantising, "quantise_stack", recorded)
    monkeypatch.setattr(jitjax.checkpoint.restoring, "read_arrays", reading)
    jitjax.load(saved_few, quantise="int8")
    blocks = {
        f"{part}/{path}": len(leaf)
        for part in ("transformer", "t5")
        for path, leaf in flatten(getattr(small, part)).items()
        if is_quantisable(part, path)
    }
    assert len(seen) == sum(blocks.values())
    assert {shape[0] for shape in seen} == {1}
    assert "transformer/image_in/kernel" in whole
    assert not whole & blocks.keys()


def test_host_memory_while_quantising_is_that_of_the_result(tmp_path, small):
    """A stack of 32 blocks is 8 MiB in float32; the host allocates 2 MiB, and a few blocks."""
    stack = np.random.default_rng(0).standard_normal((32, 128, 512), np.float32)
    writer = jitjax.checkpoint.saving.Writer(tmp_path / "part")
    writer.write("kernel", stack, 0, stack.shape)
    digest = writer.finish()["kernel"]
    expected = quantised.quantise_stack(stack, "int8")
    del stack
    leaf = StoredLeaf(tmp_path / "part", "kernel")
    quantising.quantise_stored(leaf, "int8", digest)  # compiles
    tracemalloc.start()
    got, problem = quantising.quantise_stored(leaf, "int8", digest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not problem
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert got.values.nbytes == 2 * 2**20
    assert 2 * 2**20 < peak < 3.5 * 2**20


@pytest.mark.slow
def test_dtype_is_that_of_all_else(saved_few, int8):
    for path in (saved_few, int8):
        params = jitjax.load(path, quantise="int8", dtype="bfloat16", parts=("t5",))
        leaves = jax.tree.leaves(params, is_leaf=quantised.is_quantised)
        plain = [leaf for leaf in leaves if not quantised.is_quantised(leaf)]
        assert {leaf.dtype for leaf in plain} == {jnp.dtype("bfloat16")}
        kernels = [leaf for leaf in leaves if quantised.is_quantised(leaf)]
        assert {(k.values.dtype.name, k.scales.dtype.name) for k in kernels} == {
            ("int8", "float32")
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "float32"},
            "transformer is quantised to int8, which dtype does not change; expected no dtype; or, "
            "with quantise='int8', the dtype of all else",
        ),
        (
            {"quantise": "int4"},
            "transformer is quantised to int8; expected no quantise, or 'int8'; to get 'int4'",
        ),
        ({"quantise": "int5"}, "quantise is 'int5'; expected one of int8, int4, float8"),
        ({"quantise": 8}, "quantise is 8; expected one of"),
    ],
)
def test_errors(int8, arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        jitjax.load(int8, **arguments)


@pytest.mark.slow
def test_dtype_goes_with_the_parts_that_are_not_quantised(int8):
    params = jitjax.load(int8, dtype="bfloat16", parts=("clip",))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("version", [3, 4])
def test_older_formats_are_read(copy_of_few, few, version):
    file = copy_of_few / "jitjax.json"
    metadata = json.loads(file.read_text())
    assert metadata["format"] == FORMAT == 5
    metadata["format"] = version
    if version == 3:
        assert metadata.pop("quantisation") == {}
    assert metadata["config"].pop("uses_reference") is False
    assert metadata["config"]["transformer"].pop("out_channels") == 64
    metadata["config_digest"] = digest_of_config(metadata["config"])
    file.write_text(json.dumps(metadata))
    assert_equal(jitjax.load(copy_of_few), few)
    assert read_metadata(copy_of_few)["quantisation"] == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"transformer": "int5"}, "quantisation has 'transformer': 'int5'"),
        ({"clip": "int8"}, "quantisation has 'clip': 'int8'; expected transformer or t5"),
        ({"transformer": "int8"}, "double_blocks/text_modulation/kernel/values is missing"),
        ("int8", "quantisation"),
    ],
)
def test_wrong_metadata(copy_of_few, value, message):
    file = copy_of_few / "jitjax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantisation": value}))
    for read in (jitjax.load, verify):
        with pytest.raises(ValueError, match=message):
            read(copy_of_few)


def damage(checkpoint: Path, name: str) -> None:
    """Flip a bit of an array; the second time, flip it back."""
    folder = checkpoint / "params/transformer/state" / name.replace("/", ".")
    file = next(f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "zarr.json")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_damage_is_found(copy_of_few, int8, tmp_path):
    path = Path(shutil.copytree(int8, tmp_path / "int8"))
    for key in ("values", "scales"):
        damage(path, f"{KERNEL}/{key}")
        for read in (verify, jitjax.load):
            with pytest.raises(ValueError, match=f"out/kernel/{key} differs from what was written"):
                read(path)
        damage(path, f"{KERNEL}/{key}")
    verify(path)
    damage(copy_of_few, KERNEL)
    with pytest.raises(ValueError, match="out/kernel differs from what was written"):
        jitjax.load(copy_of_few, quantise="int8")
    jitjax.load(copy_of_few, quantise="int8", check=False, parts=("transformer",))
    folder = copy_of_few / "params/transformer/state" / KERNEL.replace("/", ".")
    (file,) = folder.glob("c/0/0/0")
    file.unlink()
    with pytest.raises(ValueError, match=r"out/kernel cannot be read: .*is missing"):
        jitjax.load(copy_of_few, quantise="int8")


def test_sharding_is_asked_for_values_and_scales(saved_few, int8):
    for path, arguments in ((saved_few, {"quantise": "int8"}), (int8, {})):
        asked: dict[str, tuple[int, ...]] = {}

        def sharding(name: str, shape: tuple[int, ...], asked=asked) -> jax.sharding.Sharding:
            asked[name] = shape
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        params = jitjax.load(path, sharding=sharding, parts=("transformer",), **arguments)
        leaves = flatten(as_dicts(params.transformer))
        expected = {f"transformer/{name}": leaf.shape for name, leaf in leaves.items()}
        assert expected.items() <= asked.items()


def test_a_mixture_of_kinds_is_not_saved(small, tmp_path):
    tree = quantise_params(small, "int8").transformer
    tree["single_blocks"] = quantise_params(small, "int4").transformer["single_blocks"]
    mixed = jitjax.FluxParams(tree, {}, {}, {}, small.config, "")
    with pytest.raises(ValueError, match="quantised to int4 and int8; expected one kind"):
        jitjax.save(mixed, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_digest_is_of_the_stored_bytes(int8, small):
    values = quantise_params(small, "int8").transformer["single_blocks"]["out"]["kernel"].values
    digest = Digest(values.shape, np.dtype("int8"))
    digest.update(np.asarray(values))
    stored = read_metadata(int8)["digests"]["transformer"]
    assert stored[f"{KERNEL}/values"] == digest.hexdigest()
