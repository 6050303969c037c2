"""Files to be written: checks beforehand, and writes that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_unfinished: set[Path] = set()


def check_name(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """Raise an error unless a file could have a name.

    Args:
        path: the name.
        option: the option that gives it, for messages.
        suffixes: the endings that are possible, in lower case.

    Raises:
        ValueError: it has another ending.
        FileNotFoundError: its folder does not exist.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{option} is {str(path)!r}; expected a name that ends in {' or '.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{option} is {str(path)!r}; expected the folder {str(path.parent)!r} to exist"
        )


def check_replaceable(path: Path, option: str, *, overwrite: bool) -> None:
    """Raise `OSError` if there is something that may not be replaced.

    Args:
        path: the file.
        option: the option that names it, for messages.
        overwrite: whether files may be replaced.
    """
    if not exists(path):
        return
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{option}: {str(path)!r} exists and is not a file")
    if not overwrite:
        raise FileExistsError(
            f"{option}: {str(path)!r} exists; expected a new name, or --overwrite to replace it"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{option}: {str(path)!r} is read-only; expected another name")


def check_writable(folder: Path, option: str) -> None:
    """Raise `OSError` unless files can be made in `folder`, of which `option` is the source."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"{option}: no file can be made in the folder {str(folder)!r} ({error.strerror})"
        ) from error


def exists(path: Path) -> bool:
    """Whether there is something at `path`, even a symbolic link to nothing.

    Raises:
        OSError: there cannot be; for example, the name is too long.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def folder(path: Path) -> Path:
    """Return the folder of a file; of a symbolic link, that of the file that it points to."""
    return Path(os.path.realpath(path)).parent


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
