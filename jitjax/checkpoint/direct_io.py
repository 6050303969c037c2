"""Writes files directly (`O_DIRECT`), bypassing the kernel's page cache.

A checkpoint of gigabytes is written once and not read again soon. Caching it costs a copy of every
byte into fresh pages, half of all processor time of a conversion. If the operating system or the
file system does not support direct writes, files are written through the cache.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

PAGE = 4096
"""Direct writes need addresses, file offsets and sizes that are multiples of this."""
MIN_DIRECT_BYTES = 2**20
"""Smaller data is written through the cache; direct writes are not worth it there."""


_may_write = threading.Event()
_may_write.set()


def stop_writing() -> None:
    """Let threads wait for ever before their next file; only right before the process ends."""
    _may_write.clear()


def aligned_buffer(size: int) -> np.ndarray:
    """Return an uninitialised uint8 array of `size` bytes, aligned for direct writes."""
    memory = np.empty(size + PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :][:size]


def write_file(path: Path, data: np.ndarray, size: int) -> None:
    """Write a new file and create its parent folders.

    Args:
        path: the file.
        data: uint8 [at most `size`], the beginning of the file.
        size: size of the file in bytes; zeros fill the rest.

    Raises:
        OSError: the file cannot be written.
    """
    _may_write.wait()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags, done = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0
    direct = getattr(os, "O_DIRECT", 0)
    if direct and len(data) >= MIN_DIRECT_BYTES and data.ctypes.data % PAGE == 0:
        try:
            done = _write(path, flags | direct, data[: len(data) // PAGE * PAGE], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system does not support O_DIRECT
                raise
    _write(path, flags, data[done:], done, size)


def _write(path: Path, flags: int, data: np.ndarray, start: int, size: int | None = None) -> int:
    """Write `data` at byte `start` of the file; return the position after it."""
    file = os.open(path, flags, 0o666)
    try:
        os.lseek(file, start, os.SEEK_SET)
        done = 0
        while done < len(data):
            done += os.write(file, data[done:].data)
        if size is not None:
            os.ftruncate(file, size)
    finally:
        os.close(file)
    return start + done
