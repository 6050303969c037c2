"""`jitjax convert`, or `python -m jitjax.convert`: FLUX's weights to checkpoints, and back."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from jitjax import command, startup
from jitjax.arguments import Parser
from jitjax.checkpoint import PARTS, check_new_checkpoint, verify
from jitjax.checkpoint.atomic import remove_unfinished
from jitjax.loading import load
from jitjax.models.quantised import KINDS

from .sources.hub import fetch, is_repository
from .sources.single_files import SCHEDULES, open_sources
from .targets.checkpoint import compare_sources, write_checkpoint
from .targets.diffusers_folder import check_complete, check_new_folder, write_folder

DTYPES = {
    "auto": None,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float32": jnp.float32,
}

PROG = "python -m jitjax.convert"

DESCRIPTION = """\
Convert FLUX's weights to a jitjax checkpoint, or a jitjax checkpoint to a diffusers folder. The
layout is recognised by tensor names: diffusers folders, the original release's single files,
ComfyUI files, and GGUF. Every tensor must be known, or nothing is written.
"""

EXAMPLES = """\
examples:
  {prog} FLUX.1-dev --out flux-dev                              a diffusers folder
  {prog} black-forest-labs/FLUX.1-dev --out flux-dev            from the hub
  {prog} FLUX.1-dev --quantise int8 --out flux-dev-int8         for 16 or 24 GB
  {prog} FLUX.1-dev --lora ink.safetensors:0.7 --out inked      with a LoRA
  {prog} --verify flux-dev                                      look for damage
  {prog} flux-dev --to-diffusers --out FLUX.1-dev-again         back
"""

SHORT_END = """
exit status: 0 done, 1 --verify found damage, 2 not possible, 130 Ctrl-C
Single files, control LoRAs and more: {prog} --help-all
"""

FULL_END = """
  the same with another transformer:
    {prog} FLUX.1-dev --transformer finetuned.safetensors --out finetuned

  single files; the tokenizers are the release's folders `tokenizer/` and `tokenizer_2/`:
    {prog} --transformer flux1-dev.safetensors --vae ae.safetensors \\
        --t5 t5xxl_fp16.safetensors --clip clip_l.safetensors --tokenizers FLUX.1-dev --out flux-dev

  only the transformer, for conditioning computed elsewhere:
    {prog} flux1-dev-fp8.safetensors --parts transformer --out flux-dev

  two low-rank updates (LoRA), the second with scale 0.7:
    {prog} FLUX.1-dev --lora ink.safetensors grain.safetensors:0.7 --out inked

  FLUX.1-dev with a control LoRA, which then takes a control picture as FLUX.1-Canny-dev does:
    {prog} FLUX.1-dev --lora flux1-canny-dev-lora.safetensors --out flux-canny

Models are FLUX.1-dev, -schnell, -Fill, -Canny, -Depth and -Kontext, and what is finetuned from
them. A diffusers folder comes from `hf download black-forest-labs/FLUX.1-dev --local-dir
FLUX.1-dev`; a gated repository needs `hf auth login`. ComfyUI files have a prefix, may be in fp8
with or without scales, and hold one model or several. GGUF needs the extra:
pip install "jitjax[gguf]". LoRA are merged before weights are quantised. Every tensor must be
known, used exactly once, and have the expected shape; otherwise the error lists every mismatch.
Neither torch nor diffusers is needed.

then, in Python:
    params = jitjax.load("flux-dev")

exit status: 0 done; 1 --verify found damage, or an unexpected error with a traceback; 2 not
possible, with the reasons; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.
"""

MODEL_OPTIONS = {"transformer": "transformer", "vae": "autoencoder", "t5": "t5", "clip": "clip"}
"""Option -> model that it replaces."""


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser of a command with the name `prog`."""
    parser = Parser(
        prog=prog,
        error_prefix="error: " if prog == PROG else None,
        usage=f"{prog} SOURCE --out TARGET [OPTIONS]",
        description=DESCRIPTION,
        epilog=(EXAMPLES + SHORT_END).format(prog=prog),
        full_epilog=(EXAMPLES + FULL_END).format(prog=prog),
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="folder, file or repository on the Hugging Face hub\nA diffusers folder (with "
        "model_index.json), or a safetensors or GGUF file; with --to-diffusers, a checkpoint",
    )
    for option, model in MODEL_OPTIONS.items():
        add(f"--{option}", metavar="FILE", type=Path, help=f"take the {model} from this file")
    add(
        "--tokenizers",
        metavar="FOLDER",
        type=Path,
        help="folder with tokenizer/ and tokenizer_2/\nIf SOURCE is not a diffusers folder",
    )
    add(
        "--parts",
        action="extend",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"only these of {', '.join(PARTS)}\nBy default all that are in the source",
    )
    add(
        "--out",
        metavar="TARGET",
        type=Path,
        help="checkpoint to write\nWith --to-diffusers, the diffusers folder to write",
    )
    add(
        "--verify",
        metavar="CHECKPOINT",
        type=Path,
        help="look for damage, without writing\nEvery damaged array is reported, and every source "
        "file that has changed since the conversion",
    )
    add("--to-diffusers", action="store_true", help="convert a checkpoint to a diffusers folder")
    add(
        "--dtype",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: bfloat16)\nOf all weights in the checkpoint; auto "
        "keeps the stored dtypes, except that fp8 becomes bfloat16",
    )
    add(
        "--quantise",
        choices=KINDS,
        metavar="KIND",
        help=f"{', '.join(KINDS)}: smaller weights\nThe weights of the transformer's and T5's "
        "blocks: int8 and float8 take half of bfloat16's bytes, int4 a quarter at a loss of "
        "quality; --dtype is that of all else",
    )
    add(
        "--lora",
        metavar="FILE[:SCALE]",
        action="extend",
        nargs="+",
        default=[],
        help="low-rank updates to merge (default scale: 1)\nSOURCE stands before them",
    )
    add(
        "--schedule",
        choices=("auto", *SCHEDULES),
        metavar="NAME",
        help=f"{', '.join(('auto', *SCHEDULES))} (default: auto)\nSchedule and number of text "
        "tokens of the model; auto is the folder's, and for single files dev's if the transformer "
        "has guidance, else schnell's, with a note",
    )
    add("--overwrite", action="store_true", help="replace TARGET if it exists")
    return parser


