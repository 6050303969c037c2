"""`jitjax memory`, and the table of the documentation that it makes."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

import jitjax
from jitjax import cli
from jitjax.memory import estimate_memory, report

README = Path(__file__).parents[1] / "README.md"
SCALING = Path(__file__).parents[1] / "docs" / "scaling.md"


def run(capsys, *arguments):
    """Run `jitjax` with arguments; return the exit status, and what is printed."""
    status = 0
    try:
        cli.main(arguments)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


def test_the_report_has_every_part_program_and_card(capsys):
    status, out, err = run(
        capsys, "memory", "flux-dev", "--size", "1024", "--batch", "4", "--plan", "4x",
        "--quantise", "int8", "--mesh", "2x1", "--dtype", "bfloat16",
    )  # fmt: skip
    assert (status, err) == (0, "")
    estimate = estimate_memory("flux-dev", batch=4, plan="4x", quantise="int8", mesh="2x1")
    assert out == report.text_report(estimate) + "\n"
    lines = out.splitlines()
    assert lines[0].startswith("flux-dev, 1024 x 1024 pixels, batch 4, bfloat16, int8 kernels, 2 ")
    for name in ("text encoders", "transformer, 1440 of 4096", "decoder"):
        assert any(line.startswith(name) for line in lines)
    everything = next(line for line in lines if line.startswith("everything")).split()[-8:]
    assert everything == ["21.08", f"{estimate.host / 1e9:.2f}", f"{estimate.disk / 1e9:.2f}",
                          "no", "yes", "yes", "yes", "yes"]  # fmt: skip
    assert "not measured" in out


def test_a_checkpoint_folder_and_a_bundled_one(capsys, small, tmp_path):
    jitjax.save(small, tmp_path / "small")
    status, out, _ = run(capsys, "memory", str(tmp_path / "small"), "--platform", "cpu")
    assert status == 0
    assert out.splitlines()[0].endswith("small, 64 x 64 pixels, batch 1, float32")
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert f" {size / 1e6:.2f} " in out
    assert run(capsys, "memory", "tiny")[1].startswith("tiny, 512 x 512 pixels, batch 1, float32")


def test_without_encoders(capsys):
    out = run(capsys, "memory", "flux-dev", "--without-encoders")[1]
    assert "T5" not in out
    assert "text encoders" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a checkpoint, flux-dev or flux-schnell (a picture of the word: jitjax -- m"),
        (("-o", "memory.png"), "unrecognized arguments: -o"),
        (("flux-pro",), "no checkpoint at 'flux-pro'; expected a folder"),
        (("flux-dev", "--size", "big"), "--size is 'big'; expected one side or WIDTHxHEIGHT"),
        (("flux-dev", "--mesh", "8"), "mesh is '8'; expected DATAxMODEL"),
        (("flux-dev", "--quantise", "int3"), "quantise is 'int3'; expected one of int8"),
        (("flux-dev", "--table"), "--table takes no other arguments"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    status, out, err = run(capsys, "memory", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"jitjax memory: error: {message}")
    assert err.count("\n") == 1


def test_the_word_is_a_prompt_after_two_dashes(capsys, monkeypatch):
    prompts = []

    def stop(prompt):
        prompts.append(prompt)
        raise ValueError("stopped")

    monkeypatch.setattr(cli, "read_prompt", stop)
    for arguments in (
        ("--", "memory"),
        ("a memory",),
        ("--seed", "1", "memory"),
        ("--", "convert"),
    ):
        assert run(capsys, *arguments) == (2, "", "jitjax: error: stopped\n")
    assert prompts == ["memory", "a memory", "memory", "convert"]


def test_help_of_both_commands(capsys):
    status, out, _ = run(capsys, "memory", "--help")
    assert status == 0
    assert "jitjax memory flux-dev" in out
    assert "jitjax -- memory" in out
    assert "memory|info|convert" in run(capsys, "--help")[1]


def test_no_model_is_imported():
    code = (
        "import sys; from jitjax.cli import main; main(['memory', 'flux-dev'])\n"
        "print([name for name in ('flax', 'diffrax', 'orbax', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_table_of_the_documentation(capsys, monkeypatch):
    """If this fails: `jitjax memory --table` prints what belongs between the markers."""
    # It takes a second, and does not change.
    monkeypatch.setattr(report, "what_fits", functools.cache(report.what_fits))
    for page in (SCALING, README):
        text = page.read_text()
        assert report.with_table(text) == text
    assert run(capsys, "memory", "--table")[1] == report.what_fits()
    assert report.what_fits().count("\n") == 2 + len(report.ROWS)


@pytest.mark.parametrize("page", ["", "<!-- end --><!-- jitjax memory --table -->"])
def test_a_page_without_markers(page):
    with pytest.raises(ValueError, match="the page has no place for the table"):
        report.with_table(page)
