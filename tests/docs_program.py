"""Runs the Python blocks of a page, one after another, as one program; for `test_docs.py`.

    python tests/docs_program.py docs/recipes.md

They run as they stand, in the working directory, but pictures have 64 px by default, and the models
that no package contains ("flux-canny", ...) are `tiny` with another random transformer.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from golden import build
from PIL import Image
from safetensors.numpy import save_file

import jitjax

STAND_INS = {"flux-canny": 128, "flux-fill": 384, "flux-kontext": 64}
"""Models -> channels of an input token."""
load = jitjax.load


def load_small(path: str, **settings: Any) -> jitjax.FluxParams:
    """Load `tiny`, or what stands in for a larger model, with small pictures as the default."""
    channels = STAND_INS.get(path, 64)
    params = load("tiny" if path in STAND_INS else path, **settings)
    params = params if channels == 64 else build.with_input_channels(params, channels)
    config = dataclasses.replace(params.config, image_size=64)
    return dataclasses.replace(params, config=config)


def write_inputs() -> None:
    """Write the files that the recipes read: a picture, and a LoRA of one layer."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (96, 96, 3), np.uint8)).save("picture.png")
    width = load("tiny", parts=("transformer",)).config.transformer.hidden
    layer = "transformer.transformer_blocks.0.attn.to_q.lora_"
    shapes = {"A": (2, width), "B": (width, 2)}
    lora = {f"{layer}{m}.weight": random.normal(size=shapes[m]) for m in shapes}
    save_file({name: x.astype(np.float32) for name, x in lora.items()}, "style.safetensors")


def main(page: Path) -> None:
    """Run the blocks of a page."""
    gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects, few of them in cycles
    jitjax.load = load_small
    matplotlib.use("Agg")
    write_inputs()
    text = page.read_text()
    names: dict[str, Any] = {}
    blocks = 0
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        above = "\n" * text.count("\n", 0, block.start(1))  # for the line numbers of tracebacks
        exec(compile(above + block[1], str(page), "exec"), names)
        blocks += 1
    importlib.import_module("jitjax.cli")
    assert not {"torch", "diffusers"} & set(sys.modules), "torch is imported, which users need not"
    print(blocks, "blocks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
