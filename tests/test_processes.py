"""Two processes with one mesh, by the program of `docs/devices.md`."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import build

import jitjax

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[1] / "docs" / "devices.md"
WAIT = 240  # seconds for what takes 15 on an idle machine
BOUND = 45  # seconds for the end of a process after the other's death; the heartbeat's are 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    jitjax.save(build.small_params(folder / "tokenizers"), folder / "saved")
    return folder / "saved"


def start(folder: Path, checkpoint: Path, number: int, port: int) -> subprocess.Popen:
    """Start a process of the documented program; its messages go to `error-{number}`."""
    section = DOCUMENT.read_text().partition("## Several hosts")[2]
    program = re.search("```python\n(.*?)```", section, re.DOTALL)
    assert program
    (folder / "hosts.py").write_text(program.group(1))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    arguments = [f"localhost:{port}", "2", str(number), checkpoint, folder / f"{number}.npy"]
    with (folder / f"error-{number}").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-u", folder / "hosts.py", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
        )


@pytest.fixture
def pair(tmp_path, checkpoint):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(tmp_path, checkpoint, number, port) for number in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def messages(folder: Path) -> str:
    return "".join((folder / f"error-{number}").read_text()[-2000:] for number in range(2))


def test_two_processes_make_the_pictures_of_one(pair, checkpoint, tmp_path):
    prompts = ["a large red circle", "a small blue square"]
    expected = jitjax.sample(jitjax.load(checkpoint), prompts, key=jax.random.key(0))
    for process in pair:
        assert process.wait(WAIT) == 0, messages(tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "0.npy"), expected, atol=1e-4)
    assert not (tmp_path / "1.npy").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_other(pair, tmp_path, killed):
    started = time.monotonic()
    while "step" not in (tmp_path / "error-0").read_text():  # the progress bar
        assert time.monotonic() - started < WAIT, messages(tmp_path)
        assert [process.poll() for process in pair] == [None, None], messages(tmp_path)
        time.sleep(0.1)
    pair[killed].kill()
    assert pair[1 - killed].wait(BOUND) != 0
    message = (tmp_path / f"error-{1 - killed}").read_text()
    assert "another task died" in message or "heartbeat" in message, message[-2000:]
