"""Reads single tensors of a LoRA file: finite values of the right kind and shape, or a misfit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..sources.tensors import Tensor, Weights, scan
from ..tables.engine import ConversionError, Shape
from .problems import Misfit

NUMBERS: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
"""safetensors dtype -> dtype of an alpha. bool is not a number."""


class LoraTensors:
    """The tensors of a safetensors file.

    Args:
        path: the file.

    Raises:
        ConversionError: it has no tensors.
        ValueError: it is not a complete safetensors file.
    """

    def __init__(self, path: Path):
        self._tensors = scan(path)
        if not self._tensors:
            raise ConversionError(f"{path} has no tensors; expected a LoRA")
        self._weights = Weights(self._tensors)
        self.keys = tuple(self._weights.shapes)

    def shape(self, key: str) -> Shape:
        """Return the shape of a tensor."""
        return self._weights.shapes[key]

    def values(self, key: str) -> np.ndarray:
        """Return a tensor as it is stored (memory-mapped); its values are finite in float32."""
        if self._weights.dtypes[key] is None:
            kind = self._tensors[key].kind
            raise Misfit(f"has dtype {kind}; expected a floating-point type", key)
        values = self._weights.read(key)
        with np.errstate(over="ignore"):
            if not np.isfinite(np.asarray(values, np.float32)).all():
                raise Misfit("contains NaN or infinity", key)
        return values

    def matrix(self, key: str) -> np.ndarray:
        """Return a matrix as float32 [rows, columns]; also that of a 1 x 1 convolution."""
        shape = self._weights.shapes[key]
        if len(shape) == 4 and shape[2:] != (1, 1):
            raise Misfit(
                f"has shape {list(shape)}, of a convolution; the layers of FLUX are linear", key
            )
        if len(shape) not in (2, 4):
            raise Misfit(f"has shape {list(shape)}; expected a matrix", key)
        return np.asarray(self.values(key), np.float32).reshape(shape[:2])

    def number(self, key: str) -> float:
        """Return a tensor that is one finite number, of any type but bool."""
        tensor = self._tensors[key]
        dtype = NUMBERS.get(tensor.kind)
        if dtype is None or math.prod(tensor.shape) != 1 or not isinstance(tensor, Tensor):
            raise Misfit(f"is {tensor.kind} {list(tensor.shape)}; expected one number", key)
        value = float(np.fromfile(tensor.path, dtype, 1, offset=tensor.start)[0])
        if not math.isfinite(value):
            raise Misfit(f"is {value}; expected a finite number", key)
        return value

    def is_zero(self, key: str) -> bool:
        """Whether a tensor is a weight, and all its values are 0."""
        return self._weights.dtypes[key] is not None and not np.any(self._weights.read(key))


def check_shape(key: str, shape: Shape, expected: Shape) -> None:
    """Raise `Misfit` if a tensor's or layer's shape is not the expected one."""
    if tuple(shape) != tuple(expected):
        raise Misfit(f"has shape {list(shape)}; expected {list(expected)}", key)
