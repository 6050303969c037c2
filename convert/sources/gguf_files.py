"""Tensors in GGUF files, by llama.cpp's own `gguf` package (the extra `gguf`).

Quantised blocks (Q8_0, Q4_K and all others the package knows) become float32 when they are read.
The names are those of the original release.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..tables.engine import Shape

EXACT = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file; the counterpart of `tensors.Tensor`."""

    path: Path
    shape: Shape
    kind: str
    blocks: Any

    @property
    def dtype(self) -> np.dtype:
        """Of the weight it stands for: bfloat16 where it is quantised."""
        return EXACT.get(self.kind, np.dtype(jnp.bfloat16))

    def map(self) -> np.ndarray:
        """The numbers: mapped from the file, or made from its blocks in float32."""
        from gguf.quants import dequantize

        if self.kind in EXACT:
            return self.blocks.data.reshape(self.shape)
        return dequantize(self.blocks.data, self.blocks.tensor_type).reshape(self.shape)


def scan_gguf(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file by name.

    Raises:
        ValueError: it is not a whole GGUF file, or the `gguf` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f'{path}: reading GGUF needs another package: pip install "jitjax[gguf]"'
        ) from None
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is no complete GGUF file: {error}") from None
    return {
        # GGUF counts axes from the innermost.
        t.name: GgufTensor(path, tuple(int(n) for n in t.shape[::-1]), t.tensor_type.name, t)
        for t in tensors
    }
