"""Compares samplers by prompt accuracy, distance to the 50-step dense solve, and cost.

    python -m benchmarks.quality --out quality.jsonl               all methods; hours on a CPU
    python -m benchmarks.quality --out dev.jsonl --split dev --methods 4x 4x:fill=dither
    python -m benchmarks.quality --quick --out quick.jsonl         a test of the setup; minutes
    python -m benchmarks.quality --part 1/2 --out a.jsonl          the first half of the tasks
    python -m benchmarks.report quality.jsonl                      table and plot of the results

All methods sample each batch of prompts in turn, from the same noise, so that their times are
comparable. An interrupted run resumes; the rows that it has written are kept.
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
from benchmarks.quality import flops
from benchmarks.quality.judging import judge_images
from benchmarks.quality.methods import REFERENCE, Method, Runner, all_methods, parse_plan
from benchmarks.quality.prompts import CATEGORIES, Prompt, prompts
from benchmarks.quality.scores import feature_distance
from benchmarks.report import read_rows
from jitjax.latents import draw_noise, token_grid

QUICK = ("4x", "7x:hit-initial", "dense-7", "teacache-7", "taylor-7")
Task = tuple[int, Prompt, int]  # (index of the prompt, prompt, seed)


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
    noise = draw_noise(keys[:, 0], runner.grid, params.config.transformer.in_channels)
    jax.block_until_ready((conditioning, noise))
    start = time.perf_counter()
    tokens, slots = runner(method, conditioning, noise, keys[:, 1])
    tokens.block_until_ready()
    seconds = time.perf_counter() - start
    images = jitjax.decode(params, tokens, grid=runner.grid)
    return np.asarray(images)[: len(tasks)], list(slots), seconds


def run_batch(
    runner: Runner,
    methods: dict[str, Method],
    tasks: list[Task],
    batch: int,
    finished: set[str],
    compiled: set[str],
    map_function: Callable[..., Iterable],
) -> list[dict]:
    """Sample and judge the images of a batch of tasks.

    Args:
        runner: runs the methods.
        methods: the methods by name, `REFERENCE` among them.
        tasks: up to `batch` tasks.
        batch: batch size; fewer tasks are padded.
        finished: names of methods whose rows exist already.
        compiled: names of methods that have run before, so that timing them excludes compilation;
            this function adds the names it has run.
        map_function: `map`, or the `map` of a process pool.

    Returns:
        A row per image and method, except for the methods in `finished`.
    """
    text = runner.params.config.text_length
    config = runner.params.config.transformer
    reference, dense_seconds, rows = np.empty(0), 0.0, []
    images_by_method: dict[str, np.ndarray] = {}
    for name, method in {REFERENCE: methods[REFERENCE], **methods}.items():
        if name in finished and name != REFERENCE:
            continue
        images, slots, seconds = sample_batch(runner, method, tasks, batch)
        if name == REFERENCE:
            reference, dense_seconds = images, seconds
            if name in finished:
                continue
        images_by_method[name] = images
        times = {}
        if name in compiled:
            times = {"seconds": seconds / batch, "dense": dense_seconds / batch}
        compiled.add(name)
        is_reference = name == REFERENCE
        pair = (jnp.asarray(images), jnp.asarray(reference))
        features = [] if is_reference else feature_distance(runner.params, *pair).tolist()
        for i, (number, prompt, seed) in enumerate(tasks):
            rows.append(
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
                | ({} if is_reference else {"features": features[i]})
            )
    batch_prompts = [prompt for _, prompt, _ in tasks]
    images_by_task = [
        {name: images[i] for name, images in images_by_method.items()} for i in range(len(tasks))
    ]
    judgements = list(map_function(judge_images, batch_prompts, reference, images_by_task))
    for i, row in enumerate(rows):
        row.update(judgements[i % len(tasks)][row["method"]])
        if row["method"] == REFERENCE:
            del row["psnr"], row["ssim"]
    return rows


def select_part(tasks: list[Task], part: str) -> list[Task]:
    """Return the K-th of N consecutive parts of nearly equal length, for `part` "K/N".

    Raises:
        ValueError: `part` has another form, or K is not in 1 to N.
    """
    number, slash, count = part.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part is {part!r}; expected K/N with K from 1 to N, such as 1/2")
    stops = [len(tasks) * i // int(count) for i in (int(number) - 1, int(number))]
    return tasks[slice(*stops)]


def open_results(
    path: Path, settings: dict[str, object], provenance: dict[str, str]
) -> dict[tuple[int, int], set[str]]:
    """Create a file of results, or prepare an existing one to be resumed.

    The first line of the file is a header with `settings` and `provenance`. In an existing file an
    incomplete last line is removed, and a new "command" is added to the header's.

    Args:
        path: the file of JSON lines.
        settings: what must be equal for all rows of a file.
        provenance: "command" and other facts, recorded once.

    Returns:
        The names of the finished methods by (prompt index, seed).

    Raises:
        ValueError: the file was made with other settings, or has no complete line.
        OSError: it cannot be read or written.
    """
    finished_methods: dict[tuple[int, int], set[str]] = {}
    if not path.exists():
        path.write_text(json.dumps(settings | provenance) + "\n")
        return finished_methods
    header, rows_by_method = read_rows(path)
    recorded = {name: header.get(name) for name in settings}
    if recorded != settings:
        raise ValueError(f"{path} was made with {recorded}; expected {settings}")
    for name, rows in rows_by_method.items():
        for task in rows:
            finished_methods.setdefault(task, set()).add(name)
    if provenance["command"] not in header["command"].split(" && "):
        header["command"] += " && " + provenance["command"]
    text = path.read_text()
    rows_text = text[text.index("\n") + 1 : text.rfind("\n") + 1]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(header) + "\n" + rows_text)
    temporary.replace(path)
    return finished_methods


def unfinished_tasks(
    tasks: list[Task], methods: set[str], finished_methods: dict[tuple[int, int], set[str]]
) -> list[Task]:
    """Return the tasks that some of `methods` have not finished.

    Where a run is resumed with more seeds, finished tasks lie between unfinished ones: batches are
    built after this selection, so that none is partly finished for that reason.

    Args:
        tasks: all tasks.
        methods: names of all methods.
        finished_methods: names of the finished methods by (prompt index, seed).
    """
    return [
        (number, prompt, seed)
        for number, prompt, seed in tasks
        if not methods <= finished_methods.get((number, seed), set())
    ]


def main() -> None:
    """Append rows to the file until every method has finished every task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file of JSON lines; an existing one is resumed")
    parser.add_argument(
        "--methods", nargs="+", help="names that --list prints, or PLAN:FIELD=VALUE:..."
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of all methods and exit"
    )
    parser.add_argument("--split", default="test", help="dev (for tuning) or test (for reporting)")
    parser.add_argument(
        "--per-category", type=int, default=50, help="prompts per category (default: 50)"
    )
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES))
    parser.add_argument("--seeds", type=int, default=3, help="images per prompt (default: 3)")
    parser.add_argument(
        "--part", default="1/1", help="K/N: the K-th of N parts of the tasks, to split the work"
    )
    parser.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--guidance", type=float, default=3.5, help="guidance scale (default: 3.5)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that judge images (default: 1)"
    )
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--quick", action="store_true", help="few methods, 6 images of 256 px")
    args = parser.parse_args()
    if args.quick:
        args.per_category, args.seeds, args.side, args.batch = 1, 1, 256, 3
        args.methods = args.methods or list(QUICK)
    params = jitjax.load(args.checkpoint)
    grid = token_grid(args.side, args.side, params.config)
    methods = all_methods(params.config.transformer, grid[0] * grid[1], params.config.text_length)
    if args.list:
        print("\n".join(methods))
        return
    if args.out is None:
        parser.error("--out is missing; expected a file for the results")
    selected = {REFERENCE: methods[REFERENCE]}
    for name in args.methods or methods:
        try:
            selected[name] = methods[name] if name in methods else Method(parse_plan(name))
        except ValueError as error:
            parser.error(f"{error}; --list prints all names")
    runner = Runner(params, grid, args.guidance)

    tasks = [
        (number, prompt, seed)
        for number, prompt in enumerate(prompts(args.per_category, args.split, args.seeds))
        if prompt.category in args.categories
        for seed in prompt.seeds
    ]
    try:
        tasks = select_part(tasks, args.part)
    except ValueError as error:
        parser.error(str(error))
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
        "checkpoint": args.checkpoint,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    try:
        finished_methods = open_results(args.out, settings, provenance)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pending = unfinished_tasks(tasks, set(selected), finished_methods)
    compiled: set[str] = set()
    with ExitStack() as stack:
        map_function: Callable[..., Iterable] = map
        if args.jobs > 1:
            # A forked process may hang where its parent uses JAX: spawn.
            pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
            map_function = stack.enter_context(pool).map
        bar = stack.enter_context(
            tqdm(total=len(tasks), initial=len(tasks) - len(pending), unit="image")
        )
        for start in range(0, len(pending), args.batch):
            part = pending[start : start + args.batch]
            finished = set.intersection(
                *(finished_methods.get((number, seed), set()) for number, _, seed in part)
            )
            rows = run_batch(runner, selected, part, args.batch, finished, compiled, map_function)
            with args.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            bar.update(len(part))


if __name__ == "__main__":
    main()
