"""Measures what a picture, a mask and a negative prompt do, on the bundled checkpoint.

    python -m benchmarks.editing                         three tasks of 60 cases
    python -m benchmarks.editing recolour --cases 12     one task, fewer cases
    python -m benchmarks.editing --sheets docs           and contact sheets of the first cases

Pictures to start from are drawn by `training.scenes`, and the checker of `benchmarks.checker`
judges the results. Cases depend on their number only, and every way of a task has the same noise.

    recolour   a plain thing gets another colour: by strength, also within a mask of the thing
    add        a second thing within a mask beside the first; without a mask for comparison
    plain      a striped thing loses its stripes: by a negative prompt, and without one

Rows are JSON lines: how many of the cases are right, with a 95 % interval, and how far the ground
has moved, which is the root mean square of the difference over pixels away from the things.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

import jitjax
from benchmarks.checker import check, describe
from benchmarks.pictures import sheet
from benchmarks.quality.scores import interval
from jitjax.sampler.plan import DEFAULT_PLAN
from training.scenes import COLOURS, TOKEN, Scene, Thing, caption, random_scene, render

SIDE = 512
CASES = 60
SHOWN = 4
NEAR = TOKEN
"""Pixels nearer to a thing than this share of the side are no ground; one token."""
LARGEST_MOVE = 1.5 * TOKEN
"""A thing that is farther from its place has moved."""
LARGEST_CHANGE = 0.03
"""Ground whose root mean square has changed by more is not kept: a third of the difference at which
the checker sees an object (0.13 in three channels, 0.075 in each), rounded up."""


@dataclass(frozen=True)
class Case:
    """A picture, and what is to become of it.

    Attributes:
        before: what the picture shows.
        after: what the result is to show.
        prompt: a caption of `after`.
        negative: what the result is not to show; "" for nothing.
        place: the thing around which the mask lies.
        seed: seed of the noise.
    """

    before: Scene
    after: Scene
    prompt: str
    negative: str
    place: Thing
    seed: int


def _rng(task: str, number: int) -> np.random.Generator:
    return np.random.default_rng((zlib.crc32(f"editing/{task}".encode()), number))


def _caption(scene: Scene, seed: int, texture: bool = False) -> str:
    """Name everything but, perhaps, textures."""
    rng = np.random.default_rng(seed)
    return caption(scene, rng, size=True, texture=texture, background=True, relation=True)


def _scene(rng: np.random.Generator, texture: str, things: int) -> Scene:
    """Draw a scene of held-out things, all with one texture."""
    while True:
        scene = random_scene(rng, things, unseen=True)
        kinds = {(thing.shape, thing.colour) for thing in scene.things}
        if {thing.texture for thing in scene.things} == {texture} and len(kinds) == things:
            return scene


def case(task: str, number: int) -> Case:
    """Return a case of a task."""
    rng = _rng(task, number)
    seed = int(rng.integers(2**31))
    if task == "recolour":
        before = _scene(rng, "plain", 1)
        thing = before.things[0]
        colour = str(rng.choice([name for name in COLOURS if name != thing.colour]))
        new = replace(thing, colour=colour, rgb=COLOURS[colour])
        after = replace(before, things=(new,))
        return Case(before, after, _caption(after, seed), "", thing, seed)
    if task == "add":
        after = _scene(rng, "plain", 2)
        before = replace(after, things=after.things[:1], relation="")
        return Case(before, after, _caption(after, seed), "", after.things[1], seed)
    before = _scene(rng, "striped", 1)
    after = replace(before, things=(replace(before.things[0], texture="plain"),))
    negative = _caption(before, seed, texture=True)
    prompt = negative.replace("striped ", "")
    return Case(before, after, prompt, negative, before.things[0], seed)


def ground(scenes: tuple[Scene, ...]) -> Bool[np.ndarray, "h w"]:
    """Return where no thing of any of the scenes is near."""
    rows, columns = (np.indices((SIDE, SIDE)) + 0.5) / SIDE
    is_ground = np.ones((SIDE, SIDE), bool)
    for thing in (thing for scene in scenes for thing in scene.things):
        distance = np.maximum(np.abs(rows - thing.y), np.abs(columns - thing.x))
        is_ground &= distance > thing.radius + NEAR
    return is_ground


def mask_around(thing: Thing, margin: float = 2 * TOKEN) -> Float[np.ndarray, "h w"]:
    """Return a square mask of the pixels around a thing."""
    rows, columns = (np.indices((SIDE, SIDE)) + 0.5) / SIDE
    distance = np.maximum(np.abs(rows - thing.y), np.abs(columns - thing.x))
    return (distance < thing.radius + margin).astype(np.float32)


def judge(image: np.ndarray, wanted: Case) -> dict[str, Any]:
    """Judge a result: what the checker says, whether things are in place, and the ground's change.

    Returns:
        "right": things, colours, shapes, sizes, textures and the relation are as wanted, and things
        of the given picture are in their places; "change": root mean square of the ground's;
        "kept": "right", and the change is small.
    """
    mentioned = ("colour", "shape", "size", "texture")
    result = check(image, wanted.after, mentioned=mentioned)
    found = describe(image)
    in_place = all(
        any(max(abs(f.x - t.x), abs(f.y - t.y)) < LARGEST_MOVE for f in found)
        for t in wanted.before.things
    )
    difference = image - render(wanted.before, SIDE, SIDE)
    change = float(np.sqrt((difference[ground((wanted.before, wanted.after))] ** 2).mean()))
    right = bool(result["right"] and in_place)
    verdicts = {name: bool(value) for name, value in result.items()}
    return verdicts | {"right": right, "change": change, "kept": right and change < LARGEST_CHANGE}


Way = Callable[[Case], Mapping[str, Any]]
"""Keyword arguments of `sample` for a case."""


def _picture(case: Case) -> np.ndarray:
    return render(case.before, SIDE, SIDE)[None]


def _mask(case: Case) -> np.ndarray:
    return mask_around(case.place)[None]


def _strength(value: float) -> Way:
    return lambda case: {"image": _picture(case), "strength": value}


def _masked(value: float) -> Way:
    return lambda case: {"image": _picture(case), "mask": _mask(case), "strength": value}


def _negative(scale: float, strength: float) -> Way:
    return lambda case: {
        "image": _picture(case),
        "strength": strength,
        "negative_prompt": case.negative,
        "true_guidance": scale,
    }


TASKS: dict[str, dict[str, Way]] = {
    "recolour": {
        **{f"strength {value}": _strength(value) for value in (0.6, 0.5, 0.7)},
        **{f"mask, strength {value:g}": _masked(value) for value in (1.0, 0.7, 0.6)},
    },
    "add": {"mask": _masked(1.0), "strength 0.7": _strength(0.7)},
    "plain": {
        "prompt alone": _strength(0.4),
        **{f"negative, {scale:g}": _negative(scale, 0.4) for scale in (4.0, 2.0)},
    },
}
"""Ways of each task by name."""


def run(params: jitjax.FluxParams, cases: list[Case], way: Way, plan: str) -> np.ndarray:
    """Make the picture of each case, one after another, as the command line does."""
    made = []
    for wanted in cases:
        key = jnp.stack([jax.random.key(wanted.seed)])
        image = jitjax.sample(params, wanted.prompt, key=key, plan=plan, **way(wanted))
        made.append(np.asarray(image)[0])
    return np.stack(made)


def measure(
    params: jitjax.FluxParams, task: str, count: int, plan: str
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield the row of each way of a task, and its pictures."""
    cases = [case(task, number) for number in range(count)]
    for name, way in TASKS[task].items():
        images = run(params, cases, way, plan)
        verdicts = [judge(image, wanted) for image, wanted in zip(images, cases, strict=True)]
        row = {"row": task, "way": name, "plan": plan, "cases": count}
        for verdict in ("right", "kept"):
            values = np.array([v[verdict] for v in verdicts], float)
            row |= {verdict: int(values.sum()), f"{verdict}_interval": list(interval(values))}
        row["change"] = float(np.median([v["change"] for v in verdicts]))
        row |= {
            name: sum(v[name] for v in verdicts)
            for name in ("count", "colour", "shape", "size", "texture")
        }
        yield row, images


