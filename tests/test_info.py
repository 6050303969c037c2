"""`jitjax info`."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import pytest

import jitjax
from jitjax import cli
from jitjax.checkpoint.parameters import PARTS
from jitjax.info import checkpoint_info


def test_parts_of_a_checkpoint(small, saved):
    info = checkpoint_info(str(saved))
    assert list(info["parts"]) == list(PARTS)
    for name, part in info["parts"].items():
        leaves = jax.tree.leaves(getattr(small, name))
        assert part["parameters"] == sum(leaf.size for leaf in leaves)
        assert part["bytes"] == sum(leaf.nbytes for leaf in leaves)
        assert part["dtypes"] == {"float32": part["parameters"]}
        assert part["quantised"] is None
    assert info["config"]["text_length"] == small.config.text_length
    assert info["format"] == 5


@pytest.mark.slow
def test_a_quantised_checkpoint_has_the_same_parameters_in_fewer_bytes(small, tmp_path):
    transformer = dataclasses.replace(small, t5={}, clip={}, autoencoder={})
    quantised = jitjax.quantise_params(transformer, "int8")
    jitjax.save(quantised, tmp_path / "checkpoint")
    part = checkpoint_info(str(tmp_path / "checkpoint"))["parts"]["transformer"]
    assert part["quantised"] == "int8"
    assert part["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(small.transformer))
    assert part["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(quantised.transformer))
    assert part["dtypes"]["int8"] > 0


def test_the_bundled_checkpoint():
    info = checkpoint_info("tiny")
    params = jitjax.load("tiny")
    for name, part in info["parts"].items():
        leaves = jax.tree.leaves(getattr(params, name))
        assert part["parameters"] == sum(leaf.size for leaf in leaves)
        assert list(part["dtypes"]) == ["float16"]
    assert info["bytes"] > sum(part["bytes"] for part in info["parts"].values())


def test_the_command_prints_parts_sources_and_loras(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "checkpoint")
    metadata = json.loads((folder / "jitjax.json").read_text())
    metadata["sources"] = {
        "files": [
            {"path": "/weights/flux.safetensors", "bytes": 23_800_000_000, "sha256": "ab" * 32}
        ],
        "loras": [{"path": "/loras/ink.safetensors", "scale": 0.7}],
    }
    (folder / "jitjax.json").write_text(json.dumps(metadata))
    cli.main(["info", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: a jitjax checkpoint, format 5, ")
    assert any(line.split()[0] == "transformer" and "float32" in line for line in lines if line)
    assert "  /weights/flux.safetensors (23.8 GB, SHA-256 abababababababab...)" in lines
    assert "  /loras/ink.safetensors, scale 0.7" in lines
    cli.main(["info", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["loras"][0]["scale"] == 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no checkpoint at 'nowhere'"),
        ([""], "no checkpoint at ''"),
        ([], "the following arguments are required"),
        (["."], "has no jitjax.json"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("jitjax info: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
