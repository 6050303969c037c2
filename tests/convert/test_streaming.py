"""Streaming conversion: splitting does not change the result, and damage is always detected."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jitjax
from jitjax.checkpoint import PARTS, array_layout, array_reader, array_writer
from jitjax.convert.__main__ import main
from jitjax.convert.sources import diffusers_folder
from jitjax.convert.targets.checkpoint import ArrayPool

# orbax leaves reads unfinished if a file is damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SOME_PARTS = ["--parts", "transformer", "clip"]

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["jitjax.convert.__main__", "orbax.checkpoint.experimental.v1"])

# `ON_SMALL_DISK + [command]` runs a command in a separate mount namespace, where the working
# directory is a file system of one megabyte. The file system disappears when the command ends.
ON_SMALL_DISK = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
ON_SMALL_DISK += ['mount -t tmpfs -o size=1m tmpfs . && cd "$PWD" && eval "$0"']


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory) -> Path:
    """A diffusers folder with 2 MB of weights."""
    path = tmp_path_factory.mktemp("source") / "FLUX"
    jitjax.save(small, path.with_name("saved"))
    assert main([str(path.with_name("saved")), "--to-diffusers", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory) -> Path:
    """A checkpoint converted from `folder`."""
    target = tmp_path_factory.mktemp("converted") / "checkpoint"
    assert main([str(folder), "--dtype", "auto", "--out", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def converted_parts(folder, tmp_path_factory) -> Path:
    """A checkpoint converted from two models of `folder`, which takes less time to read."""
    target = tmp_path_factory.mktemp("converted") / "parts"
    arguments = [str(folder), *SOME_PARTS, "--dtype", "auto", "--out", str(target)]
    assert main(arguments) == 0
    return target


@pytest.fixture
def checkpoint(converted, tmp_path) -> Path:
    """A copy of `converted`, which a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "checkpoint"))


def data_files(path: Path) -> list[Path]:
    """Return the files with array values, sorted."""
    return sorted(p for p in (path / "params").rglob("c/**/*") if p.is_file())


def flip_bit(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split_bytes", "parts"), [(0, PARTS), (diffusers_folder.SPLIT_BYTES, ("transformer", "t5"))]
)
def test_splitting_does_not_change_the_result(
    folder, small, tmp_path, monkeypatch, split_bytes, parts
):
    """Small limits split small leaves like large ones; orbax alone reads the same arrays."""
    monkeypatch.setattr(diffusers_folder, "SPLIT_BYTES", split_bytes)
    monkeypatch.setattr(array_layout, "MAX_CHUNK_BYTES", 2000)
    monkeypatch.setattr(array_writer, "MAX_PENDING_BYTES", 2000)
    monkeypatch.setattr(array_reader, "MAX_GROUP_BYTES", 8000)  # each group takes time
    checkpoint = tmp_path / "checkpoint"
    arguments = [str(folder), "--parts", *parts, "--dtype", "auto", "--out", str(checkpoint)]
    assert main(arguments) == 0
    assert main(["--verify", str(checkpoint)]) == 0
    loaded = jitjax.load(checkpoint)
    expected_parts = {part: getattr(small, part) for part in parts}
    for part, expected in expected_parts.items():
        jax.tree.map(np.testing.assert_array_equal, getattr(loaded, part), expected)
        loaded_by_orbax = ocp.load(checkpoint / "params" / part)
        jax.tree.map(np.testing.assert_array_equal, loaded_by_orbax, expected)
        metadata = ocp.metadata(checkpoint / "params" / part).metadata
        jax.tree.map(_assert_shape_in_metadata, metadata, expected)
    assert len(data_files(checkpoint)) > 1.2 * len(jax.tree.leaves(expected_parts))
    assert max(path.stat().st_size for path in data_files(checkpoint)) <= 2000


def _assert_shape_in_metadata(metadata, expected) -> None:
    assert metadata.shape == metadata.storage_metadata.write_shape == expected.shape


