"""The command line, in process, on the bundled checkpoint at a small size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from jitjax import cli


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "xla"))


def run(*arguments: object) -> None:
    cli.main([str(a) for a in arguments])


def test_a_picture_with_its_settings_inside(tmp_path, capsys):
    out = tmp_path / "circle.png"
    run("a large red circle", "-o", out, "--size", "64x32", "--steps", 4, "--seed", 3)
    with Image.open(out) as picture:
        assert picture.size == (64, 32)
        assert picture.text["prompt"] == "a large red circle"
        settings = json.loads(picture.text["settings"])
    assert settings["seed"] == 3
    assert settings["steps"] == 4
    assert settings["plan"] == "4x"
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert "circle.png: 4x, seed 3," in printed.out
    assert "4/4" in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["circle.png"]


def test_each_of_several_pictures_is_the_one_of_its_seed(tmp_path):
    common = ("a blue star", "--size", 64, "--steps", 1, "--plan", "dense")
    run(*common, "-o", tmp_path / "many.png", "--count", 2, "--seed", 8)
    run(*common, "-o", tmp_path / "one.png", "--seed", 9)
    many = np.asarray(Image.open(tmp_path / "many-9.png")).astype(int)
    one = np.asarray(Image.open(tmp_path / "one.png")).astype(int)
    assert (tmp_path / "many-8.png").exists()
    assert np.abs(many - one).max() <= 1  # rounding of another batch size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "9x"), "unknown plan '9x'"),
        (("--size", "100"), "expected a multiple of 16"),
        (("--size", "wide"), "WIDTHxHEIGHT"),
        (("--steps", "0"), "expected a positive integer"),
        (("--steps", "2"), "at least one step in every stage"),
        (("--count", "0"), "--count is 0"),
        (("--seed", "-1"), "--seed is -1"),
        (("--checkpoint", "nowhere"), "no checkpoint at 'nowhere'"),
        (("-o", "picture.jpg"), "ends in .png"),
        (("-o", "nowhere/picture.png"), "there is no folder 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run("a circle", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("jitjax: error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_by_examples(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--count 4" in text
