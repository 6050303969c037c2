"""Saving and loading: round trips, what is refused, and what a killed run leaves."""

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


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    jitjax.save(small, path)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


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


def test_zeros_are_numbers_too(small, tmp_path):
    """A chunk of zeros is written: one that is not there is damage."""
    zeros = dataclasses.replace(small, clip=jax.tree.map(jnp.zeros_like, small.clip))
    jitjax.save(zeros, tmp_path / "zeros")
    jax.tree.map(np.testing.assert_array_equal, jitjax.load(tmp_path / "zeros").clip, zeros.clip)


def test_the_dtype_may_be_chosen(saved):
    loaded = jitjax.load(saved, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_overwriting_must_be_asked_for(small, copy):
    with pytest.raises(FileExistsError, match="overwrite"):
        jitjax.save(small, copy)
    jitjax.save(small, copy, overwrite=True)
    assert jitjax.load(copy).config == small.config
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_something_else_is_never_overwritten(small, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for target in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(FileExistsError, match="no jitjax checkpoint"):
            jitjax.save(small, target, overwrite=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_the_bundled_checkpoint_fits_its_configuration():
    params = jitjax.load("tiny")
    shapes = abstract_params(params.config)
    for part in ("transformer", "t5", "clip", "autoencoder"):
        got = jax.tree.map(jnp.shape, getattr(params, part))
        assert got == jax.tree.map(lambda s: s.shape, getattr(shapes, part))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert params.config.image_size == 512


def test_missing_and_foreign_paths_are_refused(tmp_path):
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


def _edit(folder: Path, change) -> None:
    path = folder / "jitjax.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=99), "has format 99"),
        (lambda raw: raw.pop("format"), "cannot be read"),
        (lambda raw: raw.pop("config"), "not a FLUX configuration"),
        (lambda raw: raw["config"].update(mystery=1), "not a FLUX configuration"),
        (lambda raw: raw["config"]["transformer"].update(num_layers=3), "double_blocks.*expected"),
        (lambda raw: raw["config"]["transformer"].update(guidance_embeds=False), "is unknown"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(copy, change, message):
    _edit(copy, change)
    with pytest.raises(ValueError, match=message):
        jitjax.load(copy)


@pytest.mark.parametrize("part", ["params", "tokenizer", "tokenizer_2", "jitjax.json"])
def test_a_checkpoint_with_a_part_missing_is_refused(copy, part):
    target = copy / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ValueError, match=r"not a whole|lacks"):
        jitjax.load(copy)


def test_truncated_files_are_refused(copy):
    files = sorted(
        (p for p in (copy / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    biggest = files[-1]
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged|cannot be read"):
        jitjax.load(copy)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(small, copy, delay):
    code = (
        "import sys, jitjax\n"
        "params = jitjax.load(sys.argv[1])\n"
        "print('go', flush=True)\n"
        "jitjax.save(params, sys.argv[1], overwrite=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(copy)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if copy.exists():  # between the two renames there is none
        assert jitjax.load(copy).config == small.config


def test_a_failed_save_leaves_nothing(small, tmp_path):
    broken = build.small_params(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        jitjax.save(broken, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_restored_on_to_the_sharding_asked_for(saved):
    code = (
        "import sys, jax, numpy as np, jitjax\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec as P\n"
        "mesh = Mesh(np.array(jax.devices()), ('x',))\n"
        "def place(path, shape):\n"
        "    assert path.split('/')[0] == 'transformer', path\n"
        "    split = len(shape) > 1 and shape[-1] % 4 == 0\n"
        "    return NamedSharding(mesh, P(*[None] * (len(shape) - 1), 'x') if split else P())\n"
        "plain = jitjax.load(sys.argv[1])\n"
        "split = jitjax.load(sys.argv[1], parts=('transformer',), sharding=place)\n"
        "everywhere = jitjax.load('tiny', sharding=NamedSharding(mesh, P()))\n"
        "halves = 0\n"
        "for one, two in zip(*map(jax.tree.leaves, (plain.transformer, split.transformer))):\n"
        "    np.testing.assert_array_equal(one, two)\n"
        "    assert len(two.sharding.device_set) == 4\n"
        "    halves += two.addressable_shards[0].data.size * 4 == two.size\n"
        "assert halves > 10, halves\n"
        "assert not split.t5 and plain.t5\n"
        "assert len(jax.tree.leaves(everywhere)[0].sharding.device_set) == 4\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True, env=os.environ | flags)
