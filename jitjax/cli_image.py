"""The picture to start from: `--image` and `--strength`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jitjax import command
from jitjax.config import FluxConfig
from jitjax.encode import nearest_side
from jitjax.latents import LARGEST_SIDE
from jitjax.picture import parse_size
from jitjax.task import DEFAULT_STRENGTH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="start from a picture instead of noise; its size is that of the result, or --size, to "
        "which it is resized. What is transparent becomes white",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="with --image, how far from it the result may be: the share of the steps that is run, "
        f"above 0, at most 1 (default: {DEFAULT_STRENGTH})",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` unless the options fit each other.

    Args:
        args: the arguments of the command; `strength` gets its default if there is an image.
    """
    if args.image is None:
        if args.strength is not None:
            raise ValueError("--strength is for --image; expected both or neither")
        return
    for name in ("prompts", "save_conditioning"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"there are --image and --{option}; expected one of them")
    if args.strength is None:
        args.strength = DEFAULT_STRENGTH
    if not 0 < args.strength <= 1:
        raise ValueError(f"--strength is {args.strength}; expected above 0, at most 1")


def read(
    path: Path, size: str | None, config: FluxConfig, *, option: str = "--image"
) -> np.ndarray:
    """Read a picture for `sample`.

    Its EXIF orientation is applied; grey, palettes, CMYK and 16 bits become RGB of 8 bits; what is
    transparent is laid over white. Of an animation it is the first picture.

    Args:
        path: the file, of any format that Pillow reads.
        size: what `--size` says; the picture is resized to it. None if it may not be resized.
        config: the model's configuration.
        option: the option that names the file, for messages.

    Returns:
        float32 [1, height, width, 3] in [0, 1].

    Raises:
        ValueError: the file is empty, broken, too large or no picture; or the size is not possible.
        OSError: the file cannot be read.
    """
    image = _open(path, option)
    wanted = image.size if size is None else parse_size(size)
    nearest = tuple(nearest_side(side, config) for side in wanted)
    if wanted != nearest:
        got = f"{option} {path} is {_text(wanted)} pixels" if size is None else f"--size is {size}"
        hint = "--size" if size is None else "the nearest is"
        resizes = " resizes it" if size is None else ""
        raise ValueError(
            f"{got}; expected multiples of {config.pixels_per_token} up to {LARGEST_SIDE}; "
            f"{hint} {_text(nearest)}{resizes}"
        )
    if image.size != wanted:
        command.note(f"{option}: resized from {_text(image.size)} to {_text(wanted)} pixels")
        image = image.resize(wanted, Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32)[None] / 255


def _open(path: Path, option: str) -> Image.Image:
    """Return the picture of a file as upright RGB of 8 bits."""
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{option} {path} is an empty file; expected a picture")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see below
            image = Image.open(file)
            if max(image.size) > LARGEST_SIDE:  # from the header, before memory is taken
                raise ValueError(
                    f"{option} {path} is {_text(image.size)} pixels; expected at most "
                    f"{LARGEST_SIDE} a side"
                )
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(
            f"{option} {path} is no picture that Pillow can read; expected PNG, JPEG, WebP, ..."
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{option} {path} has too many pixels; expected at most {LARGEST_SIDE} a side"
        ) from None
    except (OSError, SyntaxError, EOFError, IndexError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(f"{option} {path}: {error.strerror}") from None
        raise ValueError(f"{option} {path} is damaged: {error}") from None
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{option} {path} has 32 bits per channel (mode {image.mode}); expected 8 or 16"
        )
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            command.note(f"{option}: what is transparent becomes white")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
