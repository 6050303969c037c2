"""The command line: `jitjax "a large red circle" -o circle.png`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from platformdirs import user_cache_dir

import jitjax
from jitjax import (
    cli_conditioning,
    cli_image,
    cli_negative,
    command,
    files,
    images,
    list_run,
    startup,
)
from jitjax.checkpoint import FluxParams, read_metadata
from jitjax.config import FluxConfig
from jitjax.latents import token_grid
from jitjax.list_folder import output_folder
from jitjax.loading import BUNDLED, bundled
from jitjax.models.quantised import KINDS
from jitjax.picture import LARGEST_COUNT, Picture, consecutive_seeds, parse_size, seed_keys
from jitjax.prompt_list import Line, read_list, read_prompt
from jitjax.sampler.plan import CHOICES, DEFAULT_PLAN, PLANS, SOLVERS, get_plan
from jitjax.validation import listed

EXAMPLES = """\
examples:
  jitjax "a large red circle"                        writes jitjax.png, or jitjax-1.png, ...
  jitjax "a small blue star" -o star.png --seed 7    another output file and seed
  jitjax "a green ring" --plan dense --steps 20      all tokens at every step, 20 steps
  jitjax "a yellow cross" --size 384x256             384 pixels wide, 256 high
  jitjax "a red star" --count 4 -o star.png          star-0.png to star-3.png, seeds 0 to 3
  jitjax - -o poem.png < poem.txt                    the prompt from standard input
  jitjax "a photo of a fox" --checkpoint flux-dev    a folder made by `python -m jitjax.convert`
  jitjax "a red star" --image cat.png --strength 0.6    from a picture instead of noise
  jitjax "a red star" --image cat.jpg --size 512x384    resized to it, since not multiples of 16
  jitjax "a red star" --image cat.png --mask sky.png    new where sky.png is white, else as it is
  jitjax "a house" --control edges.png --checkpoint flux-canny      FLUX.1 Canny; Depth likewise
  jitjax "make it red" --reference cat.jpg --checkpoint kontext     FLUX.1 Kontext changes a picture
  jitjax "a door" --image wall.png --mask m.png --checkpoint fill   FLUX.1 Fill paints a mask
  jitjax "a red star" --negative "stripes" --true-guidance 2    away from another prompt
  jitjax --prompts list.txt -o pictures --batch 4    a prompt per line, four pictures at a time
  jitjax memory flux-dev --size 1024                 what that needs; see jitjax memory --help
  jitjax info flux-dev                               what a checkpoint holds
  jitjax -- memory                                   a picture of the word "memory"

encoded prompts, for a card without room for the text encoders:
  jitjax "a fox" --save-conditioning fox.safetensors
  jitjax --conditioning fox.safetensors -o fox.png

An existing file is replaced only with --overwrite; without -o the next free name is taken. With
--count each picture is written as soon as it is made. The same seed gives the same picture,
whatever the count. The prompt and the settings are stored in the text chunks of the PNG file.

A list of prompts has one per line, or is JSON lines such as
  {{"prompt": "a red star", "seed": 7, "size": "512x384", "plan": "dense", "negative": "blue"}}
where the options give what a line does not; --count makes several pictures of each line. Blank
lines and lines that begin with # do not count. Pictures are written as they are made, into a
folder, as WORDS-SEED-HASH.png, where the hash is of the prompt and all settings. So after Ctrl-C, a
crash or a change of the list the same command goes on: what is there and whole is kept, even with
--overwrite, and all else is made. Lines that fail are told at the end. A picture is the one that
`jitjax PROMPT --seed N` makes: to the bit with --batch 1, up to rounding in larger batches.

Compiled programs are cached, so that later images of the same size start faster, in
{cache}
or in the folder that JAX_COMPILATION_CACHE_DIR names. XLA's own log is hidden unless
TF_CPP_MIN_LOG_LEVEL is set (0 shows all of it).

