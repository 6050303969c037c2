"""`python -m jitjax.convert`: converts FLUX's weights to checkpoints, and back."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from jitjax.checkpoint import PARTS, check_new_checkpoint, verify
from jitjax.loading import load

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

DESCRIPTION = """\
Convert FLUX's weights to a jitjax checkpoint, or a jitjax checkpoint to a diffusers folder. The
layout is recognised by tensor names: diffusers folders, the original release's single files,
ComfyUI files (with a prefix, in fp8 with or without scales, one model or several per file), and
GGUF (needs the extra: pip install "jitjax[gguf]"). Every tensor must be known, used exactly once,
and have the expected shape; otherwise nothing is written, and the error lists every mismatch.
Neither torch nor diffusers is needed.
"""

EXAMPLES = """\
examples:
  a folder from `hf download black-forest-labs/FLUX.1-dev --local-dir FLUX.1-dev`:
    python -m jitjax.convert FLUX.1-dev --out flux-dev

  the same from the hub or its local cache; a gated repository needs `hf auth login`:
    python -m jitjax.convert black-forest-labs/FLUX.1-dev --out flux-dev

  the same with another transformer:
    python -m jitjax.convert FLUX.1-dev --transformer finetuned.safetensors --out finetuned

  single files; the tokenizers are the release's folders `tokenizer/` and `tokenizer_2/`:
    python -m jitjax.convert --transformer flux1-dev.safetensors --vae ae.safetensors \\
        --t5 t5xxl_fp16.safetensors --clip clip_l.safetensors --tokenizers FLUX.1-dev --out flux-dev

  only the transformer, for conditioning computed elsewhere:
    python -m jitjax.convert flux1-dev-fp8.safetensors --parts transformer --out flux-dev

  merge two low-rank updates (LoRA), the second with scale 0.7:
    python -m jitjax.convert FLUX.1-dev --lora ink.safetensors grain.safetensors:0.7 --out inked

  check a checkpoint for damage, and its source files for changes:
    python -m jitjax.convert --verify flux-dev

  convert back to a diffusers folder:
    python -m jitjax.convert flux-dev --to-diffusers --out FLUX.1-dev-again

then, in Python:
    params = jitjax.load("flux-dev")
"""

MODEL_OPTIONS = {"transformer": "transformer", "vae": "autoencoder", "t5": "t5", "clip": "clip"}
"""Option -> model that it replaces."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jitjax.convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="diffusers folder (with model_index.json), safetensors or GGUF file, or repository on "
        "the Hugging Face hub; with --to-diffusers, a checkpoint",
    )
    for option, model in MODEL_OPTIONS.items():
        parser.add_argument(
            f"--{option}", metavar="FILE", type=Path, help=f"take the {model} from this file"
        )
    parser.add_argument(
        "--tokenizers",
        metavar="FOLDER",
        type=Path,
        help="folder with tokenizer/ and tokenizer_2/, if SOURCE is not a diffusers folder",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="convert only these models (default: all in the source)",
    )
    parser.add_argument(
        "--out",
        metavar="TARGET",
        type=Path,
        help="checkpoint to write; with --to-diffusers, the diffusers folder to write",
    )
    parser.add_argument(
        "--verify",
        metavar="CHECKPOINT",
        type=Path,
        help="check a checkpoint without writing: report every damaged array, and every source "
        "file that has changed since the conversion",
    )
    parser.add_argument(
        "--to-diffusers", action="store_true", help="convert a checkpoint to a diffusers folder"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of all weights in the checkpoint (default: bfloat16); auto keeps the stored "
        "dtypes, except that fp8 becomes bfloat16",
    )
    parser.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        nargs="+",
        default=[],
        help="low-rank updates to merge, each with a scale (default: 1)",
    )
    parser.add_argument(
        "--schedule",
        choices=("auto", *SCHEDULES),
        help="schedule and number of text tokens of the model (default: auto, the folder's; for "
        "single files, dev's if the transformer has guidance, else schnell's, with a note)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: command-line arguments; None takes them from `sys.argv`.

    Returns:
        The exit status: 0 for success, 1 if `--verify` finds damage, 2 for other errors.
    """
    options = build_parser().parse_args(arguments)
    for name in ("absl", "asyncio"):  # they log orbax's tracebacks; `main` prints the error
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if options.verify is not None:
            return _verify(options.verify)
        if options.out is None:
            raise ValueError("--out is missing; expected --out TARGET, see --help")
        (_to_diffusers if options.to_diffusers else _to_checkpoint)(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def _to_checkpoint(options: argparse.Namespace) -> None:
    files = {
        model: file
        for option, model in MODEL_OPTIONS.items()
        if (file := getattr(options, option)) is not None
    }
    if options.source is None and not files:
        raise ValueError("nothing to convert; expected SOURCE or files, see --help")
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} already exists; --overwrite replaces it")
    check_new_checkpoint(options.out, overwrite=options.overwrite)
    location = options.source
    if location is not None and is_repository(location):
        location = fetch(location, [part for part in options.parts or PARTS if part not in files])
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        source = open_sources(
            location,
            files,
            DTYPES[options.dtype or "bfloat16"],
            tokenizers=options.tokenizers,
            parts=options.parts,
            schedule=options.schedule or "auto",
        )
    for note in notes:
        print(f"note: {note.message}", file=sys.stderr)
    loras = [parse_lora(text) for text in options.lora]
    write_checkpoint(source, options.out, loras=loras, overwrite=options.overwrite, progress=True)


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse FILE or FILE:SCALE to (file, scale). Raises `ValueError` if SCALE is not a number."""
    path, colon, scale = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise ValueError(f"--lora {text}: {scale!r} is not a number; expected FILE:SCALE") from None


def _to_diffusers(options: argparse.Namespace) -> None:
    other_options = (*MODEL_OPTIONS, "parts", "tokenizers", "dtype", "lora", "schedule")
    if options.source is None or any(getattr(options, name) for name in other_options):
        raise ValueError("--to-diffusers takes only a checkpoint, --out and --overwrite")
    check_new_folder(options.out, overwrite=options.overwrite)  # fail before weights are read
    check_complete(Path(options.source))
    params = load(options.source)
    write_folder(params, options.out, overwrite=options.overwrite, progress=True)


def _verify(path: Path) -> int:
    try:
        with tqdm(desc="verifying", unit="array") as bar:
            verify(path, lambda name: bar.update())
        print(compare_sources(path))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