def main(arguments: Sequence[str] | None = None, *, prog: str = PROG) -> int:
    """Run the command.

    Args:
        arguments: command-line arguments; None takes them from `sys.argv`.
        prog: the name of the command.

    Returns:
        The exit status, see `jitjax.command`.
    """
    for name in ("absl", "asyncio"):  # they log orbax's tracebacks; `main` prints the error
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parser = build_parser(prog)
    return command.run(
        lambda: _run(parser, arguments),
        error_prefix=parser.error_prefix,
        cleanup=remove_unfinished,
        grace=10.0,
        memory_hint="close other programs, or convert fewer --parts at a time",
    )


def _run(parser: Parser, arguments: Sequence[str] | None) -> int:
    startup.collect_garbage()
    options = parser.parse_args(arguments)
    given = {
        action.option_strings[-1] if action.option_strings else "SOURCE"
        for action in parser._actions
        if getattr(options, action.dest, action.default) != action.default
    }
    if options.verify is not None:
        _refuse_others("--verify", given - {"--verify"})
        return _verify(options.verify, parser.error_prefix)
    if options.out is None:
        raise ValueError("--out is missing; expected --out TARGET, see --help")
    if options.to_diffusers:
        _refuse_others(
            "--to-diffusers", given - {"--to-diffusers", "SOURCE", "--out", "--overwrite"}
        )
        _to_diffusers(options)
    else:
        _to_checkpoint(options)
    command.report(str(options.out))
    return 0


def _refuse_others(option: str, others: set[str]) -> None:
    if others:
        raise ValueError(f"{option} does not go with {', '.join(sorted(others))}; see --help")


def _to_checkpoint(options: argparse.Namespace) -> None:
    files = {
        model: file
        for option, model in MODEL_OPTIONS.items()
        if (file := getattr(options, option)) is not None
    }
    if options.source is None and not files:
        hint = ""
        if options.lora:
            hint = f" before --lora, which takes all that follows it ({', '.join(options.lora)})"
        raise ValueError(f"nothing to convert; expected SOURCE{hint} or files, see --help")
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} already exists; --overwrite replaces it")
    check_new_checkpoint(options.out, overwrite=options.overwrite)
    loras = [parse_lora(text) for text in options.lora]
    for file, _ in loras:
        if not file.exists():
            raise FileNotFoundError(f"--lora: {str(file)!r} does not exist; expected a LoRA file")
    command.check_device()  # reading and writing place arrays
    parts = list(dict.fromkeys(options.parts)) if options.parts else None
    location = options.source
    if location is not None and is_repository(location):
        for option in (*MODEL_OPTIONS, "tokenizers"):  # before the download
            path = getattr(options, option)
            if path is not None and not path.exists():
                raise FileNotFoundError(f"--{option}: {str(path)!r} does not exist")
        location = fetch(location, [part for part in parts or PARTS if part not in files])
    source = open_sources(
        location,
        files,
        DTYPES[options.dtype or "bfloat16"],
        tokenizers=options.tokenizers,
        parts=parts,
        schedule=options.schedule or "auto",
    )
    write_checkpoint(
        source,
        options.out,
        loras=loras,
        overwrite=options.overwrite,
        quantise=options.quantise,
        progress=True,
    )


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse FILE or FILE:SCALE to (file, scale).

    Only a number after the last colon is a scale, so names may have colons ("C:\\ink.safetensors").
    If the whole text is a file that exists, there is no scale.

    Raises:
        ValueError: there is no FILE, the scale is not finite, or FILE exists and SCALE is not a
            number.
    """
    if not text:
        raise ValueError("--lora is empty; expected FILE or FILE:SCALE")
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        if not Path(path).is_file():
            return Path(text), 1.0
        raise ValueError(f"--lora {text}: {scale!r} is not a number; expected FILE:SCALE") from None
    if not path:
        raise ValueError(f"--lora {text}: the file is empty; expected FILE:SCALE")
    if not math.isfinite(number):
        raise ValueError(f"--lora {text}: the scale is {scale}; expected a finite number")
    return Path(path), number


def _to_diffusers(options: argparse.Namespace) -> None:
    if options.source is None:
        raise ValueError("--to-diffusers has no checkpoint; expected SOURCE, see --help")
    check_new_folder(options.out, overwrite=options.overwrite)  # fail before weights are read
    check_complete(Path(options.source))
    command.check_device()
    params = load(options.source)
    write_folder(params, options.out, overwrite=options.overwrite, progress=True)


def _verify(path: Path, error_prefix: str) -> int:
    command.check_device()
    try:
        with tqdm(desc="verifying", unit="array") as bar:
            verify(path, lambda name: bar.update())
        command.report(compare_sources(path))
    except ValueError as error:
        command.note_traceback(error)
        command.note(f"{error_prefix}{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