exit status: 0 done; 1 lines of the list have failed, the rest is made; 2 not possible, with a line
that says why; 130 stopped by Ctrl-C; 143 stopped by SIGTERM; 1 with a traceback: an unexpected
error.
"""

ERROR = "jitjax: error: "
COMMANDS = {"memory": "jitjax.memory.command", "info": "jitjax.info"}
"""First argument that selects another command -> the module of the command."""
LARGEST_LIST = 1_000_000
"""Most pictures of a list; they are kept in memory by name."""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser, whose help has examples."""
    parser = command.Parser(
        prog="jitjax",
        error_prefix=ERROR,
        description="Generate an image from a prompt with FLUX, accelerated by Just-in-Time.",
        epilog=EXAMPLES.format(cache=_cache_folder()),
    )
    parser.add_argument(
        "prompt", nargs="?", help="what the image shows; - reads it from standard input"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="make the pictures of a list of prompts; - reads it from standard input",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="with --prompts, most pictures to make at once (default: 1); they share size and plan",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE.png or FOLDER",
        help=f"output file (default: {images.DEFAULT_OUT}, or the next free name); with --count, "
        "FILE-SEED.png; with --prompts FILE.txt, a folder (default: FILE-pictures)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace output files that exist; with --prompts, those that are other pictures",
    )
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
        help="number of images of each prompt, with consecutive seeds (default: %(default)s)",
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
    cli_image.add_arguments(parser)
    cli_negative.add_arguments(parser)
    cli_conditioning.add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: command-line arguments; None takes them from `sys.argv`.

    Raises:
        SystemExit: with the exit status, unless it is 0; see `jitjax.command`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] and arguments[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[arguments[0]])
        if status := module.main(arguments[1:]):
            sys.exit(status)
        return
    status = command.run(
        lambda: _run(_parse(arguments)),
        error_prefix=ERROR,
        cleanup=_clean_up,
        grace=1.0,
        memory_hint="try a smaller --size or --batch, or --low-memory; jitjax memory says what is "
        "needed",
    )
    if status:
        sys.exit(status)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(arguments)
    sources = {
        "a prompt": args.prompt,
        "--prompts": args.prompts,
        "--conditioning": args.conditioning,
    }
    given = [name for name, value in sources.items() if value is not None]
    if not given:
        parser.error("nothing to make; expected a prompt, --prompts FILE or --conditioning FILE")
    if len(given) > 1:
        parser.error(f"there are {' and '.join(given)}; expected one of them")
    if args.batch is not None and args.prompts is None:
        parser.error("--batch is for --prompts")
    return args


def _clean_up() -> None:
    files.remove_unfinished()
    list_run.say_how_to_go_on(on_new_line=True)  # after a progress bar


def _run(args: argparse.Namespace) -> int:
    cli_image.check_arguments(args)
    cli_negative.check_arguments(args)
    cli_conditioning.check_arguments(args)
    config = _read_config(args.checkpoint, cli_conditioning.needed_parts(args))
    # `load` reports a checkpoint that is not there; text encoders alone need no pictures.
    if args.save_conditioning is None and _exists(args.checkpoint):
        cli_image.check_model(args, config)
    if args.prompts is not None:
        return _run_list(args, config)
    start = time.perf_counter()
    conditioning = None
    if args.conditioning is None:
        prompt = read_prompt(args.prompt)
    else:
        conditioning, prompt = cli_conditioning.read(args.conditioning)
        conditioning.check(config)
    task, size = cli_image.read_all(args, config)
    negative = None
    if args.negative_conditioning is not None:
        negative, args.negative = cli_conditioning.read(
            args.negative_conditioning, "--negative-conditioning"
        )
        negative.check(config)
    pictures = _pictures(args, config, Line(1, prompt, size=size))
    outputs = images.Outputs(args.out, [picture.seed for picture in pictures], args.overwrite)
    _prepare_jax()
    if args.save_conditioning is not None:
        return cli_conditioning.save(args, prompt)
    params, conditioning, negative = cli_conditioning.load(args, prompt, conditioning, negative)
    # One after another: memory does not grow with the count, all pictures share the compiled
    # programs, and a picture does not depend on the others (each batch size rounds differently).
    for i, picture in enumerate(pictures):
        image = jitjax.sample(
            params,
            conditioning,
            key=seed_keys([picture.seed]),
            height=picture.height,
            width=picture.width,
            plan=picture.plan,
            guidance=picture.guidance,
            negative_prompt=negative,
            true_guidance=picture.true_guidance,
            progress=True,
            **task,
        )[0]
        pixels = images.to_pixels(np.asarray(image), picture.seed)
        path = outputs.write(i, pixels, picture.prompt, picture.settings)
        now = time.perf_counter()
        command.report(f"{path}: {picture.plan_name}, seed {picture.seed}, {now - start:.1f} s")
        start = now
        startup.collect_garbage()  # everything is traced
    return 0


