"""Signals to a real `python -m jitjax.convert` whose threads do not stop."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden.build import SMALL
from safetensors.numpy import save_file

from jitjax.convert.__main__ import main
from jitjax.convert.components import component_of

PROGRAM = """
import pathlib, sys, time
from jitjax import command
from jitjax.checkpoint import array_writer
from jitjax.convert import __main__ as convert

run = command.run
command.run = lambda body, **options: run(body, **options | {{"grace": {grace}}})
write_file = array_writer.write_file

def busy(path, data, size):
    pathlib.Path("writing").touch()
    while True:  # creates its folders again and again, whatever happens to them
        write_file(path, data, size)
        time.sleep(0.001)

array_writer.write_file = busy
sys.exit(convert.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The folder of a random transformer."""
    folder = tmp_path_factory.mktemp("source")
    shapes = component_of("transformer").source_shapes(SMALL.transformer)
    state = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(SMALL.transformer)))
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("grace", "signals", "replaces"),
    [
        pytest.param(0.5, 1, True, id="after the grace period, replacing"),
        pytest.param(0.5, 1, False, id="after the grace period", marks=pytest.mark.slow),
        pytest.param(600, 2, True, id="second signal, replacing", marks=pytest.mark.slow),
        pytest.param(600, 2, False, id="second signal"),
    ],
)
def test_forced_end_removes_the_hidden_folder(source, tmp_path, grace, signals, replaces):
    arguments = ["--transformer", str(source), "--out", str(tmp_path / "out")]
    if replaces:
        assert main(arguments) == 0
    before = contents(tmp_path)
    command = [sys.executable, "-c", PROGRAM.format(grace=grace), *arguments, "--overwrite"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "writing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert (tmp_path / ".out.jitjax.tmp").is_dir()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # else two of the same are one to the process
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert error.splitlines()[-1] == "jitjax: stopped by SIGTERM"
    assert "Traceback" not in error
    (tmp_path / "writing").unlink()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * replaces
