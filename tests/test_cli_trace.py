"""`--trace` and `--animate`."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli, viz

pytestmark = pytest.mark.usefixtures("load_once")

QUICK = ("a red star", "--size", "48x64", "--plan", "dense", "--steps", "3")


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Run `jitjax` with arguments; return the exit status, and what it prints."""
    status = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    return status, *capsys.readouterr()


def test_the_files_show_the_run(capsys, saved, tmp_path, monkeypatch):
    traces = []
    sample = jitjax.sample

    def record(*arguments, **options):
        made = sample(*arguments, **options)
        traces.append(made[1])
        return made

    monkeypatch.setattr(jitjax, "sample", record)
    quick = (*QUICK, "--checkpoint", saved)
    png, gif = tmp_path / "run.png", tmp_path / "run.gif"
    status, out, _ = run(capsys, *quick, "-o", tmp_path / "a.png", "--trace", png, "--animate", gif)
    assert status == 0
    assert out.splitlines()[1:] == [f"{png}: the trace", f"{gif}: the animation"]
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    expected = io.BytesIO()
    viz.show_trace(jitjax.load(saved), traces[0], (4, 3)).savefig(expected, format="png")
    np.testing.assert_array_equal(Image.open(png), Image.open(expected))
    with Image.open(gif) as image:
        assert image.size == (48 * 6, 64 * 6)  # enlarged to at least 384 rows
        assert 3 <= image.n_frames <= 3 + 1  # equal ones are merged
        image.seek(image.n_frames - 1)
        last = np.asarray(image.convert("RGB"))[3::6, 3::6].astype(int)
    assert np.abs(last - pixels).mean() < 8  # of 255; a GIF has 256 colours
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.png", "run.gif", "run.png"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_picture_is_the_same_and_what_exists_is_replaced_only_if_that_is_asked_for(
    capsys, saved, tmp_path
):
    gif = tmp_path / "run.webp"
    gif.write_text("old")
    arguments = (*QUICK, "--checkpoint", saved, "-o", tmp_path / "a.png", "--animate", gif)
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert "exists; expected a new name, or --overwrite to replace it" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run.webp"]
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert Image.open(gif).format == "WEBP"
    assert run(capsys, *QUICK, "--checkpoint", saved, "-o", tmp_path / "plain.png")[0] == 0
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "a.png")]
    np.testing.assert_array_equal(*pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "run.webp"), "--trace is 'run.webp'; expected a name that ends in .png"),
        (("--animate", "run.png"), "expected a name that ends in .webp or .gif"),
        (("--trace", "none/run.png"), "expected the folder 'none' to exist"),
        (("--animate", "/sys/run.gif"), "--animate: no file can be made in the folder '/sys'"),
        (("--trace", "old.png"), "--trace: 'old.png' exists; expected a new name, or --overwrite"),
        (("--trace", "run.png", "--count", "2"), "--trace is for one picture; expected no "),
        (("--trace", "jitjax.png"), "--trace jitjax.png is the file of the picture too"),
        (("--trace", "./a.png", "-o", "a.png"), "--trace a.png is the file of the picture too"),
    ],
)
def test_said_before_weights_are_read(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").touch()
    monkeypatch.setattr(jitjax, "load", lambda *_, **__: pytest.fail("loaded"))
    status, out, error = run(capsys, *QUICK, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("jitjax: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_not_with_a_list_or_a_conditioning(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a star\n")
    for others in (("--prompts", "list.txt"), ("a star", "--save-conditioning", "c.safetensors")):
        status, _, error = run(capsys, *others, "--animate", "run.webp")
        assert status == 2
        assert "--animate is for one picture" in error


def test_without_matplotlib_the_error_names_the_extra(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jitjax, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, error = run(capsys, *QUICK, "--trace", "run.png")
    assert status == 2
    assert error == 'jitjax: error: --trace needs matplotlib: pip install "jitjax[viz]"\n'