def _run_list(args: argparse.Namespace, config: FluxConfig) -> int:
    batch = 1 if args.batch is None else args.batch
    if not 1 <= batch <= LARGEST_COUNT:
        raise ValueError(f"--batch is {batch}; expected 1 to {LARGEST_COUNT}")
    _pictures(args, config, Line(0, ""))  # what is wrong with an option is no fault of a line
    folder = output_folder(args.out, args.prompts)
    lines, problems = read_list(args.prompts)
    wanted = []
    for line in lines:
        try:
            wanted += [(line.number, picture) for picture in _pictures(args, config, line)]
        except ValueError as error:
            problems[line.number] = str(error)
        if len(wanted) > LARGEST_LIST:
            raise ValueError(
                f"--prompts has more than {LARGEST_LIST} pictures; expected less, in several lists"
            )
    if not wanted:
        lines = (f"line {number}: {text}" for number, text in sorted(problems.items()))
        raise ValueError(f"--prompts: no line of {args.prompts!r} can be used:{listed(lines)}")
    return list_run.run(
        wanted,
        problems,
        folder=folder,
        batch=batch,
        overwrite=args.overwrite,
        load=lambda: _load(args),
    )


def _pictures(args: argparse.Namespace, config: FluxConfig, line: Line) -> list[Picture]:
    """Return the pictures of a line by the options; raise `ValueError` if they are not possible."""
    plan_name = line.plan or args.plan
    plan = get_plan(plan_name)
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
    negative = args.negative if line.negative is None else line.negative
    width = height = config.image_size
    if line.size or args.size is not None:
        width, height = line.size or parse_size(args.size)
    token_grid(height, width, config)
    if line.seed is None:
        seeds = consecutive_seeds(args.seed, args.count)
    else:
        seeds = consecutive_seeds(line.seed, args.count, name="seed")
    return [
        Picture(
            line.prompt,
            seed,
            width,
            height,
            plan_name,
            plan,
            args.guidance,
            args.checkpoint,
            args.quantise,
            strength=args.strength,
            negative=negative,
            true_guidance=None if negative is None else args.true_guidance,
            **cli_image.files(args),
        )
        for seed in seeds
    ]


def _read_config(checkpoint: str, parts: Sequence[str]) -> FluxConfig:
    """Return a checkpoint's configuration, before minutes of loading.

    Raises:
        ValueError: the checkpoint lacks one of `parts`.
    """
    from jitjax.convert.sources.diffusers_folder import read_config

    if checkpoint in bundled():
        return read_config(BUNDLED / checkpoint)
    if not _exists(checkpoint):
        return FluxConfig()  # `load` reports it
    metadata = read_metadata(checkpoint)
    missing = [part for part in parts if part not in metadata["parts"]]
    if missing:
        raise ValueError(
            f"--checkpoint {checkpoint} has no {', '.join(missing)}; expected {', '.join(parts)}"
        )
    return metadata["config"]


def _exists(checkpoint: str) -> bool:
    return checkpoint in bundled() or bool(checkpoint and Path(checkpoint).exists())


def _load(args: argparse.Namespace) -> FluxParams:
    _prepare_jax()
    return jitjax.load(args.checkpoint, quantise=args.quantise, low_memory=args.low_memory)


def _prepare_jax() -> None:
    command.check_device()
    _enable_compilation_cache()


def _cache_folder() -> str:
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache_dir("jitjax")


def _enable_compilation_cache() -> None:
    jax.config.update("jax_compilation_cache_dir", _cache_folder())
    # By default JAX caches only programs that take a second to compile; sampling runs many small
    # ones too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
