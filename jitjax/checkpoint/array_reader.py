"""Reads the arrays of a checkpoint, and says which are damaged."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jitjax.checkpoint import array_layout
from jitjax.nested import flatten, unflatten
from jitjax.validation import Range, check, listed, read_json, shown

MAX_GROUP_BYTES = 256 * 2**20  # leaves that are read together; a larger leaf is read alone


def read_leaf_metadata(path: Path) -> dict[str, Any]:
    """Read orbax's metadata of a part: each leaf's `shape` and `dtype` by name.

    Raises:
        ValueError: the metadata cannot be read, or a leaf's is not as `array_writer.py` writes it.
    """
    problems = [
        problem for file in sorted(path.glob("*/*/zarr.json")) if (problem := _read_chunks(file)[1])
    ]
    if problems:  # TensorStore would abort the process for a chunk that does not fit into memory
        raise ValueError(f"{str(path)!r} cannot be read{listed(problems)}")
    try:
        with array_layout.orbax_context():
            tree: Any = array_layout.orbax().metadata(path.absolute()).metadata
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} cannot be read: {array_layout.root_cause(error)}"
        ) from error
    if tree is None:
        raise ValueError(f"{str(path)!r} cannot be read: the metadata of its arrays is damaged")
    leaves: dict[str, Any] = flatten(tree)
    return leaves


def _read_chunks(file: Path) -> tuple[list[tuple[str, int]], str]:
    """Read a leaf's `zarr.json`.

    Returns:
        name below the leaf's folder and size in bytes of each chunk, and a description of what is
        wrong with the file, or "".
    """
    try:
        raw = read_json(file)
        shape = check(raw.get("shape"), list[Annotated[int, Range(0, 2**53)]], "shape")
        grid = check(raw.get("chunk_grid"), dict[str, Any], "chunk_grid")
        inner = check(grid.get("configuration"), dict[str, Any], "chunk_grid.configuration")
        chunk = check(inner.get("chunk_shape"), list[int], "chunk_shape")
        itemsize = _itemsize(check(raw.get("data_type"), str, "data_type"))
    except (ValueError, OSError) as error:
        return [], f"{file}: {error}"
    fits = len(chunk) == len(shape) and all(
        1 <= c <= max(n, 1) for c, n in zip(chunk, shape, strict=True)
    )
    size = itemsize * math.prod(chunk)
    if not fits or size > max(array_layout.MAX_CHUNK_BYTES, itemsize):
        return [], (
            f"{file}: chunk_shape is {shown(chunk)}; expected at most shape {shown(shape)} and "
            f"{array_layout.MAX_CHUNK_BYTES} bytes"
        )
    counts = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    if math.prod(counts) > array_layout.MAX_CHUNKS:
        return [], f"{file}: shape {shown(shape)} has more than {array_layout.MAX_CHUNKS} chunks"
    return [("/".join(("c", *map(str, index))), size) for index in np.ndindex(*counts)], ""


def _itemsize(data_type: str) -> int:
    try:
        return jnp.dtype(data_type).itemsize
    except TypeError:
        raise ValueError(f"data_type is {shown(data_type)}; expected that of an array") from None


def _damaged_file(path: Path, name: str) -> str:
    """Describe the first missing or incomplete file of a leaf, or return ""."""
    (state,) = (file.parent for file in path.glob("*/_METADATA"))
    folder = state / array_layout.leaf_folder(name)
    chunks, problem = _read_chunks(folder / "zarr.json")
    for chunk, size in chunks:
        file = folder / chunk
        if not file.is_file():
            return f"{file} is missing"
        if (actual := file.stat().st_size) != size:
            return f"{file} has {actual} bytes; expected {size}"
    return problem


def read_arrays(
    path: Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    digests: Mapping[str, str] | None,
    skip: Container[str] = (),
) -> Iterator[tuple[str, jax.Array | None, str]]:
    """Read the arrays of a part, in groups of at most `MAX_GROUP_BYTES`.

    Args:
        path: folder of the part.
        targets: all leaves of the part by name, with the stored dtype and a sharding each.
        digests: expected digest of each leaf, or None to skip the comparison. Arrays sharded
            across processes are not compared.
        skip: names of leaves that are not read.

    Yields:
        name of a leaf, its array (None if unreadable), and a description of its damage, or "".
    """
    intact = {}
    for name, leaf in targets.items():
        if name in skip:
            continue
        if problem := _damaged_file(path, name):
            yield name, None, f"cannot be read: {problem}"
        else:
            intact[name] = leaf
    for group in _group_by_size(intact):
        yield from _read_group(path, targets, group, digests)


class StoredLeaf:
    """A stacked leaf on disk, of which blocks are read one at a time into host memory.

    Raises:
        OSError: a file of the leaf is missing or incomplete.
    """

    def __init__(self, path: Path, name: str):
        import tensorstore

        if problem := _damaged_file(path, name):
            raise OSError(f"cannot be read: {problem}")
        (state,) = (file.parent for file in path.glob("*/_METADATA"))
        folder = state.absolute() / array_layout.leaf_folder(name)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
        self._array = tensorstore.open(spec, read=True, open=True).result()
        self.shape: tuple[int, ...] = tuple(self._array.shape)
        self.dtype = self._array.dtype.numpy_dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, block: int) -> np.ndarray:
        """Read one block."""
        try:
            return self._array[block].read().result()
        except Exception as error:
            raise OSError(f"cannot be read: {array_layout.root_cause(error)}") from error


def _read_group(
    path: Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    names: Sequence[str],
    digests: Mapping[str, str] | None,
) -> Iterator[tuple[str, jax.Array | None, str]]:
    """Read some leaves together; if that fails, bisect them to find the unreadable ones."""
    try:
        arrays = _load_leaves(path, targets, names)
    except Exception as error:
        if len(names) == 1:
            yield names[0], None, f"cannot be read: {array_layout.root_cause(error)}"
            return
        middle = len(names) // 2
        yield from _read_group(path, targets, names[:middle], digests)
        yield from _read_group(path, targets, names[middle:], digests)
        return
    for name in names:
        array = arrays.pop(name)
        yield name, array, compare_digest(array, name, digests)


def _load_leaves(
    path: Path, targets: Mapping[str, jax.ShapeDtypeStruct], names: Sequence[str]
) -> dict[str, jax.Array]:
    # Orbax skips the leaves whose target is `...`.
    target: Any = {name: leaf if name in names else ... for name, leaf in targets.items()}
    with array_layout.orbax_context():
        tree: Any = array_layout.orbax().load(path.absolute(), unflatten(target))
    flat: dict[str, Any] = flatten(tree)
    return {name: flat[name] for name in names}


def compare_digest(array: jax.Array, name: str, digests: Mapping[str, str] | None) -> str:
    """Compare an array with the digest of its name; return a description of a mismatch, or ""."""
    if digests is None or not array.is_fully_addressable:
        return ""
    digest = array_layout.Digest(array.shape, array.dtype)
    for piece in _host_pieces(array):
        digest.update(piece)
    return "" if digest.hexdigest() == digests.get(name) else "differs from what was written"


def _host_pieces(array: jax.Array) -> Iterator[np.ndarray]:
    """Copy an array to the host in pieces along its first axis.

    JAX caches the host copy of an array for as long as the array lives, so a device array is never
    copied as a whole. Arrays on the CPU need no copy.
    """
    if not array.ndim or all(device.platform == "cpu" for device in array.devices()):
        yield np.asarray(array)
        return
    rows = array_layout.chunk_shape(array.shape, array.dtype.itemsize)[0]
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows])


def _group_by_size(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Yield groups of leaf names: at most `MAX_GROUP_BYTES` together, or one larger leaf."""
    group: list[str] = []
    group_bytes = 0
    for name, leaf in leaves.items():
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and group_bytes + size > MAX_GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += size
    if group:
        yield group
