"""`--image`, `--strength` and `--mask` of the command line."""

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

pytestmark = pytest.mark.usefixtures("load_once")

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
        progress=lambda done: None,  # so that the command's programs are used again
    )
    expected = np.asarray(jax.numpy.round(255 * expected[0]))
    assert np.abs(pixels - expected).max() <= 1


MASK = np.zeros((32, 48), np.uint8)
MASK[3:20, 10:30] = 255
MASK[3:20, 30] = 128


@pytest.mark.slow
def test_what_the_mask_keeps_is_the_given_picture(tmp_path):
    source, mask, out = tmp_path / "cat.png", tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(RGB).save(source)
    Image.fromarray(MASK).save(mask)
    run("a red circle", "--image", source, "--mask", mask, "--steps", 2, "-o", out)
    with Image.open(out) as image:
        pixels, settings = np.asarray(image), json.loads(image.text["settings"])
    assert settings["mask"] == str(mask)
    assert settings["strength"] == 1.0
    np.testing.assert_array_equal(pixels[MASK == 0], RGB[MASK == 0])
    expected = jitjax.sample(
        jitjax.load("tiny"),
        "a red circle",
        key=seed_keys([0]),
        plan=jitjax.PLANS["multistep-12"].replace(steps=2),
        image=RGB[None].astype(np.float32) / 255,
        mask=MASK[None].astype(np.float32) / 255,
    )
    assert np.abs(pixels - np.asarray(255 * expected[0])).max() <= 0.6


def read_mask(image: Image.Image, path, size=None, picture=RGB) -> np.ndarray:
    source = path.with_name("cat.png")
    Image.fromarray(picture).save(source)
    image.save(path)
    pixels, mask = cli_image.read_with_mask(source, path, size, FluxConfig())
    assert mask.shape == pixels.shape[:3]
    assert mask.dtype == np.float32
    return mask[0]


def test_kinds_of_masks(tmp_path, capsys):
    path, mask = tmp_path / "x.png", Image.fromarray(MASK)
    expected = MASK.astype(np.float32) / 255
    for kind in ("L", "RGB", "P", "RGBA"):  # the last is opaque
        np.testing.assert_array_equal(read_mask(mask.convert(kind), path), expected)
    np.testing.assert_array_equal(read_mask(Image.fromarray(MASK == 255), path), expected == 1)
    jpeg = read_mask(mask.convert("RGB"), tmp_path / "x.jpg")
    np.testing.assert_allclose(jpeg, expected, atol=0.2)
    assert "--mask: 1.1% of it is grey" in capsys.readouterr().err  # 17 of 1536 pixels


def test_a_mask_is_resized_with_its_picture(tmp_path):
    path, mask = tmp_path / "x.png", Image.fromarray(MASK)
    twice = read_mask(mask, path, "96x64")
    inner = twice[2 * 4 : 2 * 19, 2 * 11 : 2 * 29]
    assert (inner == 1).all()
    far = np.kron(MASK, np.ones((2, 2))) == 0
    far[4:42, 18:64] = False
    assert (twice[far] == 0).all()
    # It may have the size of the result, too.
    large = Image.fromarray(np.kron(MASK, np.ones((2, 2), np.uint8)))
    got = read_mask(large, path, "96x64")
    np.testing.assert_array_equal(got, np.asarray(large, np.float32) / 255)


def test_masks_that_are_none(tmp_path):
    path, mask = tmp_path / "x.png", Image.fromarray(MASK)
    cases = {
        r"--mask .*x.png is 64x32 pixels; expected 48x32, as --image": (
            mask.resize((64, 32)),
            None,
        ),
        "is 64x32 pixels; expected 48x32 or 96x64, as": (mask.resize((64, 32)), "96x64"),
        "x.png has colours; expected white": (Image.fromarray(RGB), None),
        "x.png is black, so there is nothing to do": (Image.new("L", (48, 32)), None),
        "x.png is transparent in places; expected grey": (
            Image.merge("LA", (Image.new("L", (48, 32), 255), mask)),
            None,
        ),
    }
    for message, (image, size) in cases.items():
        with pytest.raises(ValueError, match=message):
            read_mask(image, path, size)


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
        ("--mask", good): "--mask is for --image; expected both or neither",
        ("--image", good, "--mask", empty): f"--mask {empty} is an empty file",
        ("--image", good, "--mask", text): f"--mask {text} is no picture",
        ("--image", good, "--mask", tmp_path / "none.png"): "--mask",
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