@given(shape=st.lists(st.integers(1, 60), min_size=1, max_size=4).map(tuple), itemsize=st.just(2))
def test_chunks_are_contiguous_in_memory(shape, itemsize):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_layout, "MAX_CHUNK_BYTES", 500)
        chunk = array_layout.chunk_shape(shape, itemsize)
    assert itemsize * np.prod(chunk) <= 500
    numbers = np.arange(np.prod(shape)).reshape(shape)[tuple(slice(n) for n in chunk)]
    np.testing.assert_array_equal(numbers.reshape(-1), np.arange(np.prod(chunk)))
    first_split = next((axis for axis, n in enumerate(chunk) if n < shape[axis]), None)
    last_split = max((axis for axis, n in enumerate(chunk) if n < shape[axis]), default=None)
    if last_split is not None:  # a larger chunk exceeds the limit or is not contiguous
        larger = [*chunk[:last_split], chunk[last_split] + 1, *chunk[last_split + 1 :]]
        assert itemsize * np.prod(larger) > 500 or first_split != last_split


def test_array_pool_reuses_memory_without_views():
    empty = ArrayPool()
    first = empty((4, 2**19), np.uint16)
    address, view = first.ctypes.data, first.view(np.float16)[1:].T
    del first
    second = empty((2**22,), np.uint8)
    assert second.nbytes == view.nbytes // 3 * 4
    assert not np.shares_memory(second, view)
    del view
    third = empty((3, 2**18), np.float32)  # smaller than the free memory
    assert third.ctypes.data == address
    assert third.shape == (3, 2**18)
    assert third.dtype == np.float32
    assert third.flags.c_contiguous
    assert third.flags.writeable
    assert empty((2, 0), np.float32).shape == (2, 0)


def test_device_array_is_compared_in_pieces(unchecked, monkeypatch):
    """For a fake GPU array, no slice is larger than a chunk, and the digest is the same."""
    monkeypatch.setattr(array_layout, "MAX_CHUNK_BYTES", 500)
    slices = []

    class OnDevice(np.ndarray):
        is_fully_addressable = True

        def devices(self):
            return [SimpleNamespace(platform="gpu")]

        def __getitem__(self, rows):
            slices.append(rows)
            return super().__getitem__(rows).view(np.ndarray)

    numbers = np.arange(7 * 50, dtype=np.float32).reshape(7, 50)
    digest = array_layout.Digest(numbers.shape, numbers.dtype)
    digest.update(numbers)
    assert not array_reader.compare_digest(numbers.view(OnDevice), "a", {"a": digest.hexdigest()})
    assert slices == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert array_reader.compare_digest(numbers.view(OnDevice), "a", {"a": "0"}) == (
        "differs from what was written"
    )


