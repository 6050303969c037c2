"""`--control` and `--reference` of the command line, and checkpoints that need pictures."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from golden import build
from PIL import Image

import jitjax
from jitjax import cli, cli_image
from jitjax.config import FluxConfig
from jitjax.picture import seed_keys

pytestmark = pytest.mark.usefixtures("load_once")

RGB = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
PLAN = jitjax.PLANS["multistep-12"].replace(steps=2)


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def error(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "edges.png"
    Image.fromarray(RGB).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(small, tmp_path_factory):
    """Folders with random checkpoints that need a control picture, and a mask."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, channels in (("canny", 128), ("fill", 384)):
        jitjax.save(build.with_input_channels(small, channels), folder / name)
    return folder


def check(path, expected) -> dict:
    """Check the pixels of a file; return its settings."""
    with Image.open(path) as image:
        pixels, settings = np.asarray(image), json.loads(image.text["settings"])
    expected = np.asarray(jax.numpy.round(255 * expected[0]))
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1
    return settings


@pytest.mark.slow
def test_a_control_picture(checkpoints, picture, tmp_path, capsys):
    out, folder = tmp_path / "out.png", checkpoints / "canny"
    run("red", "--checkpoint", folder, "--control", picture, "--steps", 2, "-o", out)
    assert "2/2" in capsys.readouterr().err
    control = RGB[None].astype(np.float32) / 255
    params = jitjax.load(folder)
    expected = jitjax.sample(params, "red", key=seed_keys([0]), plan=PLAN, control=control)
    assert check(out, expected)["control"] == str(picture)


@pytest.mark.slow
def test_a_reference_picture(picture, tmp_path, capsys):
    out = tmp_path / "out.png"
    options = ["--reference", picture, "--steps", 2, "--size", "64x48", "-o", out]
    run("a red circle", *options)
    assert "does not say that it is FLUX.1 Kontext" in capsys.readouterr().err
    expected = jitjax.sample(
        jitjax.load("tiny"),
        "a red circle",
        key=seed_keys([0]),
        plan=PLAN,
        width=64,
        height=48,
        reference=RGB[None].astype(np.float32) / 255,
    )
    assert check(out, expected)["reference"] == str(picture)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((48, 32), (48, 32)),
        ((50, 30), (48, 32)),
        ((3, 2), (16, 16)),
        ((2048, 1024), (1456, 720)),  # 1448 x 724, a megapixel
        ((1000, 3000), (592, 1776)),  # 591 x 1774
        ((1024, 1024), (1024, 1024)),
    ],
)
def test_the_size_of_a_reference(tmp_path, capsys, size, expected):
    path = tmp_path / "x.png"
    Image.new("RGB", size, "red").save(path)
    assert cli_image.read_reference(path, FluxConfig()).shape == (1, expected[1], expected[0], 3)
    note = f"--reference: resized from {size[0]}x{size[1]} to {expected[0]}x{expected[1]} pixels"
    assert (note in capsys.readouterr().err) == (size != expected)


def test_without_a_size_the_result_has_that_of_the_pictures(picture):
    parser = cli.build_parser()
    for option in ("--control", "--reference"):
        args = parser.parse_args(["red", option, str(picture)])
        task, size = cli_image.read_all(args, FluxConfig())
        assert size == (48, 32)
        assert task[option[2:]].shape == (1, 32, 48, 3)
        args = parser.parse_args(["red", option, str(picture), "--size", "64"])
        assert cli_image.read_all(args, FluxConfig())[1] is None  # it is --size


def test_errors_before_anything_is_loaded(checkpoints, picture, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("the checkpoint is loaded")

    monkeypatch.setattr(jitjax, "load", fail)
    other = tmp_path / "other.png"
    Image.fromarray(RGB[:, :32]).save(other)
    listed = tmp_path / "list.txt"
    listed.write_text("a red circle\n")
    canny, fill = (["red", "--checkpoint", checkpoints / name] for name in ("canny", "fill"))
    cases = (
        (canny, "and there is no --control; expected --control"),
        (fill, "and there is no --image and no --mask; expected --image and --mask"),
        ([*fill, "--image", picture], "there is no --mask; expected --image and --mask"),
        ([*canny, "--control", picture, "--reference", picture], "there is --reference, but the"),
        (["red", "--control", picture], "there is --control, but the model takes no control"),
        (["--prompts", listed, *canny[1:]], "there is no --control"),
        (["--prompts", listed, "--reference", picture], "there are --reference and --prompts"),
        (["red", "--control", picture, "--save-conditioning", "x.safetensors"],
         "there are --control and --save-conditioning"),
        ([*canny, "--control", other, "--image", picture],
         "other.png is 32x32 pixels; expected 48x32, as --image"),
        ([*canny, "--control", tmp_path / "none.png"], "No such file"),
        ([*canny, "--control", listed], "is no picture"),
    )  # fmt: skip
    for arguments, message in cases:
        assert message in error(capsys, *arguments, "-o", tmp_path / "out.png")
    assert "--reference" in error(capsys, "red", "--reference", tmp_path / "none.png")
    assert not (tmp_path / "out.png").exists()
