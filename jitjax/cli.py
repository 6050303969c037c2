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
    cli_trace,
    command,
    files,
    images,
    list_run,
    startup,
)
from jitjax.checkpoint import FluxParams, read_metadata
from jitjax.cli_parser import COMMANDS, build_parser
from jitjax.config import FluxConfig
from jitjax.latents import token_grid
from jitjax.list_folder import output_folder
from jitjax.loading import BUNDLED, bundled
from jitjax.models.quantised import KINDS
from jitjax.picture import LARGEST_COUNT, Picture, consecutive_seeds, parse_size, seed_keys
from jitjax.prompt_list import Line, read_list, read_prompt
from jitjax.sampler.plan import CHOICES, SOLVERS, get_plan
from jitjax.validation import listed

ERROR = "jitjax: error: "
LARGEST_LIST = 1_000_000
"""Most pictures of a list; they are kept in memory by name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: command-line arguments; None takes them from `sys.argv`.

    Raises:
        SystemExit: with the exit status, unless it is 0; see `jitjax.command`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] and arguments[0] in COMMANDS:
        name = arguments[0]
        module = importlib.import_module(COMMANDS[name])
        if status := module.main(arguments[1:], prog=f"jitjax {name}"):
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
    cli_trace.check_arguments(args)
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
    cli_trace.check_distinct(args, outputs.paths[0])
    _prepare_jax()
    if args.save_conditioning is not None:
        return cli_conditioning.save(args, prompt)
    params, conditioning, negative = cli_conditioning.load(args, prompt, conditioning, negative)
    trace = bool(cli_trace.outputs(args))
    # One after another: memory does not grow with the count, all pictures share the compiled
    # programs, and a picture does not depend on the others (each batch size rounds differently).
    for i, picture in enumerate(pictures):
        made = jitjax.sample(
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
            trace=trace,
            **task,
        )
        image, record = made if isinstance(made, tuple) else (made, None)
        pixels = images.to_pixels(np.asarray(image[0]), picture.seed)
        path = outputs.write(i, pixels, picture.prompt, picture.settings)
        now = time.perf_counter()
        command.report(f"{path}: {picture.plan_name}, seed {picture.seed}, {now - start:.1f} s")
        start = now
        if record is not None:
            cli_trace.write(args, params, picture, record)
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
