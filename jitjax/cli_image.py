"""Pictures that the result is made from: `--image`, `--strength`, `--mask`, `--control` and
`--reference`.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jitjax import command
from jitjax.config import FluxConfig
from jitjax.control import check_pictures
from jitjax.encode import nearest_side
from jitjax.latents import LARGEST_SIDE
from jitjax.picture import parse_size
from jitjax.task import DEFAULT_STRENGTH, INPAINTING_STRENGTH

GREY = 16
"""Largest difference between the channels of a grey pixel, of 255: JPEG makes small ones."""

REFERENCE_PIXELS = 1024 * 1024
"""Pixels to which a larger reference picture is scaled down: about those that Kontext has seen."""

FILES = ("image", "mask", "control", "reference")
"""Options that name the file of a picture; each is an argument of `sample`."""


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options, by `add_argument` of a parser or of a group."""
    add(
        "--image",
        type=Path,
        metavar="FILE",
        help="start from a picture instead of noise\nIts size is that of the result, or --size, to "
        "which it is resized. What is transparent becomes white",
    )
    add(
        "--strength",
        type=float,
        metavar="SHARE",
        help=f"how far from it, above 0 to 1 (default: {DEFAULT_STRENGTH})\nThe share of the steps "
        f"that is run (default with --mask: {INPAINTING_STRENGTH})",
    )
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="make --image new only where FILE is white\nInpainting: a grey picture of the same "
        "size, white where the result is new, black where it stays as it is, grey for soft edges",
    )
    add(
        "--control",
        type=Path,
        metavar="FILE",
        help="edges or depth, for FLUX.1 Canny and Depth\nTheir checkpoints need it: a picture of "
        "the size of the result, or --size, to which it is resized",
    )
    add(
        "--reference",
        type=Path,
        metavar="FILE",
        help="a picture to change, for FLUX.1 Kontext\nThe prompt says how. Its size is that of "
        "the result unless there is --size. It is resized, with a note, if it has more than 1024 "
        "x 1024 pixels or its sides are no multiples of 16",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` unless the options fit each other.

    Args:
        args: the arguments of the command; `strength` gets its default if there is an image.
    """
    if args.image is None:
        for name in ("strength", "mask"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is for --image; expected both or neither")
    given = [name for name in FILES if getattr(args, name) is not None]
    for name in ("prompts", "save_conditioning"):
        if given and getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"there are --{given[0]} and --{option}; expected one of them")
    if args.image is None:
        return
    if args.strength is None:
        args.strength = DEFAULT_STRENGTH if args.mask is None else INPAINTING_STRENGTH
    if not 0 < args.strength <= 1:
        raise ValueError(f"--strength is {args.strength}; expected above 0, at most 1")


def check_model(args: argparse.Namespace, config: FluxConfig) -> None:
    """Raise `ValueError` unless the checkpoint gets the pictures that it needs, and no others."""
    given = [name for name in FILES if getattr(args, name) is not None]
    check_pictures(given, config.transformer, spell=lambda name: f"--{name}")


def files(args: argparse.Namespace) -> dict[str, str]:
    """Return the names of the pictures' files by option, as `Picture` stores them."""
    return {name: str(path) for name in FILES if (path := getattr(args, name)) is not None}


def read_all(
    args: argparse.Namespace, config: FluxConfig
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Read the pictures of the options.

    Args:
        args: the arguments of the command, checked.
        config: the model's configuration.

    Returns:
        Arguments of `sample` by name; and the width and height that they give the result, None if
        `--size` or nothing does.

    Raises:
        ValueError: as `read` and `read_with_mask`; or `--control` has another size than `--image`.
        OSError: a file cannot be read.
    """
    task: dict[str, Any] = {"strength": args.strength}
    if args.mask is not None:
        task["image"], task["mask"] = read_with_mask(args.image, args.mask, args.size, config)
    elif args.image is not None:
        task["image"] = read(args.image, args.size, config)
    if args.control is not None:
        task["control"] = read(args.control, args.size, config, option="--control")
    if args.reference is not None:
        task["reference"] = read_reference(args.reference, config)
        if not config.uses_reference:  # which also stands for unknown
            command.note(
                f"--checkpoint {args.checkpoint} does not say that it is FLUX.1 Kontext; other "
                "models make little of --reference"
            )
    sizes = [
        (task[name].shape[2], task[name].shape[1])
        for name in ("image", "control", "reference")
        if name in task
    ]
    if args.image is not None and args.control is not None and sizes[0] != sizes[1]:
        raise ValueError(
            f"--control {args.control} is {_text(sizes[1])} pixels; expected {_text(sizes[0])}, as "
            "--image, or --size, which resizes both"
        )
    return task, sizes[0] if sizes and args.size is None else None


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
    return _pixels(_resized(_open(path, option), path, size, config, option))


def read_reference(path: Path, config: FluxConfig) -> np.ndarray:
    """Read a reference picture for `sample`.

    Above `REFERENCE_PIXELS` it is scaled down to about them; its sides become the nearest multiples
    of 16. A note says so.

    Args:
        path: the file, see `read`.
        config: the model's configuration.

    Returns:
        float32 [1, height, width, 3] in [0, 1].

    Raises:
        ValueError, OSError: as `read`.
    """
    image = _open(path, "--reference")
    scale = min(1.0, math.sqrt(REFERENCE_PIXELS / (image.width * image.height)))
    width, height = (nearest_side(round(side * scale), config) for side in image.size)
    return _pixels(_resize(image, (width, height), "--reference"))


def read_with_mask(
    path: Path, mask_path: Path, size: str | None, config: FluxConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Read a picture and a mask of it for `sample`.

    Args:
        path: the file of the picture, see `read`.
        mask_path: the file of the mask: grey, of the size of the picture, or of that of the result
            if `size` says so. It is resized with the picture.
        size: what `--size` says; None if nothing may be resized.
        config: the model's configuration.

    Returns:
        The picture as from `read`; and the mask, float32 [1, height, width] in [0, 1].

    Raises:
        ValueError: as `read`; or the mask has colours, transparency or another size, or is black.
        OSError: a file cannot be read.
    """
    picture, mask = _open(path, "--image"), _open(mask_path, "--mask", alpha=False)
    image = _resized(picture, path, size, config, "--image")
    sizes = dict.fromkeys((picture.size, image.size))
    if mask.size not in sizes:
        raise ValueError(
            f"--mask {mask_path} is {_text(mask.size)} pixels; expected "
            f"{' or '.join(map(_text, sizes))}, as --image"
        )
    channels = np.asarray(mask, np.int16)
    if np.ptp(channels, axis=2).max() > GREY:
        raise ValueError(
            f"--mask {mask_path} has colours; expected white where the result is new, and black"
        )
    grey = mask.convert("L")
    if mask.size != image.size:
        # Without the overshoots of Lanczos, which would make a part of the rest new.
        grey = grey.resize(image.size, Image.Resampling.BILINEAR)
    values = _pixels(grey)
    if not values.any():
        raise ValueError(
            f"--mask {mask_path} is black, so there is nothing to do; expected white where the "
            "result is new"
        )
    if grey_share := ((values > 0) & (values < 1)).mean():
        command.note(f"--mask: {grey_share:.1%} of it is grey, where given and new pixels mix")
    return _pixels(image), values


def _resized(
    image: Image.Image, path: Path, size: str | None, config: FluxConfig, option: str
) -> Image.Image:
    """Return a picture in the size that the result will have."""
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
    return _resize(image, wanted, option)


def _resize(image: Image.Image, wanted: tuple[int, int], option: str) -> Image.Image:
    """Return a picture in a size, with a note if it had another."""
    if image.size == wanted:
        return image
    command.note(f"{option}: resized from {_text(image.size)} to {_text(wanted)} pixels")
    return image.resize(wanted, Image.Resampling.LANCZOS)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)[None] / 255


def _open(path: Path, option: str, *, alpha: bool = True) -> Image.Image:
    """Return the picture of a file as upright RGB of 8 bits; `alpha`: it may be transparent."""
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
            if not alpha:
                raise ValueError(
                    f"{option} {path} is transparent in places; expected grey from black to white, "
                    "without an alpha channel"
                )
            command.note(f"{option}: what is transparent becomes white")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
