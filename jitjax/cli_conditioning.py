"""What the command loads and encodes: `--conditioning`, `--save-conditioning`, `--low-memory`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

import jitjax
from jitjax import command, files
from jitjax.checkpoint import PARTS, TEXT_ENCODERS, FluxParams
from jitjax.conditioning import Conditioning, read_conditioning

SUFFIX = ".safetensors"
DRAWING = tuple(part for part in PARTS if part not in TEXT_ENCODERS)
"""The parts that make a picture of a conditioning."""


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options, by `add_argument` of a parser or of a group."""
    add(
        "--low-memory",
        action="store_true",
        help="keep models on the device only while they run\nElse they are in host memory. The "
        "pictures are the same",
    )
    add(
        "--save-conditioning",
        type=Path,
        metavar="FILE",
        help="\nonly encode the prompt, and write the result to a file; needs no transformer",
    )
    add(
        "--conditioning",
        type=Path,
        metavar="FILE",
        help="\ndraw what --save-conditioning has written, in place of a prompt; needs no text "
        "encoders, which is for cards without room for them",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError` or `OSError` unless the options fit each other, and files can be written.

    Args:
        args: the arguments of the command.
    """
    path = args.save_conditioning
    if path is None:
        return
    if args.prompt is None or args.out is not None or args.count != 1:
        raise ValueError(
            "--save-conditioning makes no picture; expected a prompt with it, and no --out or "
            "--count"
        )
    option = "--save-conditioning"
    files.check_name(path, option, (SUFFIX,))
    files.check_replaceable(path, option, overwrite=args.overwrite)
    files.check_writable(files.folder(path), option)


def needed_parts(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the parts of the checkpoint that the command needs."""
    if args.save_conditioning:
        return TEXT_ENCODERS
    return DRAWING if args.conditioning else PARTS


def read(path: Path, option: str = "--conditioning") -> tuple[Conditioning, str]:
    """Read the file of an option; return the conditioning and its prompt, "" if unknown.

    Raises:
        ValueError: it is no such file, or has several prompts.
        FileNotFoundError: there is no file.
    """
    conditioning, prompts = read_conditioning(path)
    if (count := len(conditioning.text)) != 1:
        raise ValueError(
            f"{option} {path} has {count} prompts; expected one (in Python, jitjax.sample "
            "takes all)"
        )
    return conditioning, prompts[0] if prompts else ""


def save(args: argparse.Namespace, prompt: str) -> int:
    """Encode the prompt and write `--save-conditioning`; return the exit status."""
    params = jitjax.load(args.checkpoint, parts=TEXT_ENCODERS, quantise=args.quantise)
    path = args.save_conditioning
    jitjax.encode_prompt(params, prompt).save(path, prompts=[prompt], overwrite=args.overwrite)
    command.report(f"{path}: the encoded prompt")
    return 0


def load(
    args: argparse.Namespace,
    prompt: str,
    conditioning: Conditioning | None,
    negative: Conditioning | None,
) -> tuple[FluxParams, Conditioning, Conditioning | None]:
    """Load the models that draw, and encode the prompts unless they are encoded.

    With `--low-memory` the text encoders are gone before the others are read, so that neither the
    host nor the device holds all of them.
    """
    load_parts = partial(jitjax.load, args.checkpoint, quantise=args.quantise)
    if conditioning is not None:
        return load_parts(parts=DRAWING, low_memory=args.low_memory), conditioning, negative
    encoders = load_parts(parts=TEXT_ENCODERS) if args.low_memory else load_parts()
    encoded = jitjax.encode_prompt(encoders, prompt)
    if negative is None and args.negative is not None:
        negative = jitjax.encode_prompt(encoders, args.negative)
    if not args.low_memory:
        return encoders, encoded, negative
    jax.block_until_ready((encoded, negative))
    del encoders
    return load_parts(parts=DRAWING, low_memory=True), encoded, negative
