"""Judges samplers: what was asked for, and the distance to the full solve, at what cost.

    python -m benchmarks.quality --out quality.jsonl               the whole table; hours on a CPU
    python -m benchmarks.quality --out dev.jsonl --split dev --methods 4x 4x:fill=dither
    python -m benchmarks.quality --quick --out quick.jsonl         minutes: shows that it works
    python -m benchmarks.quality --part 1/2 --out a.jsonl          half of it
    python -m benchmarks.report quality.jsonl                      then: table and plot

Every batch of prompts is drawn by all methods in turn, from the same noise, so that times compare
side by side, and a run that was stopped goes on where it was: its lines are kept.
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
from benchmarks.quality.judging import mark
from benchmarks.quality.methods import REFERENCE, Method, Runner, all_methods, parse_plan
from benchmarks.quality.prompts import CATEGORIES, Prompt, prompts
from benchmarks.quality.scores import feature_distance
from benchmarks.report import read
from jitjax.latents import draw_noise, token_grid

QUICK = ("4x", "7x:hit-initial", "dense-7", "teacache-7", "taylor-7")
Task = tuple[int, Prompt, int]  # number of the prompt, the prompt, a seed


def fingerprint(params: jitjax.FluxParams) -> str:
    """Of the transformer's weights, to tell which checkpoint made a table."""
    found = xxhash.xxh3_64()
    for leaf in jax.tree.leaves(params.transformer):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def draw(
    runner: Runner, method: Method, tasks: list[Task], batch: int
) -> tuple[np.ndarray, list[int], float]:
    """Pictures, tokens of each evaluation, and seconds from noise to clean tokens."""
    filled = (tasks * batch)[:batch]  # all batches are one compiled program
    params = runner.params
    conditioning = jitjax.encode_prompt(params, [prompt.text for _, prompt, _ in filled])
    keys = jax.vmap(jax.random.split)(jnp.stack([jax.random.key(seed) for *_, seed in filled]))
    noise = draw_noise(keys[:, 0], runner.grid, params.config.transformer.in_channels)
    jax.block_until_ready((conditioning, noise))
    start = time.perf_counter()
    tokens, slots = runner(method, conditioning, noise, keys[:, 1])
    tokens.block_until_ready()
    seconds = time.perf_counter() - start
    images = jitjax.decode(params, tokens, grid=runner.grid)
    return np.asarray(images)[: len(tasks)], list(slots), seconds


def lines(
    runner: Runner,
    methods: dict[str, Method],
    tasks: list[Task],
    batch: int,
    known: set[str],
    warm: set[str],
    each: Callable[..., Iterable],
) -> list[dict]:
    """One line per picture and method that is not in `known`.

    `warm` are the methods that have been compiled; `each` is `map`, or that of a pool of processes.
    """
    text = runner.params.config.text_length
    config = runner.params.config.transformer
    reference, base, found = np.empty(0), 0.0, []
    drawn: dict[str, np.ndarray] = {}
    for name, method in {REFERENCE: methods[REFERENCE], **methods}.items():
        if name in known and name != REFERENCE:
            continue
        images, slots, seconds = draw(runner, method, tasks, batch)
        if name == REFERENCE:
            reference, base = images, seconds
            if name in known:
                continue
        drawn[name] = images
        # The first picture of a size compiles.
        times = {} if name not in warm else {"seconds": seconds / batch, "dense": base / batch}
        warm.add(name)
        same = name == REFERENCE
        pair = (jnp.asarray(images), jnp.asarray(reference))
        features = [] if same else feature_distance(runner.params, *pair).tolist()
        for i, (number, prompt, seed) in enumerate(tasks):
            found.append(
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
                | ({} if same else {"features": features[i]})
            )
    asked = [prompt for _, prompt, _ in tasks]
    pictures = [{name: images[i] for name, images in drawn.items()} for i in range(len(tasks))]
    marks = list(each(mark, asked, reference, pictures))
    for at, line in enumerate(found):
        line.update(marks[at % len(tasks)][line["method"]])
        if line["method"] == REFERENCE:
            del line["psnr"], line["ssim"]
    return found


