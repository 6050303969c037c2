"""A conversion that meets damage: found, told, and never a checkpoint that `load` accepts."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jitjax
from jitjax.checkpoint import PARTS
from jitjax.convert.__main__ import main

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["jitjax.convert.__main__", "orbax.checkpoint.experimental.v1"])


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory) -> Path:
    """A diffusers folder; 2 MB of weights."""
    path = tmp_path_factory.mktemp("source") / "FLUX"
    jitjax.save(small, path.with_name("saved"))
    assert main([str(path.with_name("saved")), "--to-diffusers", "--out", str(path)]) == 0
    return path


@pytest.fixture
def made(folder, tmp_path) -> Path:
    assert main([str(folder), "--dtype", "auto", "--out", str(tmp_path / "made")]) == 0
    return tmp_path / "made"


def data_files(path: Path) -> list[Path]:
    """The files with the arrays' numbers, in a fixed order."""
    return sorted(p for p in (path / "params").rglob("d/*") if p.stat().st_size)


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_verify_finds_nothing_where_nothing_is(made, small, capsys):
    loaded = jitjax.load(made)
    jax.tree.map(np.testing.assert_array_equal, loaded.transformer, small.transformer)
    assert main(["--verify", str(made)]) == 0
    assert "all arrays are as written; 4 source files as they were" in capsys.readouterr().out


def test_verify_finds_every_flipped_bit_of_an_array(made, capsys):
    rng = random.Random(0)
    kernel = np.asarray(jitjax.load(made).transformer["image_in"]["kernel"])
    (path,) = (p for p in data_files(made) if kernel.tobytes() in p.read_bytes())
    content = path.read_bytes()
    begin = content.find(kernel.tobytes())
    for _ in range(4):
        flip(path, begin + rng.randrange(kernel.nbytes), rng.randrange(8))
        assert main(["--verify", str(made)]) == 1
        told = capsys.readouterr().err
        assert "transformer/image_in/kernel differs from what was written" in told
        assert "1 arrays are damaged" in told
        path.write_bytes(content)
    assert main(["--verify", str(made)]) == 0


@pytest.mark.parametrize("part", PARTS)
def test_a_truncated_file_is_found_by_load_and_by_verify(made, part):
    files = [p for p in data_files(made) if p.is_relative_to(made / "params" / part)]
    path = max(files, key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["--verify", str(made)]) == 1
    with pytest.raises(ValueError, match=r"damaged|cannot be read|not those of its conf"):
        jitjax.load(made)


def test_a_changed_source_is_found(folder, made, capsys):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    flip(weights, len(content) - 5, 3)
    try:
        assert main(["--verify", str(made)]) == 1
        assert f"changed since the conversion: {weights}" in capsys.readouterr().err
    finally:
        weights.write_bytes(content)


def _convert(arguments: list[str]) -> None:
    os._exit(main(arguments))


def _convert_with_little_room(arguments: list[str], limit: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # pytest's is a file too, and would be full
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os._exit(main(arguments))


def test_a_dozen_kills_at_random_moments(folder, small, tmp_path):
    target = tmp_path / "killed"
    arguments = [str(folder), "--dtype", "auto", "--overwrite", "--out", str(target)]
    began = time.monotonic()
    whole = START.Process(target=_convert, args=(arguments,))
    whole.start()
    whole.join()
    takes = time.monotonic() - began
    assert whole.exitcode == 0
    rng, killed = random.Random(1), 0
    for _ in range(12):
        process = START.Process(target=_convert, args=(arguments,))
        process.start()
        time.sleep(rng.uniform(0, takes))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if target.exists():  # between the two renames there is none
            loaded = jitjax.load(target)
            jax.tree.map(np.testing.assert_array_equal, loaded.transformer, small.transformer)
    assert killed >= 6


@pytest.mark.parametrize("limit", [4_000, 30_000])
def test_no_room_leaves_nothing(folder, tmp_path, limit):
    target = tmp_path / "out"
    process = START.Process(
        target=_convert_with_little_room, args=([str(folder), "--out", str(target)], limit)
    )
    process.start()
    process.join()
    assert process.exitcode == 2
    assert not target.exists()
    assert not list(tmp_path.iterdir())