def main() -> None:
    """Measure the tasks; print and write rows; draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", help=f"any of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--cases", type=int, default=CASES, help="default: %(default)s")
    parser.add_argument("--plan", default=DEFAULT_PLAN, help="default: %(default)s")
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--out", type=Path, help="append the rows to a file, too")
    parser.add_argument(
        "--sheets", type=Path, metavar="FOLDER", help="draw the first cases: editing-TASK.webp"
    )
    args = parser.parse_args()
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown:
        parser.error(f"task is {unknown[0]!r}; expected any of {', '.join(TASKS)}")
    if args.cases < 1:
        parser.error(f"--cases is {args.cases}; expected 1 or more")
    params = jitjax.load(args.checkpoint)
    for task in args.tasks or TASKS:
        cases = [case(task, number) for number in range(min(SHOWN, args.cases))]
        shown = {"the picture": np.concatenate([_picture(wanted) for wanted in cases])}
        for row, images in measure(params, task, args.cases, args.plan):
            print(json.dumps(row), flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            shown[row["way"].replace(", ", ",\n")] = images[:SHOWN]
        if args.sheets is not None:
            file = args.sheets / f"editing-{task}.webp"
            sheet(shown, [wanted.prompt for wanted in cases]).save(file, quality=85)


if __name__ == "__main__":
    main()
