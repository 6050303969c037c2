"""A list of 200 prompts whose process is stopped five times.

Its pictures are flat, so that it writes many files in little time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flat_program import colour
from PIL import Image

PROMPTS = [
    f"a {colour} {shape} number {i}"
    for i in range(10)
    for colour in ("red", "green", "blue", "white")
    for shape in ("star", "ring", "cross", "square", "circle")
]
OPTIONS = ("--size", "32", "--plan", "dense", "--steps", "2", "--batch", "10")
STOPS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL)


def identities(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in folder.glob("*.png")}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Start the command on the list."""
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS) + "\n")
    program = Path(__file__).with_name("flat_program.py")
    command = [sys.executable, program, "--prompts", "list.txt", *OPTIONS]

    def default_signals() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def start_command() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"PYTHONUTF8": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals,
        )  # fmt: skip

    return start_command


@pytest.mark.slow
def test_every_picture_is_made_once_and_whole(start, tmp_path):
    folder = tmp_path / "list-pictures"
    made: dict[str, tuple[int, int]] = {}
    for signum in STOPS:
        process = start()
        while len(list(folder.glob("*.png"))) < len(made) + 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
        now = identities(folder)
        assert now.items() >= made.items()  # nothing is made twice or lost
        assert len(made) + 5 <= len(now) < len(PROMPTS)
        assert f"200 pictures, {len(made)} of them in 'list-pictures' already" in error
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
        else:
            assert process.returncode == 128 + signum
            said = re.search(r"(\d+) of 200 pictures are made; the same command goes on", error)
            assert said
            # It may be stopped between the writing of a file and the count.
            assert len(now) - 1 <= int(said[1]) <= len(now)
            assert "Traceback" not in error
        made = now
    for path in folder.glob(".*.tmp"):  # a process that is killed cannot remove its own
        os.utime(path, (0, 0))
    made = identities(folder)  # one of them may be a second name of a picture that is made
    process = start()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert identities(folder).items() >= made.items()
    assert sum(1 for _ in folder.iterdir()) == len(PROMPTS)
    pixels = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            pixels[image.info["prompt"]] = np.asarray(image)
    assert pixels.keys() == set(PROMPTS)
    for prompt, picture in pixels.items():
        np.testing.assert_array_equal(picture, np.tile(colour(prompt), (32, 32, 1)))
