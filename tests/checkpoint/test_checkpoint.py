"""Saving and loading: round trips, errors, interrupted saves and shardings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

import jitjax
from jitjax.checkpoint import abstract_params


def test_round_trip_is_exact(small, saved):
    loaded = jitjax.load(saved)
    assert loaded.config == small.config
    assert jax.tree.structure(loaded.transformer) == jax.tree.structure(small.transformer)
    for got, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(got, expected)
    prompt = "a red circle"
    np.testing.assert_array_equal(
        jitjax.encode_prompt(loaded, prompt).text, jitjax.encode_prompt(small, prompt).text
    )


def test_arrays_of_zeros_are_written(small, tmp_path):
    """Zarr may omit a chunk of zeros. Here a missing chunk means damage, so each one is written."""
    clip = jax.tree.map(np.zeros_like, small.clip)
    zeros = jitjax.FluxParams({}, {}, clip, {}, small.config, small.tokenizer)
    jitjax.save(zeros, tmp_path / "zeros")
    jax.tree.map(np.testing.assert_array_equal, jitjax.load(tmp_path / "zeros").clip, zeros.clip)


@pytest.mark.slow
def test_load_converts_to_the_requested_dtype(saved_few):
    loaded = jitjax.load(saved_few, dtype=jnp.bfloat16, parts=("t5", "clip"))
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_save_replaces_a_checkpoint_only_with_overwrite(few, copy_of_few):
    changed = dataclasses.replace(few, config=dataclasses.replace(few.config, shift=2.0))
    with pytest.raises(FileExistsError, match="overwrite"):
        jitjax.save(changed, copy_of_few)
    jitjax.save(changed, copy_of_few, overwrite=True)
    assert jitjax.load(copy_of_few).config == changed.config
    assert [p.name for p in copy_of_few.parent.iterdir()] == [copy_of_few.name]


def test_save_never_replaces_other_files(small, tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="no jitjax checkpoint"):
            jitjax.save(small, target, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "text"


def test_bundled_checkpoint_matches_its_configuration():
    params = jitjax.load("tiny")
    shapes = abstract_params(params.config)
    for part in ("transformer", "t5", "clip", "autoencoder"):
        got = jax.tree.map(jnp.shape, getattr(params, part))
        assert got == jax.tree.map(lambda s: s.shape, getattr(shapes, part))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert params.config.image_size == 512


def test_load_rejects_paths_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*'tiny'"):
        jitjax.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint at 'tinny'"):
        jitjax.load("tinny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a jitjax checkpoint"):
        jitjax.load(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        jitjax.load(tmp_path / "file")
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="convert it once"):
        jitjax.load(tmp_path / "empty")


def _edit_metadata(folder: Path, edit) -> None:
    path = folder / "jitjax.json"
    metadata = json.loads(path.read_text())
    edit(metadata)
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda metadata: metadata.update(format=99), "has format 99"),
        (lambda metadata: metadata.pop("format"), "cannot be read"),
        (lambda metadata: metadata.pop("config"), "not a FLUX configuration"),
        (lambda metadata: metadata["config"].update(mystery=1), "not a FLUX configuration"),
        (
            lambda metadata: metadata["config"]["transformer"].update(num_layers=3),
            "double_blocks.*expected",
        ),
        (
            lambda metadata: metadata["config"]["transformer"].update(guidance_embeds=False),
            "is unknown",
        ),
    ],
)
def test_load_rejects_invalid_metadata(copy_of_few, edit, message):
    _edit_metadata(copy_of_few, edit)
    with pytest.raises(ValueError, match=message):
        jitjax.load(copy_of_few)


@pytest.mark.parametrize("name", ["params", "tokenizer", "tokenizer_2", "jitjax.json"])
def test_load_rejects_an_incomplete_checkpoint(copy_of_few, name):
    path = copy_of_few / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=r"has no .*incomplete"):
        jitjax.load(copy_of_few)


def test_load_rejects_a_truncated_file(copy_of_few):
    files = [path for path in (copy_of_few / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged|cannot be read"):
        jitjax.load(copy_of_few)


@pytest.mark.parametrize(
    "delay",
    [pytest.param(0.0, marks=pytest.mark.slow), 0.05, pytest.param(0.2, marks=pytest.mark.slow)],
)
def test_killed_save_leaves_the_old_or_the_new_checkpoint(few, copy_of_few, delay):
    code = (
        "import sys, jitjax\n"
        "params = jitjax.load(sys.argv[1])\n"
        "print('go', flush=True)\n"
        "jitjax.save(params, sys.argv[1], overwrite=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(copy_of_few)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if copy_of_few.exists():  # it does not exist between the two renames
        assert jitjax.load(copy_of_few).config == few.config


def test_failed_save_leaves_no_files(small, tmp_path):
    params = build.small_params(tmp_path / "tokenizers")
    shutil.rmtree(tmp_path / "tokenizers")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        jitjax.save(params, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_load_places_arrays_on_the_requested_sharding(saved):
    code = (
        "import sys, jax, numpy as np, jitjax\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec as P\n"
        "mesh = Mesh(np.array(jax.devices()), ('x',))\n"
        "def sharding_for(path, shape):\n"
        "    assert path.split('/')[0] == 'transformer', path\n"
        "    divisible = len(shape) > 1 and shape[-1] % 4 == 0\n"
        "    spec = P(*[None] * (len(shape) - 1), 'x') if divisible else P()\n"
        "    return NamedSharding(mesh, spec)\n"
        "single = jitjax.load(sys.argv[1])\n"
        "sharded = jitjax.load(sys.argv[1], parts=('transformer',), sharding=sharding_for)\n"
        "replicated = jitjax.load('tiny', sharding=NamedSharding(mesh, P()))\n"
        "count = 0\n"
        "pairs = zip(*map(jax.tree.leaves, (sharded.transformer, single.transformer)))\n"
        "for leaf, expected in pairs:\n"
        "    np.testing.assert_array_equal(leaf, expected)\n"
        "    assert len(leaf.sharding.device_set) == 4\n"
        "    count += leaf.addressable_shards[0].data.size * 4 == leaf.size\n"
        "assert count > 10, count\n"
        "assert not sharded.t5 and single.t5\n"
        "assert len(jax.tree.leaves(replicated)[0].sharding.device_set) == 4\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True, env=os.environ | flags)
