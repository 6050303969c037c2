"""Writes of a single file that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_unfinished: set[Path] = set()


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Write a file under a temporary name that takes its place when the block ends.

    Args:
        path: the file. Of a symbolic link, the file that it points to.
        overwrite: replace the file if it exists; its permissions remain.

    Yields:
        the new file. It is deleted if the block raises.

    Raises:
        FileExistsError: the file exists and may not be replaced.
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    # A short random name: the length of `path` may be the longest that is allowed, and another
    # process may be writing the same file.
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    _unfinished.add(temporary)
    try:
        with temporary.open("xb") as file:
            yield file
        if overwrite:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, temporary)  # a file that was private remains so
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write: the disk is full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename a file, but never onto another one that exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with target.open("xb"):
            pass
        os.replace(source, target)


def remove_unfinished() -> None:
    """Delete the files that `atomic_file` has not finished, from another thread."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            path.unlink()
