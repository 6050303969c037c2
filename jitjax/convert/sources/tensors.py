"""Tensors in safetensors files: headers are read at once, values are memory-mapped on demand.

The safetensors library checks each file, but cannot return fp8 as NumPy arrays, so this module maps
the values itself.

fp8 files come with or without a scale per layer (`X.scale_weight` or `X.weight_scale`, ComfyUI's
two spellings). With scales, reading a weight returns `weight * scale` in float32.
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

from ..original import Part, Rows, original_shapes
from ..tables.engine import ConversionError, Shape, find_mismatches
from ..tables.text import Aliases, canonical_names
from .file_kinds import explain_file, is_gguf
from .gguf_files import GgufTensor, scan_gguf
from .other_models import explain_format, explain_model

BFLOAT16 = np.dtype(jnp.bfloat16)
FP8 = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E5M2": np.dtype(jnp.float8_e5m2)}
WEIGHT_DTYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
} | FP8
"""safetensors dtype name -> NumPy dtype, for the dtypes that weights may have."""
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
FP8_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
"""Name suffixes of the tensors that a layer of an fp8 file has in addition to its weight."""
SCALED_FP8_MARKER = "scaled_fp8"
"""Name of the empty tensor that marks a file with scales."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file.

    Attributes:
        path: the file.
        shape: shape of the tensor.
        kind: safetensors' name of its dtype, for example "BF16".
        start: offset of its first byte in the file.
        name: its name in the file.
    """

    path: Path
    shape: Shape
    kind: str
    start: int
    name: str = ""

    @property
    def dtype(self) -> np.dtype | None:
        """Dtype of the weight; None if weights cannot have this dtype.

        It is bfloat16 for fp8, since bfloat16 represents every fp8 value exactly, and float32 for
        float64, which JAX has only with `jax_enable_x64`.
        """
        if self.kind in FP8:
            return BFLOAT16
        return np.dtype(np.float32) if self.kind == "F64" else WEIGHT_DTYPES.get(self.kind)

    def map(self) -> np.ndarray:
        """Return the values, memory-mapped from the file."""
        dtype, count = WEIGHT_DTYPES[self.kind], math.prod(self.shape)
        if not count:
            return np.empty(self.shape, dtype)
        size = count * dtype.itemsize
        with self.path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # the whole tensor is read soon
                os.posix_fadvise(file.fileno(), self.start, size, os.POSIX_FADV_WILLNEED)
            raw = np.memmap(file, np.uint8, "r", self.start, (size,))
        return raw.view(dtype).reshape(self.shape)


def scan(path: Path) -> Mapping[str, Tensor | GgufTensor]:
    """Return name -> tensor of a safetensors or GGUF file, without reading the values.

    The format is recognised by the first bytes, not by the name.

    Raises:
        ValueError: the file is not a complete safetensors or GGUF file (the message says what it
            is), or a name is not printable.
    """
    tensors = scan_gguf(path) if is_gguf(path) else _scan_safetensors(path)
    odd = [name for name in tensors if not name or not name.isprintable()]
    if odd:  # they would garble messages
        raise ValueError(
            f"{path} has a tensor that is called {odd[0][:60]!r}; expected a name of printable "
            "characters"
        )
    return tensors


def _scan_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(path, "numpy"):  # checks the header against the length of the file
            pass
    except (SafetensorError, OSError):  # OSError for an empty file, which cannot be mapped
        raise ValueError(explain_file(path)) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            path, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0], name
        )
        for name, entry in header.items()
    }


def scan_all(paths: Iterable[Path]) -> dict[str, Tensor | GgufTensor]:
    """Return name -> tensor of the files of one or several models.

    Raises:
        ValueError: a name is in two files, or the tensors are stored in a way or are of a model
            that is not implemented; the message says what they are.
    """
    tensors: dict[str, Tensor | GgufTensor] = {}
    paths = list(paths)
    for path in paths:
        for name, tensor in scan(path).items():
            if name in tensors:
                raise ValueError(f"{name} is both in {tensors[name].path} and in {path}")
            tensors[name] = tensor
    label = paths[0] if len(paths) == 1 else paths[0].parent
    if not tensors:
        raise ValueError(f"{label} has no tensors; expected weights")
    if explanation := explain_format(tensors) or explain_model(tensors):
        raise ValueError(f"{label} is {explanation}")
    return tensors


class Weights:
    """Tensors of one model by canonical name.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype of the weight; None if weights cannot have the stored dtype.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | GgufTensor],
        aliases: Aliases | None = None,
    ):
        names = canonical_names(tensors, aliases or {})
        self._tensors = {canonical: tensors[stored] for canonical, stored in names.items()}
        self._scales: dict[str, Tensor | GgufTensor] = {}
        if any(tensor.kind in FP8 for tensor in tensors.values()):
            self._separate_scales()
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def _separate_scales(self) -> None:
        """Remove the fp8 marker and the scales of all layers from the weights."""
        self._tensors.pop(SCALED_FP8_MARKER, None)
        for name in list(self._tensors):
            suffix = next((s for s in FP8_SUFFIXES if name.endswith(s)), None)
            weight = name.removesuffix(suffix) + ".weight" if suffix else ""
            if weight in self._tensors:
                tensor = self._tensors.pop(name)
                if suffix in SCALE_SUFFIXES:
                    self._scales[weight] = self._checked_scale(weight, tensor)
                elif suffix == ".comfy_quant":
                    _check_comfy_format(tensor)

    def _checked_scale(self, weight: str, scale: Tensor | GgufTensor) -> Tensor | GgufTensor:
        """Return a scale. Raises `ValueError` if it has another dtype or number than expected."""
        rows = self._tensors[weight].shape[:1]
        if scale.dtype is None or math.prod(scale.shape) not in (1, *rows):
            raise ValueError(
                f"{scale.name} in {scale.path} has dtype {scale.kind} and shape "
                f"{list(scale.shape)}; expected one floating scale, or one per row"
            )
        return scale

    def read(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """Return one tensor, or ranges of its rows concatenated."""
        values = _select_rows(self._tensors[name].map(), rows)
        scale = self._scales.get(name)
        if scale is not None:
            factor = np.asarray(scale.map(), np.float32).reshape(-1)
            factor = factor if factor.size == 1 else _select_rows(factor, rows)
            return values.astype(np.float32) * factor.reshape(-1, *(1,) * (values.ndim - 1))
        return values.astype(np.float32) if self._tensors[name].kind in FP8 else values

    def origin(self, name: str) -> str:
        """Say where a tensor is from: its name in its file, and the file."""
        tensor = self._tensors[name]
        return f"{tensor.name or name} in {tensor.path}"

    def kind(self, name: str) -> str:
        """Return the name of the dtype that a tensor is stored in, for example "BF16"."""
        return self._tensors[name].kind


def _check_comfy_format(tensor: Tensor | GgufTensor) -> None:
    """Raise `ValueError` if a layer's `comfy_quant` (JSON) names another format than fp8."""
    if tensor.kind not in ("U8", "I8"):
        return
    raw = np.fromfile(tensor.path, np.uint8, math.prod(tensor.shape), offset=tensor.start)  # type: ignore[union-attr]
    try:
        stored = json.loads(raw.tobytes())["format"]
    except (ValueError, KeyError, TypeError):
        stored = "unreadable"
    if not str(stored).startswith("float8_"):
        raise ValueError(f"{tensor.name} in {tensor.path} has format {stored}; expected float8_...")


class OriginalWeights:
    """Tensors of the original release under diffusers names; see `original.py`.

    Has the attributes of `Weights`, by diffusers name.

    Args:
        weights: the tensors by original name.
        parts: diffusers name -> part of an original tensor.
        shapes: diffusers name -> shape of every tensor of the model.
        label: name of the model, for the error message.
        ignored: original names of tensors that the table does not use.

    Raises:
        ConversionError: original names or shapes do not match; it has all of them.
    """

    def __init__(
        self,
        weights: Weights,
        parts: Mapping[str, Part],
        shapes: Mapping[str, Shape],
        *,
        label: str,
        ignored: Iterable[str] = (),
    ):
        expected = original_shapes(parts, shapes)
        problems = find_mismatches(expected, weights.shapes, expected.keys() | set(ignored))
        if problems:
            raise ConversionError.from_problems(label, problems)
        self._weights, self._parts = weights, parts
        self.shapes = dict(shapes)
        self.dtypes = {name: weights.dtypes[part.source] for name, part in parts.items()}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor by its diffusers name."""
        part = self._parts[name]
        return self._weights.read(part.source, part.rows).reshape(self.shapes[name])

    def origin(self, name: str) -> str:
        """Say where a tensor is from: its name in its file, and the file."""
        return self._weights.origin(self._parts[name].source)

    def kind(self, name: str) -> str:
        """Return the name of the dtype that a tensor is stored in, for example "BF16"."""
        return self._weights.kind(self._parts[name].source)


def _select_rows(values: np.ndarray, rows: Rows | None) -> np.ndarray:
    if rows is None:
        return values
    ranges = [values[start:stop] for start, stop in rows]
    return ranges[0] if len(ranges) == 1 else np.concatenate(ranges)