def part_of(tasks: list[Task], part: str) -> list[Task]:
    """The K-th of N stretches of equal length, of "K/N".

    Raises:
        ValueError: it is not of this form, or K is not in 1 to N.
    """
    k, slash, n = part.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise ValueError(f"part is {part!r}; expected K/N with K from 1 to N, such as 1/2")
    stops = [len(tasks) * i // int(n) for i in (int(k) - 1, int(k))]
    return tasks[slice(*stops)]


def opened(
    path: Path, settings: dict[str, object], made: dict[str, str]
) -> dict[tuple[int, int], set[str]]:
    """Begin or go on with the file of lines: which methods have drawn each (prompt, seed).

    Its first line has `settings` and `made`. In a file that is there the line of a killed run that
    was cut short is dropped, and a "command" that differs is added to those that made it.

    Raises:
        ValueError: the file was made with other settings, or has no whole line.
        OSError: it cannot be read or written.
    """
    done: dict[tuple[int, int], set[str]] = {}
    if not path.exists():
        path.write_text(json.dumps(settings | made) + "\n")
        return done
    head, before = read(path)
    own = {name: head.get(name) for name in settings}
    if own != settings:
        raise ValueError(f"{path} was made with {own}; expected {settings}")
    for name, drawn in before.items():
        for task in drawn:
            done.setdefault(task, set()).add(name)
    if made["command"] not in head["command"].split(" && "):
        head["command"] += " && " + made["command"]
    text = path.read_text()
    rest = text[text.index("\n") + 1 : text.rfind("\n") + 1]
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(head) + "\n" + rest)
    part.replace(path)
    return done


def remaining(
    tasks: list[Task], methods: set[str], done: dict[tuple[int, int], set[str]]
) -> list[Task]:
    """Tasks that not all of `methods` have drawn; `done` has those that have, by (prompt, seed).

    Batches are made of these alone: where more seeds are asked for than before, the pictures that
    are there lie between the new ones.
    """
    return [task for task in tasks if not methods <= done.get((task[0], task[2]), set())]


def main() -> None:
    """Append lines to the file until every task has been drawn by every method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON lines; continued if there")
    parser.add_argument(
        "--methods", nargs="+", help="those that --list shows, or PLAN:FIELD=VALUE:..."
    )
    parser.add_argument("--list", action="store_true", help="print the methods' names and stop")
    parser.add_argument("--split", default="test", help="dev (to choose by) or test (to report)")
    parser.add_argument("--per-category", type=int, default=50, help="prompts (default: 50)")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES))
    parser.add_argument("--seeds", type=int, default=3, help="pictures per prompt (default: 3)")
    parser.add_argument(
        "--part", default="1/1", help="K/N: only the K-th of N parts, for one process on each core"
    )
    parser.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--guidance", type=float, default=3.5, help="strength (default: 3.5)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that judge, for a GPU with many cores"
    )
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--quick", action="store_true", help="few methods, 6 pictures of 256 px")
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
        parser.error("--out is missing: the file that the lines go to")
    chosen = {REFERENCE: methods[REFERENCE]}
    for name in args.methods or methods:
        try:
            chosen[name] = methods[name] if name in methods else Method(parse_plan(name))
        except ValueError as error:
            parser.error(f"{error}; see --list for what has a name")
    runner = Runner(params, grid, args.guidance)

    tasks = [
        (number, prompt, seed)
        for number, prompt in enumerate(prompts(args.per_category, args.split, args.seeds))
        if prompt.category in args.categories
        for seed in prompt.seeds
    ]
    try:
        tasks = part_of(tasks, args.part)
    except ValueError as error:
        parser.error(str(error))
    settings = {
        "split": args.split,
        "side": args.side,
        "guidance": args.guidance,
        "weights": fingerprint(params),
    }
    # Without the folder of --out, which says nothing to whoever runs the command again.
    words = [word.replace(str(args.out), args.out.name) for word in sys.argv[1:]]
    made = {
        "command": shlex.join(["python", "-m", "benchmarks.quality", *words]),
        "date": datetime.date.today().isoformat(),
        "checkpoint": args.checkpoint,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    try:
        done = opened(args.out, settings, made)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    todo = remaining(tasks, set(chosen), done)
    warm: set[str] = set()
    with ExitStack() as stack:
        each: Callable[..., Iterable] = map
        if args.jobs > 1:
            # New processes, not forks: a fork of a process that uses JAX may hang.
            pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
            each = stack.enter_context(pool).map
        bar = stack.enter_context(
            tqdm(total=len(tasks), initial=len(tasks) - len(todo), unit="picture")
        )
        for at in range(0, len(todo), args.batch):
            part = todo[at : at + args.batch]
            known = set.intersection(*(done.get((n, seed), set()) for n, _, seed in part))
            found = lines(runner, chosen, part, args.batch, known, warm, each)
            with args.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in found)
            bar.update(len(part))


if __name__ == "__main__":
    main()
