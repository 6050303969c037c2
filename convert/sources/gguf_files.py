"""Tensors in GGUF files, read with llama.cpp's `gguf` package (the extra `gguf`).

Quantised blocks (Q8_0, Q4_K and all others that the package supports) become float32 when they are
read. The names are those of the original release.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..tables.engine import Shape

UNQUANTISED = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file; has the interface of `tensors.Tensor`.

    Attributes:
        path: the file.
        shape: shape of the tensor.
        kind: GGUF's name of its dtype or quantisation, for example "Q8_0".
        blocks: the package's `ReaderTensor`.
    """

    path: Path
    shape: Shape
    kind: str
    blocks: Any

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight; bfloat16 for BF16 and for quantised blocks."""
        return UNQUANTISED.get(self.kind, np.dtype(jnp.bfloat16))

    def map(self) -> np.ndarray:
        """Return the values: memory-mapped if unquantised, else dequantised to float32."""
        from gguf.quants import dequantize

        if self.kind in UNQUANTISED:
            return self.blocks.data.reshape(self.shape)
        return dequantize(self.blocks.data, self.blocks.tensor_type).reshape(self.shape)


def scan_gguf(path: Path) -> dict[str, GgufTensor]:
    """Return name -> tensor of a GGUF file, without reading the values.

    Raises:
        ValueError: the file is not a complete GGUF file, or the `gguf` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f'{path}: reading GGUF needs the gguf package: pip install "jitjax[gguf]"'
        ) from None
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error}") from None
    return {
        # GGUF stores the shape with the innermost axis first.
        t.name: GgufTensor(path, tuple(int(n) for n in t.shape[::-1]), t.tensor_type.name, t)
        for t in tensors
    }
