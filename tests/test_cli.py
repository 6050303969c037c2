"""The command line, run in this process with the bundled checkpoint at a small size."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli
from jitjax.sampler.plan import DEFAULT_PLAN, PLANS

pytestmark = pytest.mark.usefixtures("load_once")


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def test_png_stores_prompt_and_settings(tmp_path, capsys):
    out = tmp_path / "circle.png"
    run("a large red circle", "-o", out, "--size", "48x32", "--steps", 4, "--seed", 3)
    with Image.open(out) as image:
        assert image.size == (48, 32)
        assert image.text["prompt"] == "a large red circle"
        settings = json.loads(image.text["settings"])
    assert settings["seed"] == 3
    assert settings["steps"] == 4
    assert settings["plan"] == DEFAULT_PLAN
    assert settings["solver"] == "multistep"
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    assert f"circle.png: {DEFAULT_PLAN}, seed 3," in output.out
    assert "4/4" in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["circle.png"]


def test_functions_and_the_command_line_have_the_same_default_plan():
    functions = jitjax.sample, jitjax.denoise, jitjax.compile
    defaults = [inspect.signature(function).parameters["plan"].default for function in functions]
    defaults.append(cli.build_parser().parse_args(["a circle"]).plan)
    assert defaults == [DEFAULT_PLAN] * 4
    assert DEFAULT_PLAN in PLANS


@pytest.mark.slow
def test_the_papers_equation_is_one_option(tmp_path):
    """`--microflow hit` is the paper's micro-flow; it is stored, and changes the picture."""
    common = ("a blue star", "--size", 64, "--plan", "7x", "--solver", "multistep")
    for value in ("hit", "blend"):
        run(*common, "-o", tmp_path / f"{value}.png", "--microflow", value)
    with Image.open(tmp_path / "hit.png") as image:
        settings = json.loads(image.text["settings"])
    assert (settings["microflow"], settings["solver"]) == ("hit", "multistep")
    hit, blend = (np.asarray(Image.open(tmp_path / f"{v}.png")) for v in ("hit", "blend"))
    assert not np.array_equal(hit, blend)


@pytest.mark.slow
def test_quantised_weights_are_one_option(tmp_path):
    """`--quantise int8` is stored, and the picture is nearly the same."""
    common = ("a blue star", "--size", 64, "--steps", 4)
    run(*common, "-o", tmp_path / "plain.png")
    run(*common, "-o", tmp_path / "int8.png", "--quantise", "int8")
    with Image.open(tmp_path / "int8.png") as image:
        assert json.loads(image.text["settings"])["quantise"] == "int8"
    plain, int8 = (np.asarray(Image.open(tmp_path / f"{v}.png"), int) for v in ("plain", "int8"))
    assert 0 < np.abs(plain - int8).mean() < 8  # of 255


@pytest.mark.slow
def test_count_gives_the_images_of_consecutive_seeds(tmp_path):
    common = ("a blue star", "--size", 64, "--steps", 1, "--plan", "dense")
    run(*common, "-o", tmp_path / "batch.png", "--count", 2, "--seed", 8)
    run(*common, "-o", tmp_path / "single.png", "--seed", 9)
    batched = np.asarray(Image.open(tmp_path / "batch-9.png")).astype(int)
    single = np.asarray(Image.open(tmp_path / "single.png")).astype(int)
    assert (tmp_path / "batch-8.png").exists()
    assert np.abs(batched - single).max() <= 1  # Rounding depends on the batch size.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "9x"), "unknown plan '9x'"),
        (("--size", "100"), "expected a multiple of 16"),
        (("--size", "wide"), "WIDTHxHEIGHT"),
        (("--steps", "0"), "expected a positive integer"),
        (("--plan", "4x", "--steps", "2"), "at least one step in every stage"),
        (("--microflow", "paper"), "--microflow is 'paper'; expected one of blend, hit, none"),
        (("--count", "0"), "--count is 0"),
        (("--seed", "-1"), "--seed is -1"),
        (("--quantise", "int3"), "--quantise is 'int3'; expected one of int8, int4, float8"),
        (("--checkpoint", "nowhere"), "no checkpoint at 'nowhere'"),
        (("-o", "image.jpg"), "ends in .png"),
        (("-o", "nowhere/image.png"), "expected the folder 'nowhere' to exist"),
    ],
)
def test_errors_print_one_line_and_exit_with_status_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run("a circle", *arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("jitjax: error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
