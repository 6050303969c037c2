"""Compares samplers by prompt accuracy, distance to the 50-step dense solve, and cost.

    python -m benchmarks.quality --out quality.jsonl --docs    docs/quality.* and the README's table
    python -m benchmarks.quality --out quality.jsonl           the same table, only printed
    python -m benchmarks.quality --list                        the methods and what they cost
    python -m benchmarks.quality --out dev.jsonl --split dev --methods 4x 4x:fill=dither
    python -m benchmarks.quality --out quick.jsonl --quick     a test of the setup; minutes

The first command takes half an hour on two cores; `--ablations` adds the paper's. All methods
sample each batch of prompts in turn, from the same noise, so that their times are comparable. The
same command resumes an interrupted run; the rows that it has written are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from tqdm import tqdm

import jitjax
from benchmarks.quality import flops, report, summary
from benchmarks.quality.judging import judge_images
from benchmarks.quality.methods import (
    REFERENCE,
    Method,
    ablations,
    dense_evaluations,
    label,
    parse_method,
    standard,
)
from benchmarks.quality.prompts import prompts
from benchmarks.quality.results import Task, open_results, read_rows, unfinished
from benchmarks.quality.runner import Runner
from jitjax.latents import draw_noise, token_grid

QUICK = ["4x", "7x:hit-initial:multistep", "dense-7-beta", "teacache-7", "taylor-7"]
ABLATION_PICTURES = 48
DECODING = 3
"""Time to decode and judge a picture, in evaluations of all tokens; for the time that is left."""
ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def weights_hash(params: jitjax.FluxParams) -> str:
    """Return the XXH3 hash of the transformer's weights, which identifies the checkpoint."""
    digest = xxhash.xxh3_64()
    for leaf in jax.tree.leaves(params.transformer):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def sample_batch(
    runner: Runner, method: Method, tasks: list[Task], batch: int
) -> tuple[np.ndarray, list[int], float]:
    """Sample the images of up to `batch` tasks.

    Returns:
        Images [len(tasks), height, width, 3] in [0, 1], the number of image tokens in each
        evaluation, and the seconds from noise to clean tokens.
    """
    padded = (tasks * batch)[:batch]  # another batch size would compile again
    params = runner.params
    conditioning = jitjax.encode_prompt(params, [prompt.text for _, prompt, _ in padded])
    keys = jax.vmap(jax.random.split)(jnp.stack([jax.random.key(seed) for *_, seed in padded]))
    noise = draw_noise(keys[:, 0], runner.grid, params.config.transformer.out_channels)
    jax.block_until_ready((conditioning, noise))
    start = time.perf_counter()
    tokens, slots = runner(method, conditioning, noise, keys[:, 1])
    tokens.block_until_ready()
    seconds = time.perf_counter() - start
    images = jitjax.decode(params, tokens, grid=runner.grid)
    return np.asarray(images)[: len(tasks)], list(slots), seconds


def run_batch(
    runner: Runner,
    names: list[str],
    tasks: list[Task],
    batch: int,
    compiled: set[str],
    map_function: Callable[..., Iterable],
    report_progress: Callable[[str], None],
) -> list[dict]:
    """Sample and judge the images of a batch of tasks.

    Args:
        runner: runs the methods.
        names: names of the methods whose rows are wanted.
        tasks: up to `batch` tasks.
        batch: batch size; fewer tasks are padded.
        compiled: names of methods that have run before, so that timing them excludes compilation;
            this function adds the names it has run.
        map_function: `map`, or the `map` of a process pool.
        report_progress: called with the name of each method that was run.

    Returns:
        A row per image and method. `REFERENCE` always runs, since images are compared with its.
    """
    text = runner.params.config.text_length
    config = runner.params.config.transformer
    rows: list[dict] = []
    images_by_method: dict[str, np.ndarray] = {}
    dense_seconds = 0.0
    for name in dict.fromkeys([REFERENCE, *names]):
        images, slots, seconds = sample_batch(runner, parse_method(name), tasks, batch)
        images_by_method[name] = images
        if name == REFERENCE:
            dense_seconds = seconds
        times = {}
        if name in compiled:
            times = {"seconds": seconds / batch, "dense": dense_seconds / batch}
        compiled.add(name)
        report_progress(name)
        rows += [
            {
                "method": name,
                "prompt": number,
                "seed": seed,
                "category": prompt.category,
                "text": prompt.text,
                "tflops": flops.run(config, slots, text) / 1e12,
                "evaluations": len(slots),
            }
            | times
            for number, prompt, seed in tasks
        ]
    batch_prompts = [prompt for _, prompt, _ in tasks]
    images_by_task = [
        {name: images[i] for name, images in images_by_method.items()} for i in range(len(tasks))
    ]
    judgements = list(
        map_function(judge_images, batch_prompts, images_by_method[REFERENCE], images_by_task)
    )
    for i, row in enumerate(rows):
        row.update(judgements[i % len(tasks)][row["method"]])
        if row["method"] == REFERENCE:
            del row["psnr"], row["ssim"]
    return [row for row in rows if row["method"] in names]


