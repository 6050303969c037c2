"""How a picture came about: `--trace` and `--animate`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitjax import command, files, viz
from jitjax.checkpoint import FluxParams
from jitjax.latents import token_grid
from jitjax.picture import Picture

if TYPE_CHECKING:
    from jitjax.sampler.trace import Trace

SUFFIXES = {"trace": (".png",), "animate": tuple(viz.ANIMATIONS)}
"""Option -> the endings that its file may have."""


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options, by `add_argument` of a parser or of a group."""
    add(
        "--trace",
        type=Path,
        metavar="FILE.png",
        help="also a figure of how it came about\nClean predictions with the anchors, importance, "
        'and the tokens of each step; it needs matplotlib: pip install "jitjax[viz]"',
    )
    add(
        "--animate",
        type=Path,
        metavar="FILE.webp",
        help="also an animation of it (or .gif)\nThe clean prediction of each step, the active "
        "anchors outlined",
    )


def outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Return the files that the options ask for, by option."""
    return {name: path for name in SUFFIXES if (path := getattr(args, name)) is not None}


def check_arguments(args: argparse.Namespace) -> None:
    """Raise an error unless the options fit the others, and their files can be written.

    Args:
        args: the arguments of the command.

    Raises:
        ValueError: there is no picture or several, a name ends in something else, or two files are
            the same one.
        OSError: a file exists and may not be replaced, or cannot be written.
        ImportError: matplotlib is missing.
    """
    given = outputs(args)
    for name, path in given.items():
        option = f"--{name}"
        if args.prompts is not None or args.save_conditioning is not None or args.count != 1:
            raise ValueError(
                f"{option} is for one picture; expected no --prompts, --save-conditioning or "
                "--count with it"
            )
        files.check_name(path, option, SUFFIXES[name])
        files.check_replaceable(path, option, overwrite=args.overwrite)
        files.check_writable(files.folder(path), option)
    if "trace" in given and importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--trace needs matplotlib: pip install "jitjax[viz]"')


def check_distinct(args: argparse.Namespace, picture: Path) -> None:
    """Raise `ValueError` if two outputs are one file.

    Args:
        args: the arguments of the command.
        picture: the file of the picture.
    """
    names: dict[str, str] = {os.path.realpath(picture): "the picture"}
    for name, path in outputs(args).items():
        other = names.setdefault(os.path.realpath(path), f"--{name}")
        if other != f"--{name}":
            raise ValueError(f"--{name} {path} is the file of {other} too; expected another name")


def write(args: argparse.Namespace, params: FluxParams, picture: Picture, trace: Trace) -> None:
    """Write the files that the options ask for, and report them.

    Args:
        args: the arguments of the command, checked.
        params: parameters; the autoencoder's decode the clean predictions.
        picture: what was drawn.
        trace: the record of its run.
    """
    grid = token_grid(picture.height, picture.width, params.config)
    if args.trace is not None:
        import matplotlib

        matplotlib.use("Agg")  # other backends may need a display
        figure = viz.show_trace(params, trace, grid)
        with files.atomic_file(args.trace, overwrite=args.overwrite) as file:
            figure.savefig(file, format="png")
        command.report(f"{args.trace}: the trace")
    if args.animate is not None:
        viz.animate(params, trace, grid, args.animate, overwrite=args.overwrite)
        command.report(f"{args.animate}: the animation")
