"""Draws how Just-in-Time works, from a run of the bundled checkpoint: docs/how-it-works.webp.

    python -m benchmarks.diagram
    python -m benchmarks.diagram --prompt "a small blue star" --seed 1 --out other.webp

Columns are stages, with what happens between two of them in the column between. Every panel is data
of one run: the plan `4x` with the paper's micro-flow ("hit"), which the drawing explains.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image

import jitjax
from jitjax.latents import token_grid
from jitjax.sampler.grid import Grid

PLAN = jitjax.PLANS["4x"].replace(microflow="hit")
WIDTH, HEIGHT = 900, 616  # in pixels of a page; the file has twice as many for sharp screens
SIDE = 132  # of a panel
LEFTS, TOPS = (102, 263, 424, 585, 746), (74, 254, 434)
GROUND, INK, FADED, NEW = "#f6f8fa", "#1f2328", "#59636e", "#0969da"
EMPTY = 0.88  # brightness of tokens without a value
DIMMED = 0.3
Picture = Float[np.ndarray, "height width 3"]


class Run(NamedTuple):
    """The pictures of one run.

    Attributes:
        stages: of each stage: the state before a step with its anchors bright; the clean
            prediction of that step on the anchors alone; the same lifted to all tokens. The step
            is the last one of the stage; in the final stage the first one, and the last picture.
        transitions: after each stage but the last: the state of the new tokens after the
            micro-flow; their lifted clean prediction; the importance, [rows, columns].
        new: the new tokens of each transition, [rows, columns].
        counts: number of tokens that the transformer runs on in each stage.
        steps: number of steps of each stage.
    """

    stages: list[tuple[Picture, Picture, Picture]]
    transitions: list[tuple[Picture, Picture, np.ndarray]]
    new: list[Bool[np.ndarray, "rows columns"]]
    counts: list[int]
    steps: tuple[int, ...]


def sample_run(
    params: jitjax.FluxParams, prompt: str, *, plan: jitjax.Plan, seed: int, grid: Grid
) -> Run:
    """Sample one picture with a trace, and decode what the drawing shows of it."""
    tokens = grid[0] * grid[1]
    noise_key, key = jax.random.split(jax.random.key(seed))
    noise = jax.random.normal(noise_key, (1, tokens, params.config.transformer.out_channels))
    text = jitjax.encode_prompt(params, prompt)
    last, trace = jitjax.denoise(
        params, text, noise, plan=plan, key=key, grid=grid, guidance=3.0, trace=True
    )
    ends = np.cumsum(trace.stage_steps)
    between = [t for t in trace.transitions if t is not None]
    # Before the last step of a stage, at which its clean prediction is computed.
    before = [trace.states[end - 2] if end > 1 else trace.start for end in ends[:-1]]
    before.append(between[-1].after)
    predictions = [*trace.clean[:-1], trace.predictions()[ends[-2]]]

    def decoded(tokens: Iterable[jax.Array]) -> list[Picture]:
        return [np.asarray(jitjax.decode(params, x, grid=grid)[0]) for x in tokens]

    active = [_mask(index[0], grid) for index in trace.anchors]
    new = [_mask(t.new[0], grid) for t in between]
    clean = decoded(predictions)
    stages = [
        (masked(y, on, dim=DIMMED), masked(x0, on), result)
        for y, x0, on, result in zip(
            decoded(before), clean, active, [*clean[:-1], *decoded([last])], strict=True
        )
    ]
    moved, lifted = decoded(t.after for t in between), decoded(t.lifted for t in between)
    transitions = [
        (masked(after, on), masked(x0, on), np.asarray(t.scores[0]).reshape(grid))
        for after, x0, on, t in zip(moved, lifted, new, between, strict=True)
    ]
    counts = [index.shape[1] for index in trace.anchors]
    return Run(stages, transitions, new, counts, trace.stage_steps)


def _mask(index: Any, grid: Grid) -> Bool[np.ndarray, "rows columns"]:
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[np.asarray(index)] = True
    return mask.reshape(grid)


def masked(picture: Picture, tokens: Bool[np.ndarray, "rows columns"], dim: float = 0) -> Picture:
    """Return a picture of which only `tokens` are as they were.

    Args:
        picture: the picture.
        tokens: which tokens stay.
        dim: brightness that the others keep; at 0 they become light grey.
    """
    rows, columns = (a // b for a, b in zip(picture.shape, tokens.shape, strict=False))
    stay = np.repeat(np.repeat(tokens, rows, 0), columns, 1)[..., None]
    return np.where(stay, picture, dim * picture if dim else EMPTY).astype(np.float32)


def draw(run: Run) -> Figure:
    """Draw a run of three stages."""
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor=GROUND)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.axis("off")

    def text(x: float, y: float, words: str, size: float = 8.6, **style: Any) -> None:
        style = {"color": INK, "ha": "center", "va": "center", **style}
        page.text(x, y, words, fontsize=size, linespacing=1.25, **style)

    def panel(column: int, row: int, picture: np.ndarray, edge: str = FADED, **style: Any) -> None:
        place = (LEFTS[column] / WIDTH, 1 - (TOPS[row] + SIDE) / HEIGHT)
        axis = figure.add_axes((*place, SIDE / WIDTH, SIDE / HEIGHT))
        axis.imshow(picture, interpolation="antialiased", **style)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=edge, linewidth=1)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        page.annotate("", end, start, arrowprops=style)

    for row, words in enumerate(
        (
            "state $y$;\nanchors are\nbright",
            "clean prediction\n$x_0 = y - \\sigma u$\non the anchors",
            "lifted to\nall tokens",
        )
    ):
        text(LEFTS[0] / 2, TOPS[row] + SIDE / 2, words, 8.2)
    total = run.counts[-1]
    first = 1
    for stage, pictures in enumerate(run.stages):
        column = 2 * stage
        center = LEFTS[column] + SIDE / 2
        last = first + run.steps[stage] - 1
        text(center, 22, f"Stage {stage + 1}", 11.5, weight="bold")
        text(center, 50, f"steps {first} to {last}\n{run.counts[stage]} of {total} tokens", 8.2)
        first = last + 1
        for row, picture in enumerate(pictures):
            panel(column, row, picture)
        for row in (0, 1):
            arrow((center, TOPS[row] + SIDE + 5), (center, TOPS[row + 1] - 5))
        text(center + 5, TOPS[0] + SIDE + 24, "transformer", 8.6, ha="left")
        words = "lift" if stage < len(run.stages) - 1 else "all its steps"
        text(center + 5, TOPS[1] + SIDE + 24, words, 8.6, ha="left")
    text(LEFTS[4] + SIDE / 2, TOPS[2] + SIDE + 24, "the picture", weight="bold")
    for i, (moved, lifted, importance) in enumerate(run.transitions):
        column = 2 * i + 1
        left, center = LEFTS[column], LEFTS[column] + SIDE / 2
        bottom = TOPS[2] + SIDE / 2
        text(center, 22, "Transition", 11.5, color=NEW, weight="bold")
        text(
            center,
            50,
            f"after step {sum(run.steps[: i + 1])}\n{run.new[i].sum()} new tokens",
            8.2,
            color=NEW,
        )
        panel(column, 0, moved, NEW)
        panel(column, 1, lifted, NEW)
        panel(column, 2, importance, NEW, cmap="viridis")
        rows, columns = np.nonzero(run.new[i])
        figure.axes[-1].plot(columns, rows, "s", color="white", markersize=1)
        arrow((left - 24, bottom), (left - 6, bottom), NEW)
        shaft = left + 14
        for row in (2, 1):
            arrow((shaft, TOPS[row] - 5), (shaft, TOPS[row - 1] + SIDE + 5), NEW)
        text(center, TOPS[2] + SIDE + 24, "importance, and the\nnew tokens (dots)", color=NEW)
        text(shaft + 7, TOPS[2] - 24, "take $x_0$ of\nthe new tokens", ha="left", color=NEW)
        words = "micro-flow to\n$(1-\\sigma)\\,x_0 + \\sigma\\,$noise"
        text(shaft + 7, TOPS[1] - 24, words, ha="left", color=NEW)
        top = TOPS[0] + SIDE / 2
        arrow((left + SIDE + 6, top), (left + SIDE + 24, top), NEW)
    for stage in (0, 1):
        text(LEFTS[2 * stage] + SIDE / 2, TOPS[2] + SIDE + 24, "repeat for each step\nof the stage")
    return figure


def main() -> None:
    """Sample the run and write the drawing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="a large red star")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/how-it-works.webp"))
    args = parser.parse_args()
    params = jitjax.load("tiny")
    side = params.config.image_size
    grid = token_grid(side, side, params.config)
    figure = draw(sample_run(params, args.prompt, plan=PLAN, seed=args.seed, grid=grid))
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # pyright: ignore[reportAttributeAccessIssue]
    Image.fromarray(pixels).save(args.out, quality=80, method=6)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
