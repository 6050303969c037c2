"""Tensors in GGUF files, read with llama.cpp's `gguf` package (the extra `gguf`).

Quantised blocks (Q8_0, Q4_K and all others that the package supports) become float32 when they are
read. The names are those of the original release, or llama.cpp's for T5 (see `tables/text.py`).
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
        is_readable: whether the package can dequantise this kind.
    """

    path: Path
    shape: Shape
    kind: str
    blocks: Any
    is_readable: bool = True

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.blocks.name

    @property
    def dtype(self) -> np.dtype | None:
        """Dtype of the weight; bfloat16 for BF16 and for quantised blocks, float32 for F64.

        It is None if weights cannot have this kind.
        """
        if not self.is_readable:
            return None
        kind = UNQUANTISED.get(self.kind, np.dtype(jnp.bfloat16))
        return np.dtype(np.float32) if kind == np.float64 else kind

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
    except Exception as error:  # damaged headers raise errors of many types in the package
        size = path.stat().st_size
        raise ValueError(
            f"{path} is not a complete GGUF file: it has {size} bytes, and reading its header or "
            f"tensors fails ({_first_line(error)}); if the download was cut, download it again"
        ) from None
    readable = {kind: _is_readable(kind) for kind in {t.tensor_type for t in tensors}}
    return {
        # GGUF stores the shape with the innermost axis first.
        t.name: GgufTensor(
            path,
            tuple(int(n) for n in t.shape[::-1]),
            t.tensor_type.name,
            t,
            readable[t.tensor_type],
        )
        for t in tensors
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _is_readable(kind: Any) -> bool:
    """Whether the package can dequantise a kind: tried on one block of zeros."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if kind.name in UNQUANTISED:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError, ValueError):
        return False
    return True
