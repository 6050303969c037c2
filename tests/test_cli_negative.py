"""`--negative`, `--negative-conditioning` and `--true-guidance` of the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli
from jitjax.negative import DEFAULT_TRUE_GUIDANCE
from jitjax.picture import seed_keys
from jitjax.sampler.plan import Plan

pytestmark = pytest.mark.usefixtures("load_once")

QUICK = ("--plan", "dense", "--steps", "1", "--size", "32")
PROMPT, NEGATIVE = "a red circle", "blue square"


@pytest.fixture
def run(capsys, saved):
    """Run `jitjax` on the small checkpoint; return the exit status, and what is printed."""

    def run(*arguments):
        status = 0
        try:
            cli.main([*map(str, arguments), *QUICK, "--checkpoint", str(saved)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int), json.loads(image.text["settings"])


@pytest.mark.slow
def test_the_picture_is_that_of_sample_on_every_way(run, small, tmp_path):
    out = {name: tmp_path / f"{name}.png" for name in ("text", "low", "saved", "empty")}
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for text, file in zip((PROMPT, NEGATIVE), files, strict=True):
        assert run(text, "--save-conditioning", file)[0] == 0
    guided = "--true-guidance", 3
    assert run(PROMPT, "--negative", NEGATIVE, *guided, "-o", out["text"])[0] == 0
    saved = "--conditioning", files[0], "--negative-conditioning", files[1]
    assert run(*saved, *guided, "-o", out["saved"])[0] == 0
    low = PROMPT, "--negative-conditioning", files[1], "--low-memory"
    assert run(*low, *guided, "-o", out["low"])[0] == 0
    pixels, settings = picture(out["text"])
    assert (settings["negative"], settings["true_guidance"]) == (NEGATIVE, 3)
    expected = jitjax.sample(
        small,
        PROMPT,
        key=seed_keys([0]),
        height=32,
        width=32,
        plan=Plan(1, schedule="shifted"),
        negative_prompt=NEGATIVE,
        true_guidance=3.0,
    )
    assert np.abs(pixels - np.round(255 * np.asarray(expected[0]))).max() <= 1
    for name in ("low", "saved"):
        other, other_settings = picture(out[name])
        np.testing.assert_array_equal(other, pixels)
        assert other_settings == settings
    # A scale alone is for the empty prompt.
    assert run(PROMPT, *guided, "-o", out["empty"])[0] == 0
    assert picture(out["empty"])[1]["negative"] == ""
    assert (picture(out["empty"])[0] != pixels).any()


@pytest.mark.slow
def test_lists_of_prompts(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "negative": NEGATIVE},
        {"prompt": "a blue square", "negative": ""},
        {"prompt": PROMPT, "negative": 3},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, _, err = run("--prompts", "list.jsonl", "-o", "plain", "--batch", 2)
    assert (status, "line 4: negative" in err) == (1, True)
    plain = {path.name: picture(path)[1] for path in (tmp_path / "plain").iterdir()}
    assert sorted(settings.get("negative", "none") for settings in plain.values()) == [
        "",
        NEGATIVE,
        "none",
    ]
    without = [settings for settings in plain.values() if "negative" not in settings]
    assert "true_guidance" not in without[0]  # so that its name is what it was
    assert {s["true_guidance"] for s in plain.values() if "negative" in s} == {
        DEFAULT_TRUE_GUIDANCE
    }
    # The option is for lines without one of their own.
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines[:3])))
    assert run("--prompts", "list.jsonl", "-o", "all", "--negative", NEGATIVE)[0] == 0
    same = {path.name for path in (tmp_path / "all").iterdir()}
    assert len(same) == 2  # the first two lines are the same picture
    assert same < plain.keys()


def test_errors_are_one_line(run, tmp_path):
    file = tmp_path / "x.safetensors"
    cases = {
        ("--true-guidance", 0.5): "--true-guidance is 0.5; expected a finite number of 1 or more",
        ("--true-guidance", "nan"): "--true-guidance is nan",
        ("--true-guidance", "inf"): "--true-guidance is inf",
        ("--negative", "a\0b"): "--negative has a zero byte",
        ("--negative", "a", "--negative-conditioning", file): "expected one of them",
        ("--negative", "a", "--save-conditioning", file): "expected no --negative with it",
        ("--negative-conditioning", file): f"no encoded prompts at '{file}'",
    }
    for options, message in cases.items():
        status, _, err = run(PROMPT, *options)
        assert (status, len(err.strip().splitlines())) == (2, 1), err
        assert message in err
    status, _, err = run("--conditioning", file, "--negative", "a")
    assert "--negative-conditioning FILE" in err
    status, _, err = run("--prompts", file, "--negative-conditioning", file)
    assert "--negative-conditioning and --prompts" in err
