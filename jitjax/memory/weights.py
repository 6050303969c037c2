"""Bytes of parameters, from their shapes: by dtype, quantisation and division over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from jitjax.checkpoint import abstract_params
from jitjax.config import FluxConfig
from jitjax.models.partitioning import partition_spec
from jitjax.models.quantised import as_dicts, quantise_tree
from jitjax.nested import flatten
from jitjax.validation import shown


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


@functools.lru_cache(maxsize=64)
def leaves(
    config: FluxConfig, part: str, dtype: str = "float32", quantise: str | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays of a part by path, such as "t5/blocks/mlp/down/kernel/values".

    Args:
        config: configuration of the pipeline.
        part: name of the part.
        dtype: dtype of the arrays that are not quantised.
        quantise: a name in `KINDS`, or None.
    """
    tree: dict[str, Any] = getattr(abstract_params(config, dtype), part)
    if quantise:
        tree = as_dicts(quantise_tree(part, tree, quantise))
    return {f"{part}/{name}": leaf for name, leaf in flatten(tree).items()}


def leaf_bytes(path: str, leaf: jax.ShapeDtypeStruct, divisions: Divisions | None = None) -> int:
    """Return the bytes of an array on one device.

    Args:
        path: path of the array.
        leaf: its shape and dtype.
        divisions: the mesh, or None for one device.
    """
    divided = 1
    if divisions:
        sizes = dataclasses.asdict(divisions)
        for axes in partition_spec(path, leaf.shape, sizes):
            names = (axes,) if isinstance(axes, str) else axes or ()
            divided *= math.prod(sizes[name] for name in names)
    return math.prod(leaf.shape) * leaf.dtype.itemsize // divided


def part_bytes(
    config: FluxConfig,
    part: str,
    dtype: str,
    quantise: str | None = None,
    divisions: Divisions | None = None,
    within: str = "",
) -> int:
    """Return the bytes of a part on one device.

    Args:
        config, part, dtype, quantise: as for `leaves`.
        divisions: the mesh, or None for one device.
        within: a path below that of the part, such as "decoder", to which to restrict it.
    """
    prefix = f"{part}/{within}"
    return sum(
        leaf_bytes(path, leaf, divisions)
        for path, leaf in leaves(config, part, dtype, quantise).items()
        if path.startswith(prefix)
    )


def largest_leaf(
    config: FluxConfig, parts: tuple[str, ...], dtype: str, quantise: str | None
) -> int:
    """Return the bytes of the largest array, undivided; arguments as for `leaves`."""
    return max(
        leaf_bytes(path, leaf)
        for part in parts
        for path, leaf in leaves(config, part, dtype, quantise).items()
    )


def block_kernels(config: FluxConfig, part: str, stack: str) -> dict[str, int]:
    """Return the number of weights of one block's kernels by name.

    Args:
        config: configuration of the pipeline.
        part: "transformer" or "t5".
        stack: name of the stacked blocks, such as "single_blocks".
    """
    prefix = f"{part}/{stack}/"
    return {
        path.removeprefix(prefix).removesuffix("/kernel"): math.prod(leaf.shape[1:])
        for path, leaf in leaves(config, part).items()
        if path.startswith(prefix) and path.endswith("/kernel")
    }
