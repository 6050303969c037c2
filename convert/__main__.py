"""`python -m jitjax.convert`: diffusers folders to checkpoints, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from jitjax import checkpoint

from .reading import read_folder
from .writing import check_target, write_folder

DTYPES = {
    "auto": None,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float32": jnp.float32,
}

DESCRIPTION = """\
Turn a diffusers folder of FLUX into a jitjax checkpoint, once; or a checkpoint into a diffusers
folder. Every tensor has to be known, used once, and of the right shape: otherwise nothing is
written and the message lists what does not fit. FLUX.1-dev needs about 35 GB of memory and of
disk. Neither torch nor diffusers is needed.
"""

EXAMPLES = """\
examples:
  a folder as `hf download black-forest-labs/FLUX.1-dev --local-dir FLUX.1-dev` gives it:
    python -m jitjax.convert FLUX.1-dev --out flux-dev

  the same, with all weights rounded to bfloat16:
    python -m jitjax.convert FLUX.1-dev --out flux-dev --dtype bfloat16

  and back, for diffusers:
    python -m jitjax.convert flux-dev --to-diffusers --out FLUX.1-dev-again

then, in Python:
    params = jitjax.load("flux-dev")
"""


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
        type=Path,
        help="diffusers folder (the one with model_index.json); with --to-diffusers, a checkpoint",
    )
    out.add_argument(
        "--out",
        metavar="TARGET",
        type=Path,
        required=True,
        help="the checkpoint to write; with --to-diffusers, the folder",
    )
    out.add_argument(
        "--to-diffusers", action="store_true", help="the way back: checkpoint to diffusers folder"
    )
    out.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of all weights of the checkpoint; auto keeps them as they are stored (default)",
    )
    out.add_argument("--overwrite", action="store_true", help="replace TARGET if it is there")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can mend."""
    options = parser().parse_args(arguments)
    try:
        if options.to_diffusers:
            if options.dtype != "auto":
                raise ValueError("--dtype has no meaning together with --to-diffusers")
            check_target(options.out, options.overwrite)  # before anything is read
            params = checkpoint.load(options.source)
            write_folder(params, options.out, overwrite=options.overwrite, progress=True)
        else:
            if options.out.exists() and not options.overwrite:
                raise FileExistsError(f"{options.out} is there already; --overwrite replaces it")
            params = read_folder(options.source, DTYPES[options.dtype], progress=True)
            checkpoint.save(params, options.out, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
