"""Checks the argument `loras`, and finds the file of each LoRA."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from jitjax.validation import shown

from ..tables.engine import ConversionError
from .strengths import WEIGHTS_FILE

Loras = Sequence[tuple[str | os.PathLike[str], float]]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FOLDER_FILES = (WEIGHTS_FILE, "pytorch_lora_weights.safetensors")
"""Names of LoRA files that PEFT and diffusers write into a folder."""


def check_pairs(loras: Loras) -> list[tuple[Path, float]]:
    """Return the (file, scale) pairs. Raises `ValueError` if `loras` is anything else."""
    expected = 'expected a list of (file, scale) pairs, for example [("ink.safetensors", 0.7)]'
    if not isinstance(loras, list | tuple):
        raise ValueError(f"loras is {shown(loras)}; {expected}")
    pairs = []
    for pair in loras:
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not isinstance(pair[0], str | os.PathLike)
            or pair[0] == ""
        ):
            raise ValueError(f"loras has the entry {shown(pair)}; {expected}")
        path = Path(pair[0])
        try:
            scale = math.nan if isinstance(pair[1], str | bytes | bool) else float(pair[1])
        except (TypeError, ValueError, OverflowError):
            scale = math.nan
        if not math.isfinite(scale):
            raise ValueError(f"{path}: scale is {shown(pair[1])}; expected a finite number")
        pairs.append((path, scale))
    return pairs


def find_files(loras: Loras) -> list[tuple[Path, float]]:
    """Return (safetensors file, scale) of each LoRA; opens none of them.

    Raises:
        FileNotFoundError, ConversionError, ValueError: as `check_pairs` and `find_file` do.
    """
    return [(find_file(path), scale) for path, scale in check_pairs(loras)]


def find_file(path: Path) -> Path:
    """Return the safetensors file of a LoRA: the path itself, or the one in a folder.

    Raises:
        FileNotFoundError: there is no such file, or several.
        ConversionError: it is a pickle, or a GGUF file.
    """
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        files = [name for name in FOLDER_FILES if name in names]
        files = files or [name for name in names if name.endswith(".safetensors")]
        files = files or [name for name in names if name.endswith(PICKLES)]
        if len(files) != 1:
            raise FileNotFoundError(
                f"{path} has {', '.join(files) or 'no safetensors file'}; expected one LoRA file, "
                f"for example {WEIGHTS_FILE}"
            )
        path = path / files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a safetensors file")
    if path.suffix.lower() in PICKLES:
        raise ConversionError(
            f"{path} is a pickle, which is not read, since it may run code; save it as safetensors"
        )
    if path.suffix.lower() == ".gguf":
        raise ConversionError(f"{path} is a GGUF file; expected a LoRA as safetensors file")
    return path
