"""The command `jitjax` with a flat picture for each prompt, for tests of what is around the model.

    python tests/flat_program.py "a red circle" -o a.png

It is the installed command in all else: the checkpoint is loaded, the bar counts the steps. Nothing
is traced, so that it takes a second instead of four.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.argv[0] = "jitjax"  # by which `jitjax.startup` knows the command

import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

import jitjax
from jitjax import cli

SECONDS = 0.1
"""Of a step, so that a list takes long enough to be stopped amid it."""


def colour(prompt: str) -> np.ndarray:
    """Return the colour of a prompt's picture, [3], uint8."""
    return np.frombuffer(zlib.crc32(prompt.encode()).to_bytes(4), np.uint8)[:3]


def flat_pictures(
    params: jitjax.FluxParams,
    prompts: str | list[str],
    *,
    height: int,
    width: int,
    plan: jitjax.Plan,
    progress: bool | Callable[[int], Any],
    **options: Any,
) -> np.ndarray:
    """Stand in for `jitjax.sample`; return pictures, [b, height, width, 3], float32."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    hidden = progress is not True or sys.stderr is None
    with tqdm(total=plan.steps, unit="step", disable=hidden) as bar:
        for _ in range(plan.steps):
            time.sleep(SECONDS)
            (progress if callable(progress) else bar.update)(1)
    colours = np.stack([colour(prompt) for prompt in prompts]).astype(np.float32) / 255
    return np.broadcast_to(colours[:, None, None], (len(prompts), height, width, 3))


def install() -> None:
    """Let the command draw flat pictures."""
    jitjax.encode_prompt = lambda params, prompt: prompt
    jitjax.sample = flat_pictures


if __name__ == "__main__":
    install()
    cli.main()
