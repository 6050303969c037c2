"""Draws the pictures of the README's first screen: a plan beside 50 dense steps.

    python -m benchmarks.pictures                              docs/pictures.webp
    python -m benchmarks.pictures --plan 7x --out other.png

The prompts are the first eight of the quality benchmark's test split, the seed is 0 for all: each
picture is what `jitjax "PROMPT" --seed 0 --plan PLAN` draws. None is chosen or left out; how many
are right, by the benchmark's checker, is printed.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

import jitjax
from benchmarks.quality.judging import judge_image
from benchmarks.quality.methods import REFERENCE, dense_evaluations, parse_method, parse_plan
from benchmarks.quality.prompts import CATEGORIES, prompts
from jitjax.latents import token_grid
from jitjax.sampler.plan import DEFAULT_PLAN, Plan

COUNT = 8
COLUMNS = 4
SIDE = 160  # of a picture on the sheet, in pixels
MARGIN = 134  # for the words at the left
GAP = 4
FONT_SIZE = 13
LINE = 17  # from one line of text to the next


def sample_all(params: jitjax.FluxParams, texts: Sequence[str], plan: Plan) -> np.ndarray:
    """Sample a picture for each prompt with seed 0, one after another, as the command line does.

    Returns:
        float32 [len(texts), height, width, 3] in [0, 1].
    """
    key = jnp.stack([jax.random.key(0)])
    return np.concatenate(
        [np.asarray(jitjax.sample(params, text, key=key, plan=plan)) for text in texts]
    )


def sheet(rows: Mapping[str, Float[np.ndarray, "n h w 3"]], texts: Sequence[str]) -> Image.Image:
    """Lay out pictures with their prompts below, the rows one below the other.

    Args:
        rows: pictures in [0, 1] by the words at the left of their row.
        texts: the prompt of each picture of a row.

    Returns:
        The contact sheet: after `COLUMNS` pictures all rows begin anew further down.
    """
    font = ImageFont.load_default(FONT_SIZE)
    captions = [textwrap.wrap(text, SIDE // 7) for text in texts]
    block = len(rows) * (SIDE + GAP) + LINE * max(map(len, captions)) + 3 * GAP
    blocks = -(-len(texts) // COLUMNS)
    image = Image.new("RGB", (MARGIN + COLUMNS * (SIDE + GAP) - GAP, blocks * block), "white")
    draw = ImageDraw.Draw(image)
    for row, (words, pictures) in enumerate(rows.items()):
        for top in range(0, blocks * block, block):
            place = 2, top + row * (SIDE + GAP) + SIDE // 2
            draw.multiline_text(place, words, "black", font, anchor="lm")
        for i, picture in enumerate(pictures):
            left = MARGIN + i % COLUMNS * (SIDE + GAP)
            top = i // COLUMNS * block
            pixels = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
            small = pixels.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            image.paste(small, (left, top + row * (SIDE + GAP)))
            place = left, top + len(rows) * (SIDE + GAP)
            draw.multiline_text(place, "\n".join(captions[i]), "black", font)
    return image


def main() -> None:
    """Sample the pictures and write the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan", default=DEFAULT_PLAN, help="default: %(default)s, that of jitjax.sample"
    )
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/pictures.webp"), help="a WebP, PNG or JPEG file"
    )
    args = parser.parse_args()
    try:
        plan = parse_plan(args.plan)
    except ValueError as error:
        parser.error(str(error))
    params = jitjax.load(args.checkpoint)
    config = params.config
    rows, columns = token_grid(config.image_size, config.image_size, config)
    evaluations = dense_evaluations(config.transformer, plan, rows * columns, config.text_length)
    dense = parse_method(REFERENCE).plan
    plans = {
        f"{dense.steps} dense\nsteps": dense,
        f"plan {args.plan}:\n{dense.steps / evaluations:.1f} times\nfewer\noperations": plan,
    }
    chosen = prompts(-(-COUNT // len(CATEGORIES)), "test", seeds=1)[:COUNT]
    texts = [prompt.text for prompt in chosen]
    pictures = {}
    for words, method in plans.items():
        pictures[words] = sample_all(params, texts, method)
        verdicts = [
            judge_image(picture, prompt)["right"]
            for picture, prompt in zip(pictures[words], chosen, strict=True)
        ]
        print(f"{' '.join(words.split())}: {sum(verdicts)} of {COUNT} right", flush=True)
    sheet(pictures, texts).save(args.out, quality=90)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
