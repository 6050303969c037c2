"""The command line: `jitjax "a large red circle" -o circle.png`."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from platformdirs import user_cache_dir

import jitjax
from jitjax import command, images, startup
from jitjax.checkpoint import PARTS, read_metadata
from jitjax.config import FluxConfig
from jitjax.latents import token_grid
from jitjax.loading import bundled
from jitjax.models.quantised import KINDS
from jitjax.sampler.plan import CHOICES, DEFAULT_PLAN, PLANS, SOLVERS, get_plan

EXAMPLES = """\
examples:
  jitjax "a large red circle"                        writes jitjax.png, or jitjax-1.png, ...
  jitjax "a small blue star" -o star.png --seed 7    another output file and seed
  jitjax "a green ring" --plan dense --steps 20      all tokens at every step, 20 steps
  jitjax "a yellow cross" --size 384x256             384 pixels wide, 256 high
  jitjax "a red star" --count 4 -o star.png          star-0.png to star-3.png, seeds 0 to 3
  jitjax - -o poem.png < poem.txt                    the prompt from standard input
  jitjax "a photo of a fox" --checkpoint flux-dev    a folder made by `python -m jitjax.convert`

An existing file is replaced only with --overwrite; without -o the next free name is taken. With
--count each picture is written as soon as it is made. The same seed gives the same picture,
whatever the count. The prompt and the settings are stored in the text chunks of the PNG file.

Compiled programs are cached, so that later images of the same size start faster, in
{cache}
or in the folder that JAX_COMPILATION_CACHE_DIR names. XLA's own log is hidden unless
TF_CPP_MIN_LOG_LEVEL is set (0 shows all of it).

