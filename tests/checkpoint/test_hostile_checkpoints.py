"""Edited checkpoints: each fault is a `ValueError` that names it, before memory is allocated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from jitjax.checkpoint import verify
from jitjax.convert.__main__ import main


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def saved_part(small, tmp_path_factory) -> Path:
    """A checkpoint of the transformer alone, which takes less time to read than a whole one."""
    path = tmp_path_factory.mktemp("saved") / "one_part"
    jitjax.save(jitjax.FluxParams(small.transformer, {}, {}, {}, small.config, ""), path)
    return path


@pytest.fixture
def one_part(saved_part, tmp_path) -> Path:
    """A copy of `saved_part`, which a test may edit."""
    return Path(shutil.copytree(saved_part, tmp_path / "one_part"))


def kernel_metadata(folder: Path) -> Path:
    return folder / "params/transformer/state/image_in.kernel/zarr.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"]["transformer"].update(axes_dims_rope=[2, 2, 4]), "configuration di"),
        (lambda m: m["config"].update(shift=2.0), "configuration differs from what was written"),
        (lambda m: m["config"]["autoencoder"].update(scaling_factor=1.0), "configuration differs"),
        (lambda m: m["config"].update(text_length=11), "configuration differs"),
        (lambda m: m.update(config_digest=3), "config_digest is 3; expected a string"),
        (lambda m: m["config"].update(shift="3"), "config.shift is '3'; expected a number"),
        (lambda m: m["config"].update(t5=None), "config.t5 is None; expected a T5Config"),
        (lambda m: m["config"].update(dynamic_shift="false"), "expected true or false"),
        (
            lambda m: m["config"]["t5"].update(num_layers=10**9),
            "expected an integer from 1 to 1024",
        ),
        (lambda m: m["config"]["t5"].pop("d_kv"), "config.t5 has no 'd_kv'"),
        (lambda m: m.pop("digests"), "digests is None; expected an object"),
        (lambda m: m["digests"].pop("clip"), "digests has no clip"),
        (lambda m: m["digests"].update(t5=[1]), "digests"),
        (lambda m: m["digests"]["t5"].update(a=1), r"digests\['t5'\]\['a'\] is 1; expected a str"),
        (lambda m: m.update(parts=None), "parts is None; expected a list"),
        (lambda m: m.update(parts=["t5", "t5"]), "parts is .*expected some of"),
        (lambda m: m.update(parts=["../t5"]), "parts is .*expected some of"),
        (lambda m: m.update(parts=[]), "parts is .*expected some of"),
        (lambda m: m.update(sources=[]), "sources is .*expected an object"),
        (lambda m: m.update(format="3"), "has format '3'; expected format 3 or 4"),
        (lambda m: m.update(format=[[[]]]), "expected format 3 or 4"),
    ],
)
def test_edited_metadata(copy_of_few, change, message):
    edit(copy_of_few / "jitjax.json", change)
    for read in (jitjax.load, verify):
        with pytest.raises(ValueError, match=message) as caught:
            read(copy_of_few)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 3, "format": 4}', "gives the key 'format' two values"),
        (b"\xff\xfe{", "cannot be read"),
        ("", "not complete JSON"),
        ("3", "contains a int; expected a JSON object"),
        ("{" + f'"format": {"9" * 5000}' + "}", "cannot be read"),
    ],
)
def test_damaged_metadata(copy_of_few, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (copy_of_few / "jitjax.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        jitjax.load(copy_of_few)
    assert "\n" not in str(caught.value)


def test_metadata_without_a_digest_of_the_configuration(one_part, small):
    edit(one_part / "jitjax.json", lambda m: m.pop("config_digest"))
    assert jitjax.load(one_part).config == small.config
    verify(one_part)


def test_changed_configuration_loads_unchecked(one_part):
    edit(one_part / "jitjax.json", lambda m: m["config"].update(shift=2.0))
    assert jitjax.load(one_part, check=False).config.shift == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 2**40]), "chunk_sh"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[0, 0]), "chunk_shape is"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1]), "chunk_shape is"),
        (lambda m: m["chunk_grid"].update(configuration=None), "chunk_grid.configuration is None"),
        (lambda m: m.update(chunk_grid=3), "chunk_grid is 3; expected an object"),
        (lambda m: m.update(shape=[2**50, 16]), "image_in.kernel"),
        (lambda m: m.update(shape="64"), "shape is '64'; expected a list"),
        (lambda m: m.update(data_type="complex9"), "data_type is 'complex9'"),
        (lambda m: m.update(data_type="float16"), "image_in"),
        (lambda m: m["codecs"][0]["configuration"].update(endian="big"), "image_in/kernel"),
    ],
)
def test_edited_array_metadata(one_part, change, message):
    """TensorStore would end the process for a chunk that does not fit into memory."""
    edit(kernel_metadata(one_part), change)
    with pytest.raises(ValueError, match=message):
        jitjax.load(one_part)
    with pytest.raises(ValueError, match=message):
        verify(one_part)


def test_all_sizes_edited_alike(copy_of_few):
    """Nothing is allocated for an array whose files are too small."""
    width = 2**20
    edit(
        copy_of_few / "jitjax.json",
        lambda m: (m["config"]["clip"].update(vocab_size=width), m.pop("config_digest")),
    )
    state = copy_of_few / "params/clip/state"
    edit(state / "token_embedding.embedding/zarr.json", lambda m: m.update(shape=[width, 8]))

    def edit_sizes(metadata):
        for entry in metadata["tree_metadata"].values():
            if [key["key"] for key in entry["key_metadata"]] == ["token_embedding", "embedding"]:
                entry["value_metadata"]["write_shape"] = [width, 8]

    edit(state / "_METADATA", edit_sizes)
    with pytest.raises(ValueError, match="token_embedding"):
        jitjax.load(copy_of_few)


@pytest.mark.parametrize(
    "files",
    [None, 3, "x", {}, [3], [None], [{}], [{"path": 3, "bytes": 1, "sha256": "a"}],
     [{"path": "a", "bytes": "1", "sha256": "a"}], [{"path": "a", "bytes": 1}]],
)  # fmt: skip
def test_edited_sources(one_part, capsys, files):
    edit(one_part / "jitjax.json", lambda m: m["sources"].update(files=files))
    assert main(["--verify", str(one_part)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "sources.files" in error


def test_float64_checkpoint(tmp_path, small):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), small.clip)
    params = jitjax.FluxParams({}, {}, wide, {}, small.config, small.tokenizer)
    jitjax.save(params, tmp_path / "wide")
    for read in (jitjax.load, verify):
        with pytest.raises(ValueError, match="is float64; expected JAX_ENABLE_X64=1"):
            read(tmp_path / "wide")


def test_overflow_of_the_requested_dtype(tmp_path, small):
    large = jax.tree.map(lambda x: np.full_like(x, 1e6), small.clip)
    jitjax.save(jitjax.FluxParams({}, {}, large, {}, small.config, small.tokenizer), tmp_path / "c")
    with pytest.raises(ValueError, match=r"clip/.* does not fit into float16"):
        jitjax.load(tmp_path / "c", dtype=jnp.float16)
    assert jitjax.load(tmp_path / "c", dtype=jnp.bfloat16).clip