def cost(runner: Runner, name: str) -> float:
    """Return what a method costs in evaluations of all tokens."""
    method, config = parse_method(name), runner.params.config
    if method.peer:
        return method.evaluations
    return dense_evaluations(config.transformer, method.plan, runner.tokens, config.text_length)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file of JSON lines; an existing one is resumed")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write docs/quality.* and the README's table when all pictures are there",
    )
    parser.add_argument(
        "--methods", nargs="+", help="names (see benchmarks/quality/methods.py) instead of the list"
    )
    parser.add_argument(
        "--ablations",
        action="store_true",
        help=f"also the paper's plans with one choice changed, on {ABLATION_PICTURES} pictures",
    )
    parser.add_argument("--list", action="store_true", help="print the methods and exit")
    parser.add_argument("--split", default="test", help="dev (for tuning) or test (for reporting)")
    parser.add_argument(
        "--per-category", type=int, default=16, help="prompts of each of 6 kinds (default: 16)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--guidance", type=float, default=3.5, help="guidance scale (default: 3.5)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that judge images (default: 1)"
    )
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--quick", action="store_true", help="few methods, 6 images of 256 px")
    return parser


def main() -> None:
    """Append rows to the file until every method has finished every task; write the report."""
    parser = make_parser()
    args = parser.parse_args()
    if args.docs and (args.methods or args.quick or args.split != "test"):
        parser.error("--docs goes with the standard list of methods on the test split only")
    if args.quick:
        args.per_category, args.seeds, args.side, args.batch = 1, 1, 256, 3
        args.methods = args.methods or QUICK
    params = jitjax.load(args.checkpoint)
    config = params.config
    runner = Runner(params, token_grid(args.side, args.side, config), args.guidance)
    names = list(dict.fromkeys([REFERENCE, *(args.methods or standard())]))
    extra = [name for name in ablations() if name not in names] if args.ablations else []
    try:
        plans = {name: repr(parse_method(name)) for name in (*names, *extra)}
        tasks = [
            (number, prompt, seed)
            for number, prompt in enumerate(prompts(args.per_category, args.split, args.seeds))
            for seed in prompt.seeds
        ]
    except ValueError as error:
        parser.error(str(error))
    costs = {name: cost(runner, name) for name in plans}
    if args.list:
        for name in plans:
            print(f"{name:28s}{costs[name]:6.1f} evaluations  {label(name)}")
        print(f"{'a picture by each':28s}{sum(costs.values()):6.1f} evaluations")
        return
    if args.out is None:
        parser.error("--out is missing; expected a file for the results")
    if args.docs:
        try:
            report.check_readme(README.read_text())
        except (OSError, ValueError) as error:
            parser.error(str(error))
    wanted = dict.fromkeys(names, tasks) | dict.fromkeys(extra, tasks[:ABLATION_PICTURES])
    settings = {
        "split": args.split,
        "side": args.side,
        "guidance": args.guidance,
        "weights": weights_hash(params),
    }
    # The folder of --out is left out: it does not matter for a repetition.
    arguments = [word.replace(str(args.out), args.out.name) for word in sys.argv[1:]]
    provenance = {
        "command": shlex.join(["python", "-m", "benchmarks.quality", *arguments]),
        "date": datetime.date.today().isoformat(),
        "checkpoint": Path(args.checkpoint).name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    try:
        rows = open_results(args.out, settings, plans, provenance)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pending = unfinished(wanted, rows, args.batch)
    compiled: set[str] = set()
    with ExitStack() as stack:
        map_function: Callable[..., Iterable] = map
        if args.jobs > 1:
            # A forked process may hang where its parent uses JAX: spawn.
            pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
            map_function = stack.enter_context(pool).map
        work = {name: evaluations + DECODING for name, evaluations in costs.items()}
        left = sum(work[name] for missing, _ in pending for name in {REFERENCE, *missing})
        bar = stack.enter_context(
            tqdm(
                total=left,
                smoothing=0.02,  # methods differ in speed, and the first batch compiles
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            )
        )
        for number, (missing, batch_tasks) in enumerate(pending, 1):

            def report_progress(name: str, number: int = number) -> None:
                bar.set_postfix_str(f"batch {number} of {len(pending)}, {name}", refresh=False)
                bar.update(work[name])

            new_rows = run_batch(
                runner, missing, batch_tasks, args.batch, compiled, map_function, report_progress
            )
            with args.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new_rows)
    header, rows = read_rows(args.out)
    figures = summary.figures(header, rows, names, ablations())
    print(report.markdown(figures))
    if args.docs:
        report.write_docs(figures, ROOT / "docs", README)


if __name__ == "__main__":
    main()
