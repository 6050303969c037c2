"""A conversion that meets damage: found, told, and never a checkpoint that `load` accepts."""

from __future__ import annotations

import multiprocessing
import os
import random
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
from jitjax.checkpoint import PARTS, storage
from jitjax.convert.__main__ import main
from jitjax.convert.sources import diffusers_folder
from jitjax.convert.targets.checkpoint import Recycled

# orbax leaves reads unfinished where it meets damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["jitjax.convert.__main__", "orbax.checkpoint.experimental.v1"])

# A shell in a mount namespace of its own, where the working directory is a file system of one
# megabyte: `ON_ITS_OWN_DISK + [command]`. It is gone when the command ends.
ON_ITS_OWN_DISK = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
ON_ITS_OWN_DISK += ['mount -t tmpfs -o size=1m tmpfs . && cd "$PWD" && eval "$0"']


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
    return sorted(p for p in (path / "params").rglob("c/**/*") if p.is_file())


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("whole", [0, diffusers_folder.WHOLE])
def test_pieces_chunks_and_groups_make_no_difference(folder, small, tmp_path, monkeypatch, whole):
    """Sizes that make small leaves go the way of large ones; and orbax reads it without us."""
    monkeypatch.setattr(diffusers_folder, "WHOLE", whole)
    for name in ("MAX_PENDING_BYTES", "MAX_GROUP_BYTES", "MAX_CHUNK_BYTES"):
        monkeypatch.setattr(storage, name, 2000)
    made = tmp_path / "made"
    assert main([str(folder), "--dtype", "auto", "--out", str(made)]) == 0
    assert main(["--verify", str(made)]) == 0
    loaded = jitjax.load(made)
    for part in PARTS:
        expected = getattr(small, part)
        jax.tree.map(np.testing.assert_array_equal, getattr(loaded, part), expected)
        own = ocp.load(made / "params" / part)
        jax.tree.map(np.testing.assert_array_equal, own, expected)
        stored = ocp.metadata(made / "params" / part).metadata
        jax.tree.map(_assert_described, stored, expected)
    assert len(data_files(made)) > 1.2 * len(jax.tree.leaves(small))
    assert max(path.stat().st_size for path in data_files(made)) <= 2000


def _assert_described(stored, expected) -> None:
    assert stored.shape == stored.storage_metadata.write_shape == expected.shape


@given(shape=st.lists(st.integers(1, 60), min_size=1, max_size=4).map(tuple), itemsize=st.just(2))
def test_a_chunk_is_one_range_of_memory(shape, itemsize):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "MAX_CHUNK_BYTES", 500)
        chunk = storage.chunk_shape(shape, itemsize)
    assert itemsize * np.prod(chunk) <= 500
    numbers = np.arange(np.prod(shape)).reshape(shape)[tuple(slice(n) for n in chunk)]
    np.testing.assert_array_equal(numbers.reshape(-1), np.arange(np.prod(chunk)))
    cut = next((axis for axis, n in enumerate(chunk) if n < shape[axis]), None)
    last = max((axis for axis, n in enumerate(chunk) if n < shape[axis]), default=None)
    if last is not None:  # one more row would not fit, or there would be a gap
        more = [*chunk[:last], chunk[last] + 1, *chunk[last + 1 :]]
        assert itemsize * np.prod(more) > 500 or cut != last


def test_memory_is_recycled_when_nothing_looks_at_it_any_more():
    empty = Recycled()
    first = empty((4, 2**19), np.uint16)
    place, view = first.ctypes.data, first.view(np.float16)[1:].T
    del first
    second = empty((2**22,), np.uint8)
    assert second.nbytes == view.nbytes // 3 * 4
    assert not np.shares_memory(second, view)
    del view
    third = empty((3, 2**18), np.float32)  # smaller than what is free
    assert third.ctypes.data == place
    assert third.shape == (3, 2**18)
    assert third.dtype == np.float32
    assert third.flags.c_contiguous
    assert third.flags.writeable
    assert empty((2, 0), np.float32).shape == (2, 0)


