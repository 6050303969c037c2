"""Bytes of parameters, from their shapes: by dtype, quantisation and division over a mesh."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitjax.checkpoint import abstract_params
from jitjax.config import FluxConfig
from jitjax.nested import flatten
from jitjax.validation import shown

QUANTISED = ("int8", "int4", "float8")
"""Names of the quantisations."""
GROUP = 64
"""Inputs of a kernel that share a scale in int4."""
SCALE_BYTES = {"int8": 4, "float8": 4, "int4": 2}
"""Quantisation -> bytes of a scale."""
KERNEL = re.compile(r"(transformer|t5)/.*blocks/.*/kernel")
"""Paths of the kernels that are quantised, and divided over a mesh: those inside the blocks of the
transformer and of T5. Everything else is small, and whole on every device."""
EMBEDDING = "t5/token_embedding/embedding"
"""Is divided over a mesh too, but not quantised."""


@dataclass(frozen=True)
class Divisions:
    """The axes of a mesh.

    Attributes:
        data: devices over which the batch is divided, each with all parameters.
        fsdp: devices over which batch and parameters are divided; a kernel is gathered when used.
        model: devices over which heads and the features of MLPs are divided.
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.model

    @classmethod
    def of(cls, mesh: Any) -> Divisions:
        """Return the divisions of a mesh.

        Args:
            mesh: None for one device; a `jax.sharding.Mesh`, or a mapping from the names of its
                axes to their sizes; or a string: "2x4" for data x model, "2x2x4" for data x fsdp x
                model.

        Raises:
            ValueError: an axis has another name, or the text is no mesh.
        """
        if mesh is None or isinstance(mesh, cls):
            return mesh or cls()
        if isinstance(mesh, str):
            numbers = [int(n) for n in mesh.split("x")] if re.fullmatch(_MESH, mesh) else []
            if len(numbers) not in (2, 3) or not all(numbers):
                raise ValueError(
                    f"mesh is {shown(mesh)}; expected DATAxMODEL or DATAxFSDPxMODEL, such as 2x4"
                )
            return cls(numbers[0], 1 if len(numbers) == 2 else numbers[1], numbers[-1])
        sizes = dict(getattr(mesh, "shape", mesh))
        unknown = [name for name in sizes if name not in ("data", "fsdp", "model")]
        if unknown:
            raise ValueError(f"mesh has the axis {unknown[0]!r}; expected data, fsdp, model")
        return cls(**{name: int(size) for name, size in sizes.items()})


_MESH = r"\d{1,6}(x\d{1,6}){1,2}"


@functools.lru_cache(maxsize=16)
def leaves(config: FluxConfig, part: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a part's parameters by path, such as "t5/final_norm/scale"."""
    tree: dict[str, Any] = flatten(getattr(abstract_params(config), part))
    return {f"{part}/{name}": tuple(leaf.shape) for name, leaf in tree.items()}


def leaf_bytes(
    path: str,
    shape: tuple[int, ...],
    itemsize: int,
    quantise: str | None = None,
    divisions: Divisions | None = None,
) -> float:
    """Return the bytes of a parameter on one device.

    Args:
        path: path of the parameter.
        shape: its shape; [blocks, inputs, *outputs] if it is quantised.
        itemsize: bytes of a number that is not quantised.
        quantise: a name in `QUANTISED`, or None.
        divisions: the mesh, or None for one device.
    """
    size, is_kernel = math.prod(shape), bool(KERNEL.fullmatch(path))
    total = float(size * itemsize)
    if quantise and is_kernel:
        blocks, inputs, *outputs = shape
        groups = -(-inputs // GROUP) if quantise == "int4" else 1
        values = size / 2 if quantise == "int4" else float(size)
        total = values + SCALE_BYTES[quantise] * blocks * groups * math.prod(outputs)
    if divisions and (is_kernel or path == EMBEDDING):
        total /= divisions.fsdp * divisions.model
    return total


def part_bytes(
    config: FluxConfig,
    part: str,
    itemsize: int,
    quantise: str | None = None,
    divisions: Divisions | None = None,
    within: str = "",
) -> int:
    """Return the bytes of a part on one device; arguments as for `leaf_bytes`.

    Args:
        within: a path below that of the part, such as "decoder", to which to restrict it.
    """
    prefix = f"{part}/{within}"
    return round(
        sum(
            leaf_bytes(path, shape, itemsize, quantise, divisions)
            for path, shape in leaves(config, part).items()
            if path.startswith(prefix)
        )
    )


def largest_leaf(
    config: FluxConfig, parts: tuple[str, ...], itemsize: int, quantise: str | None
) -> int:
    """Return the bytes of the largest parameter, undivided; arguments as for `leaf_bytes`."""
    shapes = [item for part in parts for item in leaves(config, part).items()]
    return round(max(leaf_bytes(path, shape, itemsize, quantise) for path, shape in shapes))


def block_kernels(config: FluxConfig, part: str, stack: str) -> dict[str, int]:
    """Return the number of weights of one block's kernels by name.

    Args:
        config: configuration of the pipeline.
        part: "transformer" or "t5".
        stack: name of the stacked blocks, such as "single_blocks".
    """
    prefix = f"{part}/{stack}/"
    return {
        path.removeprefix(prefix).removesuffix("/kernel"): int(np.prod(shape[1:]))
        for path, shape in leaves(config, part).items()
        if path.startswith(prefix) and path.endswith("/kernel")
    }