exit status: 0 done; 2 not possible, with a line that says why; 130 stopped by Ctrl-C; 143 stopped
by SIGTERM; 1 an unexpected error, with a traceback.
"""

DEFAULT_OUT = Path("jitjax.png")
ERROR = "jitjax: error: "
SEEDS = 2**64
LARGEST_COUNT = 100_000
LONGEST_PROMPT = 2**20
"""Bytes that are read from standard input; anything longer is taken for a mistake."""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser, whose help has examples."""
    parser = command.Parser(
        prog="jitjax",
        error_prefix=ERROR,
        description="Generate an image from a prompt with FLUX, accelerated by Just-in-Time.",
        epilog=EXAMPLES.format(cache=_cache_folder()),
    )
    parser.add_argument("prompt", help="what the image shows; - reads it from standard input")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE.png",
        help=f"output file (default: {DEFAULT_OUT}, or the next free name); with --count, "
        "FILE-SEED.png",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.add_argument(
        "--plan",
        default=DEFAULT_PLAN,
        metavar="|".join(PLANS),
        help="how to sample (default: %(default)s): dense takes 50 steps of Euler's method, the "
        "multistep plans 12 and 7 of second order; 4x and 7x are the paper's; jit-10x and jit-14x "
        "need 10 and 14 times fewer operations than dense",
    )
    parser.add_argument(
        "--size",
        metavar="SIDE or WIDTHxHEIGHT",
        help="pixels, multiples of 16 (default: the size the model was trained for)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed, below 2**64 (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="number of steps (default: that of the plan)")
    parser.add_argument(
        "--solver",
        metavar="|".join(SOLVERS),
        help="how steps are taken; multistep is of second order (default: that of the plan)",
    )
    parser.add_argument(
        "--microflow",
        metavar="|".join(CHOICES["microflow"]),
        help="how newly active tokens move to their target: hit is the paper's equation, blend the "
        "authors' program (default: that of the plan)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        help="number of images, with consecutive seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=3.5,
        help="guidance scale; larger follows the prompt more closely (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        default="tiny",
        metavar="NAME or FOLDER",
        help=f"bundled ({', '.join(bundled())}) or converted (default: %(default)s)",
    )
    parser.add_argument(
        "--quantise",
        metavar="|".join(KINDS),
        help="quantise the weights while they are loaded: int8 and float8 take half the memory of "
        "bfloat16, int4 a quarter at a loss of quality (default: as they are stored)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: command-line arguments; None takes them from `sys.argv`.

    Raises:
        SystemExit: with the exit status, unless it is 0; see `jitjax.command`.
    """
    status = command.run(
        lambda: _run(build_parser().parse_args(arguments)),
        error_prefix=ERROR,
        cleanup=images.remove_unfinished,
        grace=1.0,
        memory_hint="try a smaller --size",
    )
    if status:
        sys.exit(status)


def _run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    prompt = _read_prompt(args.prompt)
    seeds = _seeds(args.seed, args.count)
    outputs = _Outputs(args.out, seeds, args.overwrite)
    width, height = _parse_size(args.size)
    plan = get_plan(args.plan)
    if args.steps is not None:
        if args.steps > LARGEST_COUNT:
            raise ValueError(f"--steps is {args.steps}; expected 1 to {LARGEST_COUNT}")
        plan = plan.replace(steps=args.steps)
    for name, allowed in (("solver", SOLVERS), ("microflow", CHOICES["microflow"])):
        value = getattr(args, name)
        if value is not None:
            if value not in allowed:
                raise ValueError(f"--{name} is {value!r}; expected one of {', '.join(allowed)}")
            plan = plan.replace(**{name: value})
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance is {args.guidance}; expected a finite number")
    if args.quantise is not None and args.quantise not in KINDS:
        raise ValueError(f"--quantise is {args.quantise!r}; expected one of {', '.join(KINDS)}")
    _check_checkpoint(args.checkpoint, width, height)
    command.check_device()
    _enable_compilation_cache()
    params = jitjax.load(args.checkpoint, quantise=args.quantise)
    conditioning = jitjax.encode_prompt(params, prompt)
    # One after another: memory does not grow with the count, all pictures share the compiled
    # programs, and a picture does not depend on the others (each batch size rounds differently).
    for i, seed in enumerate(seeds):
        image = jitjax.sample(
            params,
            conditioning,
            key=seed_key(seed)[None],
            height=height,
            width=width,
            plan=plan,
            guidance=args.guidance,
            progress=True,
        )[0]
        settings = {
            "plan": args.plan,
            "steps": plan.steps,
            "solver": plan.solver,
            "microflow": plan.microflow,
            "seed": seed,
            "guidance": args.guidance,
            "width": image.shape[1],
            "height": image.shape[0],
            "checkpoint": args.checkpoint,
        }
        if args.quantise is not None:
            settings["quantise"] = args.quantise
        path = outputs.write(i, _pixels(np.asarray(image), seed), prompt, settings)
        now = time.perf_counter()
        command.report(f"{path}: {args.plan}, seed {seed}, {now - start:.1f} s")
        start = now
        startup.collect_garbage()  # everything is traced
    return 0


def seed_key(seed: int) -> jax.Array:
    """Return the key of a seed of 64 bits.

    Args:
        seed: 0 to 2**64 - 1. Each gives another key; below 2**32, that of `jax.random.key(seed)`
            with JAX's default settings, whatever the settings are.
    """
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")


def _seeds(first: int, count: int) -> range:
    """Validate --seed and --count; return the seeds."""
    if not 1 <= count <= LARGEST_COUNT:
        raise ValueError(f"--count is {count}; expected 1 to {LARGEST_COUNT}")
    if not 0 <= first < SEEDS:
        raise ValueError(f"--seed is {first}; expected 0 to 2**64 - 1")
    if first + count > SEEDS:
        raise ValueError(f"--seed is {first} and --count {count}; expected seeds below 2**64")
    return range(first, first + count)


def _read_prompt(text: str) -> str:
    """Return the prompt, from standard input if it is "-"."""
    if text == "-":
        source, data = "standard input", _read_input()
    else:
        source, data = "the prompt", text.encode(errors="surrogatepass")
        if "\\ud" in ascii(text):  # how Python passes bytes that are not of the locale's encoding
            with contextlib.suppress(UnicodeEncodeError):
                data = os.fsencode(text)
    try:
        prompt = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} has bytes that are not UTF-8 ({data[error.start : error.end]!r} at "
            f"position {error.start}); expected UTF-8 text"
        ) from None
    if "\0" in prompt:  # as in UTF-16; PNG files cannot store it
        raise ValueError(
            f"{source} has a zero byte at position {prompt.index(chr(0))}; expected UTF-8 text"
        )
    return prompt


def _read_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed; expected the prompt, which - reads")
    stream = getattr(sys.stdin, "buffer", None)
    data = stream.read(LONGEST_PROMPT + 1) if stream else sys.stdin.read().encode()
    if len(data) > LONGEST_PROMPT:
        raise ValueError(f"standard input has more than {LONGEST_PROMPT} bytes; expected less")
    data = data.removeprefix(codecs.BOM_UTF8).strip()
    if not data:
        raise ValueError("standard input is empty; expected the prompt, which - reads")
    return data


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Parse --size into width and height."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text, re.ASCII)
    if not match:
        raise ValueError(f"--size is {text!r}; expected one side or WIDTHxHEIGHT, such as 512x384")
    width, height = match[1], match[2] or match[1]
    return int(width), int(height)


def _check_checkpoint(checkpoint: str, width: int | None, height: int | None) -> None:
    """Raise `ValueError` if a checkpoint cannot make the picture, before minutes of loading."""
    config = FluxConfig()
    folder = Path(checkpoint)
    if checkpoint and checkpoint not in bundled() and folder.exists():  # else `load` reports it
        metadata = read_metadata(folder)
        config, available = metadata["config"], metadata["parts"]
        missing = [part for part in PARTS if part not in available]
        if missing:
            raise ValueError(
                f"--checkpoint {checkpoint} has no {', '.join(missing)}; "
                f"expected {', '.join(PARTS)}"
            )
    default = config.image_size
    token_grid(default if height is None else height, default if width is None else width, config)


def _pixels(image: np.ndarray, seed: int) -> np.ndarray:
    """Convert an image from [0, 1] to bytes; raise `ValueError` if its values are not finite."""
    finite = np.isfinite(image)
    if not finite.all():
        raise ValueError(
            f"the picture of seed {seed} is not written: {1 - finite.mean():.0%} of its values are "
            "not finite. Damaged weights, a dtype that overflows or an extreme --guidance do that; "
            "jitjax.denoise(..., check_finite=True) names the step"
        )
    return (image * 255).round().astype(np.uint8)


class _Outputs:
    """The output files, checked before the first picture is made.

    Raises:
        ValueError: --out has another suffix.
        OSError: an output exists and may not be replaced, or cannot be written.
    """

    def __init__(self, out: Path | None, seeds: Sequence[int], overwrite: bool) -> None:
        self._overwrite = overwrite
        is_default = out is None
        out = out or DEFAULT_OUT
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out is {str(out)!r}; expected a name that ends in .png")
        if not out.parent.is_dir():
            raise FileNotFoundError(
                f"--out is {str(out)!r}; expected the folder {str(out.parent)!r} to exist"
            )
        self._paths = images.with_seeds(out, seeds)
        if is_default and not overwrite:
            candidates = (images.with_seeds(path, seeds) for path in images.numbered(out))
            self._paths = next(paths for paths in candidates if not any(map(command.exists, paths)))
        for path in self._paths:
            self._check(path)
        # Links may lead to other folders.
        for folder in {Path(os.path.realpath(path)).parent for path in self._paths}:
            command.check_writable(folder, "--out")

    def _check(self, path: Path) -> None:
        if not command.exists(path):
            return
        if path.exists() and not path.is_file():
            raise FileExistsError(f"--out: {str(path)!r} exists and is not a file")
        if not self._overwrite:
            raise FileExistsError(
                f"--out: {str(path)!r} exists; expected a new name, or --overwrite to replace it"
            )
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"--out: {str(path)!r} is read-only; expected another name")

    def write(self, i: int, image: np.ndarray, prompt: str, settings: dict[str, object]) -> Path:
        """Write picture `i`; return its path, a new one if another file has appeared there."""
        for path in images.numbered(self._paths[i]):
            try:
                images.write_png(path, image, prompt, settings, overwrite=self._overwrite)
            except FileExistsError:
                continue
            if path != self._paths[i]:
                command.note(f"jitjax: {str(self._paths[i])!r} has appeared meanwhile")
            return path
        raise AssertionError("unreachable: there is always another number")


def _cache_folder() -> str:
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache_dir("jitjax")


def _enable_compilation_cache() -> None:
    jax.config.update("jax_compilation_cache_dir", _cache_folder())
    # By default JAX caches only programs that take a second to compile; sampling runs many small
    # ones too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
