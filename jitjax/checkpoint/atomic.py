"""Writes of a folder that appear complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Create a folder beside `path` that replaces it when the block ends without an error.

    Yields:
        the new folder, empty, under a temporary name. It is deleted if the block raises.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false.
    """
    path = path.absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists; pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    new = work / "new"
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(work / "old")
        try:
            new.rename(path)
        except OSError:
            if (work / "old").exists():
                (work / "old").rename(path)
            raise
    finally:
        for _ in range(100):  # threads of a failed write may still create files here
            shutil.rmtree(work, ignore_errors=True)
            if not work.exists():
                break
            time.sleep(0.05)
