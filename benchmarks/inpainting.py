"""What inpainting costs, and what is lost by the context that the network does not see.

    python -m benchmarks.inpainting --flops            operations alone, computed at once
    python -m benchmarks.inpainting --out rows.jsonl   and times, errors and drawn shapes of `tiny`
    python -m benchmarks.inpainting --sheet sheet.webp --pictures 4    and the pictures

A picture of one shape is rendered, and the prompt names a second one beside it. A square mask of a
share of the picture stands where the second one belongs. Each line has a plan and a share:

    anchors       image tokens that the network sees in every step
    operations    those of the transformer, over those of the same plan without a mask
    dense         the same, over those of 50 dense steps without a mask
    flux-dev      `operations` and `dense` for FLUX.1-dev at 1024 x 1024 pixels
    seconds       of `denoise`, median; and its ratio to the same plan without a mask, in turns
    error         root mean square inside the mask, of the range, between the picture and that of
                  the same plan when the network sees all tokens
    drawn         share of pictures that the checker finds right: both shapes, their colours and
                  sizes, and no other; `drawn, all` when the network sees all tokens
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jitjax
from benchmarks.checker import check
from benchmarks.pictures import sheet
from benchmarks.quality import flops
from benchmarks.timing import device_info, measure_in_turns, record_row
from jitjax.config import TransformerConfig
from jitjax.latents import token_grid
from jitjax.masks import inpaint_anchors, mask_tokens
from jitjax.sampler.plan import PLANS, Plan
from training.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing, render

SIDE = 512
SHARES = (0.05, 0.1, 0.25, 0.5)
METHODS: dict[str, Plan] = {
    "dense": PLANS["dense"],
    "multistep-12": PLANS["multistep-12"],
    "multistep-12, context 0.25": PLANS["multistep-12"].replace(context=0.25),
    "multistep-12, context 0.1": PLANS["multistep-12"].replace(context=0.1),
    "4x": PLANS["4x"],
    "jit-10x": PLANS["jit-10x"],
}
SHOWN = 0.1
"""Share of the mask on the sheet of pictures."""


def square(share: float, side: int) -> np.ndarray:
    """Return a square mask, [1, side, side], of a share of a picture, where the second shape is.

    Its middle is at 3/4 of the width, or as far to the right as it fits.
    """
    length = round(math.sqrt(share) * side)
    top, left = (side - length) // 2, min(round(0.75 * side - length / 2), side - length)
    mask = np.zeros((1, side, side), np.float32)
    mask[:, top : top + length, left : left + length] = 1
    return mask


def count_anchors(plan: Plan, share: float, side: int) -> int:
    """Return the number of image tokens that the network sees in every step."""
    config = jitjax.FluxConfig()
    grid = token_grid(side, side, config)
    mask = mask_tokens(square(share, side), config)
    anchors = inpaint_anchors(mask, plan=plan, grid=grid, key=jax.random.key(0))
    return grid[0] * grid[1] if anchors is None else anchors.shape[1]


def operations(config: TransformerConfig, text: int, plan: Plan, share: float, side: int) -> dict:
    """Return the operations of inpainting, over those without a mask."""
    tokens = (side // 16) ** 2
    anchors = count_anchors(plan, share, side)
    masked = flops.run(config, [anchors] * plan.steps, text)
    plain, dense = (
        flops.run(config, flops.slots(other, tokens, text), text)
        for other in (plan, PLANS["dense"])
    )
    return {
        "anchors": anchors,
        "operations": round(masked / plain, 3),
        "dense": round(masked / dense, 4),
    }


def scenes(count: int) -> list[Scene]:
    """Draw scenes of two small shapes, left and right, of different colours and shapes."""
    rng, chosen = np.random.default_rng(0), []
    for _ in range(count):
        colours, shapes = (rng.choice(list(words), 2, False) for words in (COLOURS, SHAPES))
        things = tuple(
            Thing(
                str(shape), str(colour), "small", "plain", x, 0.5, SIZES["small"], COLOURS[colour]
            )
            for shape, colour, x in zip(shapes, colours, (0.25, 0.75), strict=True)
        )
        background = str(rng.choice(list(BACKGROUNDS)))
        chosen.append(Scene(things, background, relation="left of"))
    return chosen


def prompt_of(scene: Scene) -> str:
    """Return the caption of a scene of `scenes`."""
    first, second = (f"a small {thing.colour} {thing.shape}" for thing in scene.things)
    return f"{first} left of {second} on a plain {scene.background} background"


class Judge:
    """Pictures of `tiny`, and what they are judged by."""

    def __init__(self, count: int, rounds: int):
        self.params = jitjax.load("tiny")
        self.scenes, self.rounds = scenes(count), rounds
        self.texts = [jitjax.encode_prompt(self.params, prompt_of(s)) for s in self.scenes]
        # Without the second shape.
        self.given = [
            render(Scene(s.things[:1], s.background), SIDE, SIDE)[None] for s in self.scenes
        ]
        self.full: dict[Any, np.ndarray] = {}

    def draw(self, i: int, plan: Plan, share: float) -> np.ndarray:
        """Inpaint a scene; [side, side, 3]."""
        image = jitjax.sample(
            self.params,
            self.texts[i],
            key=jax.random.key(i),
            plan=plan,
            image=self.given[i],
            mask=square(share, SIDE),
        )
        return np.asarray(image)[0]

    def row(self, plan: Plan, share: float) -> dict[str, float]:
        """Return the fields of a line that need pictures."""
        sees_all = Plan(plan.steps, schedule=plan.schedule, solver=plan.solver)
        inside = square(share, SIDE)[0] == 1
        squares, drawn, drawn_by_all = [], [], []
        for i, scene in enumerate(self.scenes):
            if (sees_all, share, i) not in self.full:
                self.full[sees_all, share, i] = self.draw(i, sees_all, share)
            full = self.full[sees_all, share, i]
            picture = full if plan.context_density == 1 else self.draw(i, plan, share)
            squares.append(((picture - full)[inside] ** 2).mean())
            drawn.append(check(picture, scene)["right"])
            drawn_by_all.append(check(full, scene)["right"])
        return {
            "error": round(math.sqrt(np.mean(squares)), 4),
            "drawn": round(float(np.mean(drawn)), 3),
            "drawn, all": round(float(np.mean(drawn_by_all)), 3),
        }

    def times(self, plan: Plan, share: float) -> dict[str, float]:
        """Time `denoise` with and without the mask, in turns."""
        grid = token_grid(SIDE, SIDE, self.params.config)
        noise = jax.random.normal(jax.random.key(0), (1, grid[0] * grid[1], 64))
        options = {"plan": plan, "grid": grid, "key": jax.random.key(1)}
        clean = jitjax.encode(self.params, self.given[0])
        mask = mask_tokens(square(share, SIDE), self.params.config)
        calls = [
            lambda: jitjax.denoise(
                self.params, self.texts[0], noise, clean=clean, mask=mask, **options
            ),
            lambda: jitjax.denoise(self.params, self.texts[0], noise, **options),
        ]
        for call in calls:
            jax.block_until_ready(call())
        seconds = measure_in_turns(calls, self.rounds)
        ratio = float(np.median(seconds[:, 0] / seconds[:, 1]))
        return {"seconds": round(float(np.median(seconds[:, 0])), 3), "ratio": round(ratio, 3)}

    def sheet(self, path: Path) -> None:
        """Write the pictures of all methods below the given ones with their masks."""
        outside = 1 - square(SHOWN, SIDE)[0, :, :, None]
        given = [image[0] * (0.25 + 0.75 * outside) for image in self.given]
        rows = {"given; the\nmask is dark": np.stack(given)}
        for name, plan in METHODS.items():
            pictures = [self.draw(i, plan, SHOWN) for i in range(len(self.scenes))]
            rows[name.replace(", ", ",\n")] = np.stack(pictures)
        sheet(rows, [prompt_of(scene) for scene in self.scenes]).save(path, quality=90)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Print a line for every plan and share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flops", action="store_true", help="only what is computed")
    parser.add_argument("--pictures", type=int, default=8, help="of each line (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of the times (default: 3)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the masks")
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    parser.add_argument("--sheet", type=Path, help="draw the pictures, and nothing else")
    args = parser.parse_args()
    judge = None if args.flops else Judge(args.pictures, args.rounds)
    if args.sheet is not None and judge is not None:
        judge.sheet(args.sheet)
        return
    record_row(args.out, device_info())
    tiny, text = (
        (jitjax.load("tiny", parts=("transformer",)) if judge is None else judge.params).config,
        512,
    )
    for name in args.methods:
        plan = METHODS[name]
        for share in args.shares:
            flux = operations(TransformerConfig(), text, plan, share, 1024)
            row = {
                "plan": name,
                "mask": share,
                **operations(tiny.transformer, tiny.text_length, plan, share, SIDE),
                "flux-dev": [flux["operations"], flux["dense"]],
            }
            if judge is not None:
                row |= judge.times(plan, share) | judge.row(plan, share)
            record_row(args.out, row)


if __name__ == "__main__":
    main()
