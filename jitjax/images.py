"""PNG files: names that are free, and writes that are complete or not there at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

_unfinished: set[Path] = set()


def write_png(
    path: Path,
    image: np.ndarray,
    prompt: str,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = True,
) -> None:
    """Write a PNG file with its prompt and settings, atomically: `path` is never a partial file.

    Args:
        path: the file. Of a symbolic link, the file that it points to.
        image: uint8 [height, width, 3].
        prompt, settings: for the text chunks `prompt` and `settings` (JSON).
        overwrite: replace the file if it exists; its permissions remain.

    Raises:
        FileExistsError: the file exists and may not be replaced.
        ValueError: a setting is not finite, which JSON cannot express.
        OSError: the file cannot be written.
    """
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(dict(settings), allow_nan=False))
    info.add_text("Software", "jitjax")
    path = Path(os.path.realpath(path))
    # A short random name: the length of `path` may be the longest that is allowed, and another
    # process may be writing the same file.
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    _unfinished.add(temporary)
    try:
        with temporary.open("xb") as file:
            Image.fromarray(image).save(file, format="PNG", pnginfo=info)
        if overwrite:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, temporary)  # a picture that was private remains so
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
    """Delete the files that `write_png` has not finished, from another thread."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            path.unlink()


def numbered(path: Path) -> Iterator[Path]:
    """Yield `path`, and then the same with -1, -2, ... after the stem."""
    yield path
    for number in itertools.count(1):
        yield path.with_stem(f"{path.stem}-{number}")


def with_seeds(path: Path, seeds: Sequence[int]) -> list[Path]:
    """Return `path` for one seed; for several, a path for each, with the seed after the stem."""
    if len(seeds) == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{seed}") for seed in seeds]
