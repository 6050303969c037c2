"""The command line: `jitjax "a large red circle" -o circle.png`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from platformdirs import user_cache_dir

import jitjax
from jitjax.loading import bundled
from jitjax.sampler.plan import PLANS, get_plan

EXAMPLES = """\
examples:
  jitjax "a large red circle"                        writes jitjax.png
  jitjax "a small blue star" -o star.png --seed 7    another output file and seed
  jitjax "a green ring" --plan dense --steps 20      all tokens at every step, 20 steps
  jitjax "a yellow cross" --size 384x256             384 pixels wide, 256 high
  jitjax "a red star" --count 4 -o star.png          star-0.png to star-3.png, seeds 0 to 3
  jitjax "a photo of a fox" --checkpoint flux-dev    a folder made by `python -m jitjax.convert`

The prompt and the settings are stored in the text chunks of the PNG file. Compiled programs are
cached, so that later images of the same size start faster, in
{cache}
or in the folder that JAX_COMPILATION_CACHE_DIR names.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser, whose help has examples."""
    parser = argparse.ArgumentParser(
        prog="jitjax",
        description="Generate an image from a prompt with FLUX, accelerated by Just-in-Time.",
        epilog=EXAMPLES.format(cache=_cache_folder()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", help="what the image shows")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("jitjax.png"),
        metavar="FILE.png",
        help="output file (default: %(default)s); with --count, FILE-SEED.png",
    )
    parser.add_argument(
        "--plan",
        default="4x",
        metavar="|".join(PLANS),
        help="how much to accelerate sampling (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        metavar="SIDE or WIDTHxHEIGHT",
        help="pixels, multiples of 16 (default: the size the model was trained for)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="number of steps (default: that of the plan)")
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
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error prints one line to standard error and exits with status 2."""
    args = build_parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"jitjax: {message}", file=sys.stderr)
    try:
        _run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"jitjax: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    paths = _output_paths(args)
    width, height = _parse_size(args.size)
    plan = get_plan(args.plan)
    if args.steps is not None:
        plan = plan.replace(steps=args.steps)
    _enable_compilation_cache()
    params = jitjax.load(args.checkpoint)
    seeds = [args.seed + i for i in range(args.count)]
    images = jitjax.sample(
        params,
        [args.prompt] * args.count,
        key=jax.numpy.stack([jax.random.key(seed) for seed in seeds]),
        height=height,
        width=width,
        plan=plan,
        guidance=args.guidance,
        progress=True,
    )
    pixels = np.asarray(images * 255).round().astype(np.uint8)
    for path, seed, image in zip(paths, seeds, pixels, strict=True):
        settings = {
            "plan": args.plan,
            "steps": plan.steps,
            "seed": seed,
            "guidance": args.guidance,
            "width": image.shape[1],
            "height": image.shape[0],
            "checkpoint": str(args.checkpoint),
        }
        _write_png(path, image, args.prompt, settings)
    names = ", ".join(str(path) for path in paths)
    seed_text = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    print(f"{names}: {args.plan}, {seed_text}, {time.perf_counter() - start:.1f} s")


def _output_paths(args: argparse.Namespace) -> list[Path]:
    """Validate --out, --count and --seed; return the path of every image."""
    out: Path = args.out
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(out)!r}; expected a name that ends in .png")
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"--out is {str(out)!r}; expected the folder {str(out.parent)!r} to exist"
        )
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; expected at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; expected 0 or more")
    if args.count == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{args.seed + i}") for i in range(args.count)]


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Parse --size into width and height."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if not match:
        raise ValueError(f"--size is {text!r}; expected one side or WIDTHxHEIGHT, such as 512x384")
    width, height = match[1], match[2] or match[1]
    return int(width), int(height)


def _write_png(path: Path, image: np.ndarray, prompt: str, settings: dict[str, object]) -> None:
    """Write a PNG with its prompt and settings, atomically: `path` is never a partial file."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(settings))
    info.add_text("Software", "jitjax")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cache_folder() -> str:
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache_dir("jitjax")


def _enable_compilation_cache() -> None:
    jax.config.update("jax_compilation_cache_dir", _cache_folder())
    # By default JAX caches only programs that take a second to compile; sampling runs many small
    # ones too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