def test_verify_of_an_intact_checkpoint(converted, small, capsys):
    loaded = jitjax.load(converted, parts=("transformer",))
    jax.tree.map(np.testing.assert_array_equal, loaded.transformer, small.transformer)
    assert main(["--verify", str(converted)]) == 0
    assert "all arrays are intact; source files: 4 unchanged\n" in capsys.readouterr().out
    assert main([str(converted), "--out", str(converted / "again")]) == 2
    assert "is already a jitjax checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_verify_and_load_detect_a_flipped_bit(converted_parts, tmp_path, capsys):
    checkpoint = Path(shutil.copytree(converted_parts, tmp_path / "checkpoint"))
    rng = random.Random(0)
    kernel = np.asarray(jitjax.load(checkpoint).transformer["image_in"]["kernel"])
    (path,) = (p for p in data_files(checkpoint) if kernel.tobytes() in p.read_bytes())
    content = path.read_bytes()
    begin = content.find(kernel.tobytes())
    expected = "transformer/image_in/kernel differs from what was written"
    for _ in range(3):
        flip_bit(path, begin + rng.randrange(kernel.nbytes), rng.randrange(8))
        assert main(["--verify", str(checkpoint)]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert "1 arrays are damaged" in error
        with pytest.raises(ValueError, match=expected):
            jitjax.load(checkpoint)
        jitjax.load(checkpoint, check=False)
        path.write_bytes(content)
    assert main(["--verify", str(checkpoint)]) == 0


def test_verify_and_load_detect_truncated_and_missing_files(checkpoint, capsys):
    """In each part, the largest file is cut, and the first file of another array is removed."""
    expected = []
    for part in PARTS:
        state = checkpoint / "params" / part / "state"
        files = [path for path in data_files(checkpoint) if path.is_relative_to(state)]
        cut = max(files, key=lambda path: path.stat().st_size)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        array = cut.relative_to(state).parts[0]
        missing = next(path for path in files if not path.is_relative_to(state / array))
        missing.unlink()
        removed = missing.relative_to(state).parts[0]
        for name, problem in ((array, "cannot be read"), (removed, "cannot be read.*is missing")):
            expected.append(f"  {part}/{name.replace('.', '/')} {problem}")
    assert main(["--verify", str(checkpoint)]) == 1
    with pytest.raises(ValueError, match="8 arrays are damaged") as caught:
        jitjax.load(checkpoint)
    for message in (capsys.readouterr().err, str(caught.value)):
        for line in expected:
            assert re.search(line, message), (line, message)


def test_verify_detects_changed_and_missing_source_files(folder, converted_parts, capsys):
    weights = folder / "text_encoder" / "model.safetensors"
    content = weights.read_bytes()
    flip_bit(weights, len(content) - 5, 3)
    try:
        assert main(["--verify", str(converted_parts)]) == 1
        assert f"source files changed since the conversion: {weights}" in capsys.readouterr().err
        weights.unlink()
        assert main(["--verify", str(converted_parts)]) == 0
        assert "source files: 1 unchanged, 1 missing" in capsys.readouterr().out
    finally:
        weights.write_bytes(content)


def _convert(arguments: list[str]) -> None:
    os._exit(main(arguments))


def _convert_with_file_size_limit(arguments: list[str], limit: int) -> None:
    # stderr under pytest is a file, and the limit would apply to it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os._exit(main(arguments))


@pytest.mark.slow
def test_killed_conversions_leave_no_partial_checkpoint(folder, small, tmp_path):
    """Twelve conversions are killed at random moments."""
    target = tmp_path / "killed"
    arguments = [str(folder), *SOME_PARTS, "--dtype", "auto", "--overwrite", "--out", str(target)]
    duration = 0.0
    for _ in range(2):  # the first also starts the fork server
        start = time.monotonic()
        process = FORKSERVER.Process(target=_convert, args=(arguments,))
        process.start()
        process.join()
        duration = time.monotonic() - start
        assert process.exitcode == 0
    rng, killed = random.Random(1), 0
    for _ in range(100):  # some processes end before they are killed
        process = FORKSERVER.Process(target=_convert, args=(arguments,))
        process.start()
        time.sleep(rng.uniform(0, duration))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if target.exists():  # it does not exist between the two renames
            loaded = jitjax.load(target)
            jax.tree.map(np.testing.assert_array_equal, loaded.transformer, small.transformer)
        if killed == 12:
            break
    assert killed == 12


@pytest.mark.parametrize("limit", [4_000, 30_000])
def test_failed_writes_leave_no_files(folder, tmp_path, limit):
    target = tmp_path / "out"
    process = FORKSERVER.Process(
        target=_convert_with_file_size_limit,
        args=([str(folder), "--out", str(target)], limit),
    )
    process.start()
    process.join()
    assert process.exitcode == 2
    assert not target.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*ON_SMALL_DISK, "true"], capture_output=True).returncode != 0,
    reason="needs Linux with user namespaces to mount a file system without root",
)
def test_full_disk_leaves_no_files(folder, tmp_path):
    """The disk is a real file system of one megabyte."""
    convert = [sys.executable, "-m", "jitjax.convert", str(folder), "--out", "out"]
    result = subprocess.run(
        [*ON_SMALL_DISK, f"{shlex.join(convert)}; echo $?; ls -A"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in result.stderr
    assert result.stdout.split() == ["2"]  # the exit status, and no files
