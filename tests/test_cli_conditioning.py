"""`--save-conditioning`, `--conditioning` and `--low-memory`."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli
from jitjax.checkpoint import TEXT_ENCODERS
from jitjax.conditioning import Conditioning, read_conditioning

pytestmark = pytest.mark.usefixtures("load_once")

QUICK = ("--plan", "dense", "--steps", "1", "--size", "32")


def run(capsys, *arguments):
    """Run `jitjax` with arguments; return the exit status, and what is printed."""
    status = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def loaded(monkeypatch):
    """What each call of `jitjax.load` loads: the parts, and whether into host memory."""
    calls, load = [], jitjax.load

    def record(path, **options):
        calls.append((options.get("parts"), options.get("low_memory", False)))
        return load(path, **options)

    monkeypatch.setattr(jitjax, "load", record)
    return calls


@pytest.mark.slow
def test_the_picture_is_the_same_on_every_way(capsys, saved, tmp_path, loaded):
    prompt, common = "a red circle", ("--checkpoint", saved)
    path = tmp_path / "red.safetensors"
    plain, low, kept = (tmp_path / f"{name}.png" for name in ("plain", "low", "kept"))
    assert run(capsys, prompt, "-o", plain, *QUICK, *common)[0] == 0
    assert run(capsys, prompt, "-o", low, *QUICK, *common, "--low-memory")[0] == 0
    status, out, _ = run(capsys, prompt, "--save-conditioning", path, *common)
    assert (status, out) == (0, f"{path}: the encoded prompt\n")
    assert read_conditioning(path)[1] == [prompt]
    assert run(capsys, "--conditioning", path, "-o", kept, *QUICK, *common, "--low-memory")[0] == 0
    drawing = ("transformer", "autoencoder")
    assert loaded == [
        (None, False),
        (TEXT_ENCODERS, False),
        (drawing, True),
        (TEXT_ENCODERS, False),
        (drawing, True),
    ]
    for other in (low, kept):
        np.testing.assert_array_equal(np.asarray(Image.open(other)), np.asarray(Image.open(plain)))
        assert Image.open(other).info["prompt"] == prompt
    assert json.loads(Image.open(kept).info["settings"])["seed"] == 0


@pytest.mark.slow
def test_parts_that_are_not_needed_may_be_missing(capsys, small, tmp_path, saved):
    encoders, drawing = tmp_path / "encoders", tmp_path / "drawing"
    jitjax.save(jitjax.load(saved, parts=TEXT_ENCODERS), encoders)
    jitjax.save(jitjax.load(saved, parts=("transformer", "autoencoder")), drawing)
    file, out = tmp_path / "a.safetensors", tmp_path / "a.png"
    assert run(capsys, "a red", "--save-conditioning", file, "--checkpoint", encoders)[0] == 0
    draw = ("--conditioning", file, "-o", out, *QUICK)
    status, _, err = run(capsys, *draw, "--checkpoint", encoders)
    assert status == 2
    assert "has no transformer, autoencoder; expected transformer, autoencoder" in err
    assert run(capsys, *draw, "--checkpoint", drawing)[0] == 0
    status, _, err = run(capsys, *draw, "--overwrite")  # `tiny` has other widths
    assert status == 2
    assert "Conditioning.text has shape" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to make; expected a prompt, --prompts FILE or --conditioning FILE"),
        (("a", "--conditioning", "FILE"), "there are a prompt and --conditioning; expected one"),
        (("--conditioning", "FILE"), "no encoded prompts at"),
        (("a", "--save-conditioning", "FILE", "--count", "2"), "--save-conditioning makes no pict"),
        (("--prompts", "a", "--save-conditioning", "FILE"), "--save-conditioning makes no pict"),
        (("a", "--save-conditioning", "FILE", "-o", "a.png"), "--save-conditioning makes no pictu"),
        (("a", "--save-conditioning", "FILE.npz"), "expected a name that ends in .safetensors"),
        (("a", "--save-conditioning", "no/FILE"), "expected the folder"),
    ],
)
def test_errors(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("FILE", "a.safetensors") for argument in arguments]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_and_a_batch_is_refused(capsys, tmp_path):
    path = tmp_path / "two.safetensors"
    Conditioning(jnp.ones((2, 3, 4)), jnp.ones((2, 5))).save(path)
    before = path.read_bytes()
    status, _, err = run(capsys, "a", "--save-conditioning", path)
    assert status == 2
    assert "exists; expected a new name, or --overwrite" in err
    assert path.read_bytes() == before
    status, _, err = run(capsys, "--conditioning", path)
    assert status == 2
    assert "has 2 prompts; expected one" in err
