"""Writes memory to files past the kernel's own memory of them.

A checkpoint of gigabytes is written once and not read again soon. What the kernel would keep of it
costs a copy of every byte into fresh pages, half of all processor time of a conversion. Where a
system or a file system cannot write directly, files are written as usual.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

PAGE = 4096
"""Direct writes begin at multiples of this, in memory and in the file, and have such sizes."""
MIN_DIRECT_BYTES = 2**20
"""Smaller files are not worth it."""


def aligned_buffer(size: int) -> np.ndarray:
    """Memory of that many bytes, uint8, that can be written directly."""
    memory = np.empty(size + PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :][:size]


def write_file(path: Path, data: np.ndarray, size: int) -> None:
    """Write a new file; its folders are made.

    Args:
        path: the file.
        data: what it begins with: bytes, uint8 [at most `size`].
        size: of the file; zeros follow the data.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags, done = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0
    direct = getattr(os, "O_DIRECT", 0)
    if direct and len(data) >= MIN_DIRECT_BYTES and data.ctypes.data % PAGE == 0:
        try:
            done = _write(path, flags | direct, data[: len(data) // PAGE * PAGE], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what file systems say that cannot
                raise
    _write(path, flags, data[done:], done, size)


def _write(path: Path, flags: int, data: np.ndarray, start: int, size: int | None = None) -> int:
    """Write all of `data` from byte `start` of the file on; returns the byte after it."""
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
