"""`python -m jitjax.convert`: FLUX's weights to checkpoints, and back."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from jitjax.checkpoint import PARTS, verify
from jitjax.loading import load

from .sources.hub import fetch, is_repository
from .sources.single_files import open_sources
from .targets.checkpoint import compare_sources, write_checkpoint
from .targets.diffusers_folder import check_target, write_folder

DTYPES = {
    "auto": None,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float32": jnp.float32,
}

DESCRIPTION = """\
Turn FLUX's weights into a jitjax checkpoint, once; or a checkpoint into a diffusers folder. The
layout is recognised from the tensors' names: diffusers folders, the original release's single
files, ComfyUI's (with a prefix, in fp8 with or without scales, one model or several in a file), and
GGUF (with the extra: pip install "jitjax[gguf]"). Every tensor has to be known, used once, and of
the right shape: otherwise nothing is written and the message lists what does not fit. Neither torch
nor diffusers is needed.
"""

EXAMPLES = """\
examples:
  a folder as `hf download black-forest-labs/FLUX.1-dev --local-dir FLUX.1-dev` gives it:
    python -m jitjax.convert FLUX.1-dev --out flux-dev

  the same from the hub (or its cache); a gated repository needs `hf auth login`:
    python -m jitjax.convert black-forest-labs/FLUX.1-dev --out flux-dev

  the same with another transformer:
    python -m jitjax.convert FLUX.1-dev --transformer finetuned.safetensors --out finetuned

  single files; the tokenizers are folders of the release, `tokenizer/` and `tokenizer_2/`:
    python -m jitjax.convert --transformer flux1-dev.safetensors --vae ae.safetensors \\
        --t5 t5xxl_fp16.safetensors --clip clip_l.safetensors --tokenizers FLUX.1-dev --out flux-dev

  the transformer alone, for conditioning computed elsewhere:
    python -m jitjax.convert flux1-dev-fp8.safetensors --parts transformer --out flux-dev

  with two low-rank updates (LoRA) merged, the second at 0.7 of its strength:
    python -m jitjax.convert FLUX.1-dev --lora ink.safetensors grain.safetensors:0.7 --out inked

  read it all again, and compare it with what was written and with the files it was made from:
    python -m jitjax.convert --verify flux-dev

  and back, for diffusers:
    python -m jitjax.convert flux-dev --to-diffusers --out FLUX.1-dev-again

then, in Python:
    params = jitjax.load("flux-dev")
"""

FILES = {"transformer": "transformer", "vae": "autoencoder", "t5": "t5", "clip": "clip"}
"""Option -> model."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m jitjax.convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="diffusers folder (the one with model_index.json), safetensors or GGUF file, or "
        "repository on the Hugging Face hub; with --to-diffusers, a checkpoint",
    )
    for option, model in FILES.items():
        out.add_argument(
            f"--{option}", metavar="FILE", type=Path, help=f"take the {model} from this file"
        )
    out.add_argument(
        "--tokenizers",
        metavar="FOLDER",
        type=Path,
        help="folder with tokenizer/ and tokenizer_2/, where SOURCE is no folder",
    )
    out.add_argument(
        "--parts", nargs="+", choices=PARTS, help="convert these models only (default: all found)"
    )
    out.add_argument(
        "--out",
        metavar="TARGET",
        type=Path,
        help="the checkpoint to write; with --to-diffusers, the folder",
    )
    out.add_argument(
        "--verify",
        metavar="CHECKPOINT",
        type=Path,
        help="write nothing: read a checkpoint again and tell of every damaged array, and of every "
        "file it was made from that has changed",
    )
    out.add_argument(
        "--to-diffusers", action="store_true", help="the way back: checkpoint to diffusers folder"
    )
    out.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of all weights of the checkpoint (default: bfloat16); auto keeps them as they "
        "are stored, and makes fp8 bfloat16",
    )
    out.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        nargs="+",
        default=[],
        help="low-rank updates to merge, each with its strength (default: 1)",
    )
    out.add_argument("--overwrite", action="store_true", help="replace TARGET if it is there")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 for damage found, 2 for what can be mended."""
    options = parser().parse_args(arguments)
    for name in ("absl", "asyncio"):  # orbax's tracebacks; the error is told
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if options.verify is not None:
            return _verify(options.verify)
        if options.out is None:
            raise ValueError("nowhere to write to; expected --out TARGET, see --help")
        (_back if options.to_diffusers else _convert)(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def _convert(options: argparse.Namespace) -> None:
    files = {m: f for o, m in FILES.items() if (f := getattr(options, o)) is not None}
    if options.source is None and not files:
        raise ValueError("nothing to convert; expected SOURCE or files, see --help")
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} is there already; --overwrite replaces it")
    place = options.source
    if place is not None and is_repository(place):
        place = fetch(place, [part for part in options.parts or PARTS if part not in files])
    source = open_sources(
        place,
        files,
        DTYPES[options.dtype or "bfloat16"],
        tokenizers=options.tokenizers,
        parts=options.parts,
    )
    loras = [parse_lora(text) for text in options.lora]
    write_checkpoint(source, options.out, loras=loras, overwrite=options.overwrite, progress=True)


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE. Raises `ValueError` if SCALE is no number."""
    path, colon, scale = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise ValueError(f"--lora {text}: {scale!r} is no number; expected FILE:SCALE") from None


def _back(options: argparse.Namespace) -> None:
    given = [getattr(options, name) for name in (*FILES, "parts", "tokenizers", "dtype", "lora")]
    if options.source is None or any(given):
        raise ValueError("--to-diffusers takes a checkpoint, --out, and nothing else")
    check_target(options.out, options.overwrite)  # before anything is read
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
