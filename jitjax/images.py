"""PNG files: names that are free, and writes that are complete or not there at all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jitjax.files import atomic_file


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
    with atomic_file(path, overwrite=overwrite) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=info)


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
