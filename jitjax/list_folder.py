"""The folder for the pictures of a list: their files, and which of them are there already.

The name of a picture's file follows from its prompt and settings, and the file holds both. What is
made is therefore known without a record of its own, and wherever the line stands in the list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jitjax import command, files, images
from jitjax.picture import Picture

LONGEST_WORDS = 40
"""Characters of the prompt in a file's name."""


@dataclass(frozen=True)
class Wanted:
    """A picture, the line that asks for it, and its file."""

    line: int
    picture: Picture
    path: Path


def output_folder(out: Path | None, source: str) -> Path:
    """Return the folder for the pictures of a list.

    Args:
        out: the folder that was asked for.
        source: the list, "-" for standard input.

    Raises:
        OSError: it is a file, or in a folder that does not exist.
    """
    if out is None:
        out = Path("pictures" if source == "-" else f"{Path(source).stem}-pictures")
    if out.suffix.lower() == ".png":
        raise ValueError(f"--out is {str(out)!r}; expected a folder, because --prompts is given")
    if files.exists(out) and not out.is_dir():
        raise NotADirectoryError(f"--out is {str(out)!r}, a file; expected a folder")
    if not out.is_dir() and not out.parent.is_dir():
        raise FileNotFoundError(
            f"--out is {str(out)!r}; expected the folder {str(out.parent)!r} to exist"
        )
    return out


def file_name(picture: Picture) -> str:
    """Return the name of a picture's file: words of the prompt, the seed, and a hash of it all."""
    text = unicodedata.normalize("NFKD", picture.prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:LONGEST_WORDS].strip("-")
    identity = json.dumps([picture.prompt, picture.settings], sort_keys=True).encode()
    return f"{words or 'picture'}-{picture.seed}-{hashlib.sha256(identity).hexdigest()[:12]}.png"


def name_files(pictures: Sequence[tuple[int, Picture]], folder: Path) -> list[Wanted]:
    """Name the files; what a later line asks for again is left out, and told."""
    first: dict[Picture, int] = {}
    again = {line: picture for line, picture in pictures if first.setdefault(picture, line) != line}
    if again:
        line, picture = next(iter(again.items()))
        command.note(
            "jitjax: lines that ask for a picture of an earlier line, which is made once: "
            f"{len(again)}; for example line {line}, as line {first[picture]}"
        )
    return [Wanted(line, picture, folder / file_name(picture)) for picture, line in first.items()]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it: two runs of one list would make all its pictures twice.

    The system ends the lock with the process, however that ends.
    """
    is_new = not folder.is_dir()
    folder.mkdir(exist_ok=True)
    descriptor = None
    try:
        files.check_writable(folder, "--out")
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(
                    f"another run of jitjax is making pictures in {str(folder)!r}; expected it to "
                    "end first, or another -o (halves of a list, each with its own -o, share the "
                    "work)"
                ) from None
            except OSError:
                pass  # a file system without locks
        images.remove_leftovers(folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def is_made(item: Wanted, overwrite: bool) -> bool:
    """Whether the picture is there; a damaged file is told, and made again.

    Raises:
        FileExistsError: the file is another picture, and may not be replaced.
    """
    if not files.exists(item.path):
        return False
    if not item.path.is_file():
        raise FileExistsError(f"--out: {str(item.path)!r} exists and is not a file")
    texts = images.read_texts(item.path)
    if texts is None:
        command.note(f"jitjax: {str(item.path)!r} is damaged, and to be made again")
        return False
    if texts == (item.picture.prompt, item.picture.settings):
        return True
    if not overwrite:
        raise FileExistsError(
            f"--out: {str(item.path)!r} is not the picture of line {item.line}: it stores another "
            "prompt or other settings, or none; expected another -o, or --overwrite to replace it"
        )
    return False


def write(item: Wanted, image: np.ndarray, overwrite: bool) -> None:
    """Write a picture.

    Raises:
        ValueError: it has values that are not finite.
        OSError: it cannot be written.
    """
    pixels = images.to_pixels(image, item.picture.seed)
    texts = item.picture.prompt, item.picture.settings
    try:
        images.write_png(item.path, pixels, *texts, overwrite=overwrite)
    except FileExistsError:  # damaged, or it has appeared meanwhile
        found = images.read_texts(item.path)
        if found is None:
            images.write_png(item.path, pixels, *texts)
        elif found != texts:
            raise
