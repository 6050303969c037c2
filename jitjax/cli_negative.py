"""What the picture is not to show: `--negative`, `--negative-conditioning`, `--true-guidance`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitjax.negative import DEFAULT_TRUE_GUIDANCE
from jitjax.prompt_list import read_argument


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options, by `add_argument` of a parser or of a group."""
    add(
        "--negative",
        metavar="TEXT",
        help="what it is not to show\nEach step then runs the model twice",
    )
    add(
        "--negative-conditioning",
        type=Path,
        metavar="FILE",
        help="\nthe same, as --save-conditioning has written it",
    )
    add(
        "--true-guidance",
        type=float,
        metavar="SCALE",
        help="\nhow far to move away from the negative prompt, or from the empty one, 1 or more "
        f"(default: {DEFAULT_TRUE_GUIDANCE:g} with a negative prompt, else off)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` unless the options fit each other and are possible.

    Args:
        args: the arguments of the command; `negative` becomes "" if there is only a scale, and
            `true_guidance` gets its default if there is a negative prompt.
    """
    names = ("negative", "negative_conditioning", "true_guidance")
    given = [name for name in names if getattr(args, name) is not None]
    scale = args.true_guidance
    if scale is not None and not (math.isfinite(scale) and scale >= 1):
        raise ValueError(f"--true-guidance is {scale}; expected a finite number of 1 or more")
    if given and args.save_conditioning is not None:
        option = given[0].replace("_", "-")
        raise ValueError(
            f"--save-conditioning makes no picture; expected no --{option} with it (encode the "
            "negative prompt in the same way, for --negative-conditioning)"
        )
    if given[:2] == ["negative", "negative_conditioning"]:
        raise ValueError("there are --negative and --negative-conditioning; expected one of them")
    if args.negative_conditioning is not None and args.prompts is not None:
        raise ValueError("there are --negative-conditioning and --prompts; expected --negative")
    encodes = args.negative_conditioning is None and given
    if encodes and args.conditioning is not None:
        raise ValueError(
            "--conditioning runs without text encoders, which --negative and --true-guidance need; "
            "expected --negative-conditioning FILE, from --save-conditioning"
        )
    if args.negative is not None:
        args.negative = read_argument(args.negative, "--negative")
    elif encodes:
        args.negative = ""
    if scale is None and (given or args.prompts is not None):  # lines may have one
        args.true_guidance = DEFAULT_TRUE_GUIDANCE
