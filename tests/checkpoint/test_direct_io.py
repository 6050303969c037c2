"""Direct and cached writes give the same file, and errors are raised."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from jitjax.checkpoint import direct_io
from jitjax.checkpoint.direct_io import MIN_DIRECT_BYTES, PAGE, aligned_buffer, write_file

DIRECT = getattr(os, "O_DIRECT", 0)


def random_bytes(size: int) -> np.ndarray:
    buffer = aligned_buffer(size)
    buffer[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return buffer


LENGTHS = [0, 1, *(MIN_DIRECT_BYTES + extra for extra in (-1, 0, 1, 3 * PAGE))]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [0, 1])  # 1: the data is unaligned and written through the cache
@pytest.mark.parametrize("padding", [0, 5, PAGE])
def test_file_is_the_data_padded_with_zeros(tmp_path, length: int, offset: int, padding: int):
    data = random_bytes(length + offset)[offset:]
    path = tmp_path / "a" / "b" / "file"
    write_file(path, data, length + padding)
    assert path.read_bytes() == data.tobytes() + bytes(padding)


def test_buffer_is_aligned():
    for size in (0, 1, PAGE, MIN_DIRECT_BYTES + 7):
        buffer = aligned_buffer(size)
        assert len(buffer) == size
        assert buffer.ctypes.data % PAGE == 0


@pytest.mark.skipif(not DIRECT, reason="this operating system has no direct writes")
@pytest.mark.parametrize("supported", [True, False])
def test_large_data_is_written_directly_if_supported(tmp_path, monkeypatch, supported: bool):
    direct_calls, original_open = [], os.open

    def open_file(path, flags, mode):
        direct_calls.append(bool(flags & DIRECT))
        if flags & DIRECT and not supported:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original_open(path, flags & ~DIRECT, mode)  # the test's file system may lack it

    monkeypatch.setattr(direct_io.os, "open", open_file)
    data = random_bytes(MIN_DIRECT_BYTES + 10)
    write_file(tmp_path / "file", data, len(data))
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert direct_calls == [True, False]
    write_file(tmp_path / "small", data[:PAGE], PAGE)
    assert direct_calls == [True, False, False]


def test_full_disk_raises(tmp_path, monkeypatch):
    def write(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", random_bytes(2 * MIN_DIRECT_BYTES), 2 * MIN_DIRECT_BYTES)
