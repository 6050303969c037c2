"""Tensors in safetensors files: headers at once, numbers mapped into memory when asked for.

The safetensors library checks each file, but gives no fp8 to NumPy; so the numbers are read here.

fp8 files come with or without a scale per layer (`X.scale_weight` or `X.weight_scale`, ComfyUI's
two spellings). What is read is then `weight * scale`, in float32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ..tables.engine import ConversionError, Shape, misfits
from ..tables.original import Part, Rows, original_shapes
from ..tables.text import canonical_names
from .gguf_files import GgufTensor, scan_gguf

BFLOAT16 = np.dtype(jnp.bfloat16)
FP8 = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E5M2": np.dtype(jnp.float8_e5m2)}
TYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
} | FP8
"""safetensors' names of the types that weights may have."""
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
"""How the names end of what a layer of an fp8 file has beside its weight."""
MARK = "scaled_fp8"
"""Name of an empty tensor that says that there are scales."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `kind` is safetensors' name of its type, `start` its first byte."""

    path: Path
    shape: Shape
    kind: str
    start: int

    @property
    def dtype(self) -> np.dtype | None:
        """Of the weight: bfloat16, which holds every fp8 number, for fp8; None for what is none."""
        return BFLOAT16 if self.kind in FP8 else TYPES.get(self.kind)

    def map(self) -> np.ndarray:
        """The numbers, mapped from the file."""
        dtype, count = TYPES[self.kind], math.prod(self.shape)
        if not count:
            return np.empty(self.shape, dtype)
        size = count * dtype.itemsize
        with self.path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # all of it will be needed, and soon
                os.posix_fadvise(file.fileno(), self.start, size, os.POSIX_FADV_WILLNEED)
            raw = np.memmap(file, np.uint8, "r", self.start, (size,))
        return raw.view(dtype).reshape(self.shape)


def scan(path: Path) -> Mapping[str, Tensor | GgufTensor]:
    """The tensors of a safetensors or GGUF file by name.

    Raises:
        ValueError: it is not a whole file of its kind.
    """
    if path.suffix == ".gguf":
        return scan_gguf(path)
    try:
        with safe_open(path, "numpy"):  # checks the header, and that the file is as long as it says
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            path, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def scan_all(paths: Iterable[Path]) -> dict[str, Tensor | GgufTensor]:
    """The tensors of several files. Raises `ValueError` for a name that is in two of them."""
    found: dict[str, Tensor | GgufTensor] = {}
    for path in paths:
        for name, tensor in scan(path).items():
            if name in found:
                raise ValueError(f"{name} is both in {found[name].path} and in {path}")
            found[name] = tensor
    return found


class Weights:
    """Tensors by canonical name.

    Attributes:
        shapes: name -> shape.
        types: name -> dtype of the weight; None for types that no weight may have.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | GgufTensor],
        aliases: Mapping[str, str] | None = None,
    ):
        names = canonical_names(tensors, aliases or {})
        self._tensors = {canonical: tensors[own] for canonical, own in names.items()}
        self._scales: dict[str, Tensor | GgufTensor] = {}
        if any(tensor.kind in FP8 for tensor in tensors.values()):
            self._set_apart()
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.types = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def _set_apart(self) -> None:
        """Scales and marks of fp8 files are no weights of their own, if their layer is there."""
        self._tensors.pop(MARK, None)
        for name in list(self._tensors):
            ending = next((e for e in BESIDE if name.endswith(e)), None)
            weight = name.removesuffix(ending) + ".weight" if ending else ""
            if weight in self._tensors:
                tensor = self._tensors.pop(name)
                if ending in SCALES:
                    self._scales[weight] = tensor

    def read(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """One tensor, or ranges of its rows one after another."""
        values = _rows(self._tensors[name].map(), rows)
        scale = self._scales.get(name)
        if scale is not None:
            factor = np.asarray(scale.map(), np.float32).reshape(-1)
            if factor.size not in (1, self.shapes[name][0]):
                raise ValueError(f"{name} has {factor.size} scales; expected 1, or 1 for each row")
            factor = factor if factor.size == 1 else _rows(factor, rows)
            return values.astype(np.float32) * factor.reshape(-1, *(1,) * (values.ndim - 1))
        return values.astype(np.float32) if self._tensors[name].kind in FP8 else values


class OriginalWeights:
    """Tensors of the original release under diffusers' names; see `tables/original.py`.

    Args:
        weights: the tensors by their original names.
        parts: the table.
        shapes: of the diffusers tensors that the model has.
        what, ignored: as for `engine.check`.

    Raises:
        ConversionError: original names or shapes do not fit; the message lists them all.
    """

    def __init__(
        self,
        weights: Weights,
        parts: Mapping[str, Part],
        shapes: Mapping[str, Shape],
        *,
        what: str,
        ignored: Iterable[str] = (),
    ):
        expected = original_shapes(parts, shapes)
        problems = misfits(expected, weights.shapes, expected.keys() | set(ignored))
        if problems:
            raise ConversionError.of(what, problems)
        self._weights, self._parts = weights, parts
        self.shapes = dict(shapes)
        self.types = {name: weights.types[part.source] for name, part in parts.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor by diffusers' name."""
        part = self._parts[name]
        return self._weights.read(part.source, part.rows).reshape(self.shapes[name])


def _rows(values: np.ndarray, rows: Rows | None) -> np.ndarray:
    if rows is None:
        return values
    parts = [values[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
