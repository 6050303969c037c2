"""Files are the same bytes whichever way they are written, and what fails is told."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from jitjax.checkpoint import direct_io
from jitjax.checkpoint.direct_io import MIN_DIRECT_BYTES, PAGE, aligned_buffer, write_file

DIRECT = getattr(os, "O_DIRECT", 0)


def numbers(size: int) -> np.ndarray:
    memory = aligned_buffer(size)
    memory[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return memory


LENGTHS = [0, 1, *(MIN_DIRECT_BYTES + more for more in (-1, 0, 1, 3 * PAGE))]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shift", [0, 1])  # of the memory: what is not aligned goes the usual way
@pytest.mark.parametrize("more", [0, 5, PAGE])
def test_data_and_then_zeros(tmp_path, length: int, shift: int, more: int):
    data = numbers(length + shift)[shift:]
    path = tmp_path / "a" / "b" / "file"
    write_file(path, data, length + more)
    assert path.read_bytes() == data.tobytes() + bytes(more)


def test_memory_is_aligned():
    for size in (0, 1, PAGE, MIN_DIRECT_BYTES + 7):
        memory = aligned_buffer(size)
        assert len(memory) == size
        assert memory.ctypes.data % PAGE == 0


@pytest.mark.skipif(not DIRECT, reason="this system has no direct writes")
@pytest.mark.parametrize("refused", [True, False])
def test_large_files_are_written_directly_or_else_as_usual(tmp_path, monkeypatch, refused: bool):
    asked, plain_open = [], os.open

    def open_file(path, flags, mode):
        asked.append(bool(flags & DIRECT))
        if flags & DIRECT and refused:
            raise OSError(errno.EINVAL, "this file system cannot")
        return plain_open(path, flags & ~DIRECT, mode)  # wherever the test runs

    monkeypatch.setattr(direct_io.os, "open", open_file)
    data = numbers(MIN_DIRECT_BYTES + 10)
    write_file(tmp_path / "file", data, len(data))
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert asked == [True, False]
    write_file(tmp_path / "small", data[:PAGE], PAGE)
    assert asked == [True, False, False]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def write(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", numbers(2 * MIN_DIRECT_BYTES), 2 * MIN_DIRECT_BYTES)
