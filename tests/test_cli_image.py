"""`--image` and `--strength` of the command line."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli, cli_image
from jitjax.config import FluxConfig
from jitjax.picture import seed_keys

RGB = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
GREY16 = np.random.default_rng(1).integers(0, 2**16, (32, 48)).astype(np.uint16)


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def test_the_picture_is_that_of_sample_and_its_settings_are_stored(tmp_path, capsys):
    source, out = tmp_path / "cat.png", tmp_path / "out.png"
    Image.fromarray(RGB).save(source)
    run("a red circle", "--image", source, "--strength", 0.5, "--steps", 4, "-o", out)
    assert "2/2" in capsys.readouterr().err
    with Image.open(out) as image:
        pixels, settings = np.asarray(image), json.loads(image.text["settings"])
    assert settings["image"] == str(source)
    assert settings["strength"] == 0.5
    assert settings["steps"] == 4
    params = jitjax.load("tiny")
    expected = jitjax.sample(
        params,
        "a red circle",
        key=seed_keys([0]),
        plan=jitjax.PLANS["multistep-12"].replace(steps=4),
        image=RGB[None].astype(np.float32) / 255,
        strength=0.5,
    )
    expected = np.asarray(jax.numpy.round(255 * expected[0]))
    assert np.abs(pixels - expected).max() <= 1


def read(image: Image.Image, path, size=None, **options) -> np.ndarray:
    image.save(path, **options)
    pixels = cli_image.read(path, size, FluxConfig())
    assert pixels.dtype == np.float32
    return (255 * pixels[0]).round().astype(np.uint8)


def test_kinds_of_pictures(tmp_path):
    path, picture = tmp_path / "x.png", Image.fromarray(RGB)
    np.testing.assert_array_equal(read(picture, path), RGB)
    grey = picture.convert("L")
    np.testing.assert_array_equal(read(grey, path), np.asarray(grey.convert("RGB")))
    palette = picture.convert("P")
    np.testing.assert_array_equal(read(palette, path), np.asarray(palette.convert("RGB")))
    deep = read(Image.fromarray(GREY16), path)
    np.testing.assert_array_equal(deep[..., 0], (GREY16 / 257).round().astype(np.uint8))
    np.testing.assert_array_equal(deep[..., 0], deep[..., 2])
    cmyk = picture.convert("CMYK")
    got = read(cmyk, tmp_path / "x.tiff")
    np.testing.assert_array_equal(got, np.asarray(cmyk.convert("RGB")))


def test_what_is_transparent_becomes_white(tmp_path, capsys):
    alpha = np.full((32, 48, 1), 255, np.uint8)
    path = tmp_path / "x.png"
    np.testing.assert_array_equal(read(Image.fromarray(np.dstack([RGB, alpha])), path), RGB)
    assert capsys.readouterr().err == ""
    alpha[:, :16] = 0
    got = read(Image.fromarray(np.dstack([RGB, alpha])), path)
    assert (got[:, :16] == 255).all()
    np.testing.assert_array_equal(got[:, 16:], RGB[:, 16:])
    assert "transparent becomes white" in capsys.readouterr().err


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    got = read(Image.fromarray(RGB), tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(got, np.rot90(RGB, -1))


def test_only_size_resizes(tmp_path, capsys):
    picture = Image.fromarray(RGB).resize((50, 30))
    with pytest.raises(ValueError, match=r"is 50x30 pixels; .* --size 48x32 resizes it"):
        read(picture, tmp_path / "x.png")
    assert read(picture, tmp_path / "x.png", "48x32").shape == (32, 48, 3)
    assert "resized from 50x30 to 48x32" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--size is 50x30; .* the nearest is 48x32"):
        read(picture, tmp_path / "x.png", "50x30")


def test_errors_are_one_line(tmp_path, capsys):
    good, empty, text, cut, wide, deep = (
        tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png", "e.png", "f.tiff")
    )
    Image.fromarray(RGB).save(good)
    empty.touch()
    text.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:400])
    Image.new("1", (20_000, 20_000)).save(wide)  # some kilobytes
    Image.fromarray(GREY16.astype(np.float32)).save(deep)
    cases = {
        ("--image", tmp_path / "none.png"): "No such file",
        ("--image", tmp_path): "directory",
        ("--image", empty): "is an empty file",
        ("--image", text): "is no picture",
        ("--image", cut): "is damaged",
        ("--image", wide): "expected at most 8192 a side",
        ("--image", deep): "32 bits per channel",
        ("--image", good, "--strength", 0): "--strength is 0.0; expected above 0, at most 1",
        ("--image", good, "--strength", -1): "--strength is -1.0",
        ("--image", good, "--strength", "nan"): "--strength is nan",
        ("--strength", 0.5): "--strength is for --image",
        ("--image", good, "--save-conditioning", "x.safetensors"): "--image and --save-cond",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit) as error:
            run("a red circle", *options, "-o", tmp_path / "out.png")
        assert error.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    with pytest.raises(SystemExit):
        run("--prompts", good, "--image", good)
    assert "--image and --prompts" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
