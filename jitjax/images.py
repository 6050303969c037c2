"""PNG files: names that are free, writes that are complete or not there at all, reading them."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jitjax import command, files
from jitjax.files import atomic_file

DEFAULT_OUT = Path("jitjax.png")
LEFTOVER_SECONDS = 60.0
"""Age from which an unfinished file is left over from a process that was killed."""


def to_pixels(image: np.ndarray, seed: int) -> np.ndarray:
    """Convert an image from [0, 1] to bytes; raise `ValueError` if its values are not finite."""
    finite = np.isfinite(image)
    if not finite.all():
        raise ValueError(
            f"the picture of seed {seed} is not written: {1 - finite.mean():.0%} of its values are "
            "not finite. Damaged weights, a dtype that overflows or an extreme --guidance do that; "
            "jitjax.denoise(..., check_finite=True) names the step"
        )
    return (image * 255).round().astype(np.uint8)


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


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files of processes that were killed, where nothing could do it."""
    for path in folder.glob(".????????.tmp"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                path.unlink()


def read_texts(path: Path) -> tuple[str | None, dict[str, Any] | None] | None:
    """Return the prompt and the settings that a PNG file stores.

    Returns:
        The two, None for one that the file does not have; or None if the file is damaged: it is no
        PNG file, ends too early, or one of its checksums is wrong.

    Raises:
        OSError: the file cannot be read, or there is none.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = dict(image.info)  # not `text`, which decodes the picture
            image.verify()
    except OSError as error:
        if error.errno is not None:  # else it is Pillow's word for damage
            raise
        return None
    except (SyntaxError, ValueError, EOFError, struct.error):
        return None
    try:
        settings = json.loads(texts["settings"])
    except (KeyError, ValueError, RecursionError):
        settings = None
    return texts.get("prompt"), settings if isinstance(settings, dict) else None


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


class Outputs:
    """The output files of one prompt, checked before the first picture is made.

    Attributes:
        paths: the files, one per seed.

    Raises:
        ValueError: --out has another suffix.
        OSError: an output exists and may not be replaced, or cannot be written.
    """

    def __init__(self, out: Path | None, seeds: Sequence[int], overwrite: bool) -> None:
        self._overwrite = overwrite
        is_default = out is None
        out = out or DEFAULT_OUT
        files.check_name(out, "--out", (".png",))
        self.paths = with_seeds(out, seeds)
        if is_default and not overwrite:
            candidates = (with_seeds(path, seeds) for path in numbered(out))
            self.paths = next(paths for paths in candidates if not any(map(files.exists, paths)))
        for path in self.paths:
            files.check_replaceable(path, "--out", overwrite=overwrite)
        for folder in set(map(files.folder, self.paths)):
            files.check_writable(folder, "--out")

    def write(self, i: int, image: np.ndarray, prompt: str, settings: dict[str, object]) -> Path:
        """Write picture `i`; return its path, a new one if another file has appeared there."""
        for path in numbered(self.paths[i]):
            try:
                write_png(path, image, prompt, settings, overwrite=self._overwrite)
            except FileExistsError:
                continue
            if path != self.paths[i]:
                command.note(f"jitjax: {str(self.paths[i])!r} has appeared meanwhile")
            return path
        raise AssertionError("unreachable: there is always another number")
