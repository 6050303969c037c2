"""What `load` takes, where it puts arrays, and how parameters are shown and compared."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jitjax
from jitjax.checkpoint import abstract_params
from jitjax.loading import BUNDLED


def test_only_a_bare_name_is_a_bundled_checkpoint(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jitjax.save(dataclasses.replace(small, transformer={}, t5={}, autoencoder={}), "tiny")
    assert jitjax.load("tiny").config.image_size == 512
    for path in ("./tiny", Path("tiny"), str(tmp_path / "tiny"), "tiny/"):
        assert jitjax.load(path, parts=("clip",)).config == small.config


def test_diffusers_folders_are_refused_alike(tmp_path):
    shutil.copytree(BUNDLED / "tiny", tmp_path / "other")
    for path in (tmp_path / "other", str(tmp_path / "other"), str(BUNDLED / "tiny")):
        with pytest.raises(ValueError, match=r"is a diffusers folder.*convert it once"):
            jitjax.load(path)


@pytest.mark.parametrize(
    "dtype",
    [jnp.int8, bool, np.complex64, "fp8", "int32", jnp.float8_e4m3fn, np.float64, "x" * 999, 3],
)
def test_dtypes_that_parameters_cannot_have(unchecked, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; expected bfloat16, float16, float32"):
        jitjax.load("tiny", dtype=dtype)


@pytest.mark.parametrize("parts", ["t5", (), ["T5"], [3], None, 3, [["t5"]]])
def test_wrong_parts(unchecked, parts):
    with pytest.raises(ValueError, match=r"parts is .*; expected some of"):
        jitjax.load("tiny", parts=parts)


def test_parts_are_any_iterable(unchecked):
    params = jitjax.load("tiny", parts=(part for part in ("clip",)))
    assert params.clip
    assert not params.t5


def test_wrong_types(unchecked, tmp_path):
    for sharding in (3, "cpu", jax.devices()[0], lambda path, shape: None):
        with pytest.raises(TypeError, match=r"expected a jax\.sharding\.Sharding"):
            jitjax.load("tiny", parts=("clip",), sharding=sharding)
    for loras in ("x", ["x"], ("x", 0.7), {"x": 0.7}, 3, [("x",)], [("x", "1")], [(3, 1.0)]):
        with pytest.raises(ValueError, match=r"expected a (list of \(file, scale\) pairs|finite)"):
            jitjax.load("tiny", loras=loras)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        jitjax.load("tiny", loras=[(tmp_path / "nowhere", 1)])
    with pytest.raises(ValueError, match="path is empty; expected a checkpoint folder"):
        jitjax.load("")
    with pytest.raises(TypeError, match="path is 3"):
        jitjax.load(3)  # pyright: ignore[reportArgumentType]


def test_default_device(small, tmp_path):
    encoder = dataclasses.replace(small, transformer={}, t5={}, autoencoder={})
    jitjax.save(encoder, tmp_path / "saved")
    code = (
        "import sys, jax, jitjax\n"
        "for path in ('tiny', sys.argv[1]):\n"
        "    for device in (jax.devices()[3], 'cpu', None):\n"
        "        with jax.default_device(device):\n"
        "            params = jitjax.load(path, parts=('clip',))\n"
        "        expected = device if isinstance(device, jax.Device) else jax.devices()[0]\n"
        "        assert {x.device for x in jax.tree.leaves(params)} == {expected}, device\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", code, str(tmp_path / "saved")]
    subprocess.run(command, check=True, env=os.environ | flags)


def test_repr_is_a_short_summary(small, unchecked):
    text = repr(small)
    assert text.startswith("FluxParams(transformer=")
    assert "\n" not in text
    assert len(text) < 400
    assert "float32" in text
    assert "2 + 2 blocks of width 16" in text
    count = sum(leaf.size for leaf in jax.tree.leaves(small.clip))
    assert f"clip={count / 1000:.3g} k float32 ({4 * count / 1000:.3g} kB)" in text
    abstract = repr(abstract_params(jitjax.FluxConfig(), jnp.bfloat16))
    assert "transformer=11.9 G bfloat16 (23.8 GB)" in abstract
    assert repr(jitjax.FluxParams({}, {}, {}, {}, small.config, "")).startswith(
        "FluxParams(config="
    )


def test_repr_of_arrays_without_values(small):
    shown = []
    jax.jit(lambda params: shown.append(repr(params)))(small)
    deleted = jax.tree.map(lambda x: jax.device_put(np.array(x)), small)
    jax.tree.map(lambda x: x.delete(), deleted)
    assert shown == [repr(deleted)] == [repr(small)]
    repr(jax.tree.map(lambda x: None, small))
    repr(jax.tree.map(lambda x: 0, small))


def test_equality_is_identity(small):
    same = copy.copy(small)
    assert small == small
    assert small != same
    assert len({small, same, small}) == 2
    assert jax.tree.structure(small) == jax.tree.structure(same)
    jax.tree.map(np.testing.assert_array_equal, small, same)


def test_copies_and_serialisation_keep_every_value(small):
    """The parts are plain dictionaries, which `flax.serialization` knows."""
    params = dataclasses.replace(small, transformer={}, t5={}, autoencoder={})
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert jax.tree.structure(other) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, other, params)
    zeros = jax.tree.map(np.zeros_like, params.clip)
    restored = serialization.from_bytes(zeros, serialization.to_bytes(params.clip))
    jax.tree.map(np.testing.assert_array_equal, restored, params.clip)
    with pytest.raises(TypeError, match="FluxParams"):
        serialization.to_bytes(params)