def test_a_device_array_is_compared_in_pieces(unchecked, monkeypatch):
    """As one of a GPU would be: no slice is larger than a chunk, and the digest is the same."""
    monkeypatch.setattr(storage, "MAX_CHUNK_BYTES", 500)
    taken = []

    class OnDevice(np.ndarray):
        is_fully_addressable = True

        def devices(self):
            return [SimpleNamespace(platform="gpu")]

        def __getitem__(self, rows):
            taken.append(rows)
            return super().__getitem__(rows).view(np.ndarray)

    numbers = np.arange(7 * 50, dtype=np.float32).reshape(7, 50)
    whole = storage.Digest(numbers.shape, numbers.dtype)
    whole.update(numbers)
    assert not storage.compare_digest(numbers.view(OnDevice), "a", {"a": whole.hexdigest()})
    assert taken == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert storage.compare_digest(numbers.view(OnDevice), "a", {"a": "0"}) == (
        "differs from what was written"
    )


def test_verify_finds_nothing_where_nothing_is(made, small, capsys):
    loaded = jitjax.load(made)
    jax.tree.map(np.testing.assert_array_equal, loaded.transformer, small.transformer)
    assert main(["--verify", str(made)]) == 0
    assert "all arrays are as written; 4 source files as they were" in capsys.readouterr().out
    assert main([str(made), "--out", str(made / "again")]) == 2
    assert "is a jitjax checkpoint already" in capsys.readouterr().err


def test_verify_finds_every_flipped_bit_of_an_array(made, capsys):
    rng = random.Random(0)
    kernel = np.asarray(jitjax.load(made).transformer["image_in"]["kernel"])
    (path,) = (p for p in data_files(made) if kernel.tobytes() in p.read_bytes())
    content = path.read_bytes()
    begin = content.find(kernel.tobytes())
    expected = "transformer/image_in/kernel differs from what was written"
    for _ in range(3):
        flip(path, begin + rng.randrange(kernel.nbytes), rng.randrange(8))
        assert main(["--verify", str(made)]) == 1
        told = capsys.readouterr().err
        assert expected in told
        assert "1 arrays are damaged" in told
        with pytest.raises(ValueError, match=expected):
            jitjax.load(made)
        jitjax.load(made, check=False)
        path.write_bytes(content)
    assert main(["--verify", str(made)]) == 0


@pytest.mark.parametrize("part", PARTS)
def test_a_truncated_file_is_found_by_load_and_by_verify(made, part):
    files = [p for p in data_files(made) if p.is_relative_to(made / "params" / part)]
    path = max(files, key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["--verify", str(made)]) == 1
    with pytest.raises(ValueError, match=f"1 arrays are damaged.*\n  {part}/.*cannot be read"):
        jitjax.load(made)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_is_gone_is_found_by_load_and_by_verify(made, part):
    path = next(p for p in data_files(made) if p.is_relative_to(made / "params" / part))
    path.unlink()
    assert main(["--verify", str(made)]) == 1
    with pytest.raises(ValueError, match=f"1 arrays .*\n  {part}/.*cannot be read.*is missing"):
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
    takes = 0.0
    for _ in range(2):  # the first also starts the server of processes
        began = time.monotonic()
        whole = START.Process(target=_convert, args=(arguments,))
        whole.start()
        whole.join()
        takes = time.monotonic() - began
        assert whole.exitcode == 0
    rng, killed = random.Random(1), 0
    for _ in range(100):  # some end before they are killed
        process = START.Process(target=_convert, args=(arguments,))
        process.start()
        time.sleep(rng.uniform(0, takes))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if target.exists():  # between the two renames there is none
            loaded = jitjax.load(target)
            jax.tree.map(np.testing.assert_array_equal, loaded.transformer, small.transformer)
        if killed == 12:
            break
    assert killed == 12


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


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*ON_ITS_OWN_DISK, "true"], capture_output=True).returncode != 0,
    reason="needs Linux with user namespaces, to mount a file system without being root",
)
def test_a_full_disk_leaves_nothing(folder, tmp_path):
    """A file system of one megabyte, really full."""
    convert = [sys.executable, "-m", "jitjax.convert", str(folder), "--out", "out"]
    found = subprocess.run(
        [*ON_ITS_OWN_DISK, f"{shlex.join(convert)}; echo $?; ls -A"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in found.stderr
    assert found.stdout.split() == ["2"]  # the exit status, and no file
