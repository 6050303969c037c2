"""Writes and reads the arrays of a checkpoint, in pieces and with a digest of each array.

Each part of a checkpoint is one orbax checkpoint with one Zarr array per leaf. Orbax reads it. This
module writes orbax's layout by hand, starting from stubs that orbax saves:

    params/<part>/                  saved by orbax, with a stub of one element for each leaf
        state/_METADATA             orbax's, with the `write_shape` of each leaf edited
        state/<leaf>/zarr.json      replaces the stub's; written by TensorStore
        state/<leaf>/c/<i>/<j>/...  replaces the stub's; one file per chunk, by `write_file`

Why by hand: orbax's v1 API saves whole leaves only (orbax-checkpoint 0.12.8, on 2026-11-27 the
newest for Python 3.11 to 3.13). `partial.save` adds leaf after leaf, but never a piece of one, and
the largest leaf of FLUX.1 has 3.6 GB. With leaves of 0.5 GB, orbax took up to 2.1 GB of memory and
about four times as long as `cp`; this module took 0.35 GB and about twice as long as `cp` (process
start included).

Alternative: v1 dropped user-defined leaf handlers in 0.11.40 (May 2026), but the older v0 API still
has `type_handlers.TypeHandler`. With it orbax would write the metadata, and the result loads with
equal values. But `write_shape` would be missing, a load without a target would not give
`jax.Array`, and this module would still write the chunks. It is the way out if editing the metadata
breaks on a later orbax.

Guard: tests/checkpoint and tests/convert/test_streaming.py read what this module writes through
orbax's public API. They must also pass with the newest orbax.

Leaves are split into chunks of at most `MAX_CHUNK_BYTES` along their first axes. A chunk is one
contiguous range of a row-major array and, without compression, one file of the same bytes.

Each leaf has a digest (XXH3, 128 bits). It detects accidental damage at the speed of memory; it is
not cryptographic and does not detect deliberate changes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax.traverse_util import flatten_dict, unflatten_dict

from jitjax.checkpoint.direct_io import write_file
from jitjax.validation import Range, check, listed, read_json, shown

MAX_CHUNK_BYTES = 128 * 2**20
MAX_PENDING_BYTES = 128 * 2**20  # chunks that are still to be written when `Writer.write` returns
MAX_CHUNKS = 100_000  # of one leaf; FLUX.1's largest leaf has 28
MAX_GROUP_BYTES = 256 * 2**20  # leaves that are read together; a larger leaf is read alone


def _orbax() -> Any:
    # Importing orbax takes a second; a program that loads no checkpoint does not pay for it.
    import orbax.checkpoint.experimental.v1 as ocp

    return ocp


@contextmanager
def _orbax_context() -> Iterator[None]:
    """Set orbax's options for this layout, and silence its warnings about the missing OCDBT."""
    context = _orbax().Context()
    context.array.saving.use_zarr3 = True
    context.array.saving.use_ocdbt = False
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        with context:
            yield
    finally:
        logger.setLevel(level)


class Digest:
    """Digest of an array's dtype, shape and bytes, computed piece by piece."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._hash = xxhash.xxh3_128(f"{np.dtype(dtype).name} {tuple(shape)}".encode())

    def update(self, piece: np.ndarray) -> None:
        """Add the array's next piece along its first axis."""
        if piece.size:
            self._hash.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Return the digest of all pieces added so far, as hexadecimal digits."""
        return self._hash.hexdigest()


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the largest chunk of at most `MAX_CHUNK_BYTES` that is contiguous (row-major)."""
    chunk = list(shape)
    for axis in range(len(chunk)):
        row_bytes = max(1, itemsize * math.prod(chunk[axis + 1 :]))
        chunk[axis] = max(1, min(chunk[axis], MAX_CHUNK_BYTES // row_bytes))
        if row_bytes <= MAX_CHUNK_BYTES:
            break
    return tuple(chunk)


def split_into_chunks(
    piece: np.ndarray, chunk: tuple[int, ...], start: int
) -> Iterator[tuple[tuple[int, ...], np.ndarray, int]]:
    """Split a piece of a leaf into chunks.

    Args:
        piece: rows of the leaf from `start` on.
        chunk: shape of the chunks, from `chunk_shape`.
        start: first row of the piece within the leaf; a multiple of `chunk[0]`.

    Yields:
        index of the chunk, its data (uint8), and the bytes of a full chunk. The data of a chunk at
        the end of an axis may be shorter than a full chunk.

    Raises:
        ValueError: `start` is not a multiple of `chunk[0]`.
    """
    if piece.ndim and start % chunk[0]:
        raise ValueError(f"piece starts at row {start}; expected a multiple of {chunk[0]}")
    chunk_bytes = piece.itemsize * math.prod(chunk)
    counts = [-(-n // c) for n, c in zip(piece.shape, chunk, strict=True)]
    for index in np.ndindex(*counts):
        slices = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        data = np.ascontiguousarray(piece[slices or ...]).reshape(-1).view(np.uint8)
        leaf_index = (index[0] + start // chunk[0], *index[1:]) if index else ()
        yield leaf_index, data, chunk_bytes


class Writer:
    """Writes the arrays of one part: `write` takes each piece of each leaf, `finish` ends it."""

    def __init__(self, path: Path):
        self.path = path
        self._leaves_folder = path.with_name(f"{path.name}.leaves")
        self._arrays: dict[str, Any] = {}  # TensorStore arrays
        self._digests: dict[str, Digest] = {}
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pool = ThreadPoolExecutor(2)

    def write(self, name: str, piece: np.ndarray, start: int, shape: tuple[int, ...]) -> None:
        """Write a leaf, or the next piece of it along its first axis.

        Threads write the data after this method returns, so do not change `piece` afterwards.

        Args:
            name: path of the leaf in the tree, joined by "/".
            piece: rows of the leaf from `start` on. All pieces but the last have the same shape.
            start: first row of the piece: 0, or the end of the previous piece.
            shape: shape of the whole leaf.

        Raises:
            ValueError: the leaf is already written.
            OSError: a file cannot be written.
        """
        if start == 0:
            if name in self._arrays:
                raise ValueError(f"leaf {name} is already written; expected each leaf once")
            self._arrays[name] = self._wrap_errors(lambda: self._create_array(name, piece, shape))
            self._digests[name] = Digest(shape, piece.dtype)
        self._digests[name].update(piece)
        folder = self._leaves_folder / _leaf_folder(name)
        chunk = self._arrays[name].chunk_layout.write_chunk.shape or ()  # None for rank 0
        for index, data, size in split_into_chunks(piece, chunk, start):
            path = folder.joinpath("c", *map(str, index))
            self._pending.append((self._pool.submit(write_file, path, data, size), size))
        while sum(size for _, size in self._pending) > MAX_PENDING_BYTES:
            self._wait_for_oldest()

    def finish(self) -> dict[str, str]:
        """Wait for all writes and complete the part.

        Returns:
            digest of each leaf by name, computed from the arrays that were passed to `write`.

        Raises:
            OSError: a file cannot be written.
        """
        while self._pending:
            self._wait_for_oldest()
        self._pool.shutdown()
        self._wrap_errors(self._assemble_checkpoint)
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def close(self) -> None:
        """Stop writing and end the threads; what is not written yet is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _create_array(self, name: str, piece: np.ndarray, shape: tuple[int, ...]) -> Any:
        """Write a leaf's `zarr.json`; the first piece determines the chunk shape."""
        import tensorstore

        chunk = chunk_shape(piece.shape, piece.dtype.itemsize)
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        codec = {"name": "bytes", "configuration": {"endian": "little"}}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._leaves_folder / _leaf_folder(name)}/"},
            "metadata": {
                "shape": shape,
                "data_type": piece.dtype.name,
                "chunk_grid": grid,
                "codecs": [codec],  # no compression: weights do not compress
            },
            "context": {"file_io_sync": False},  # `_assemble_checkpoint` syncs all files
        }
        return tensorstore.open(spec, create=True).result()

    def _wait_for_oldest(self) -> None:
        self._wrap_errors(self._pending.popleft()[0].result)

    def _assemble_checkpoint(self) -> None:
        """Have orbax save a stub for each leaf, then replace the stubs by the arrays."""
        for path in self._leaves_folder.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        shapes = {name: array.shape for name, array in self._arrays.items()}
        stubs = {name: np.zeros(1, array.dtype.numpy_dtype) for name, array in self._arrays.items()}
        with _orbax_context():
            cpu = jax.local_devices(backend="cpu")[0]
            _orbax().save(self.path, unflatten_dict(jax.device_put(stubs, cpu), sep="/"))
        (metadata_file,) = self.path.glob("*/_METADATA")
        metadata = json.loads(metadata_file.read_text())
        for entry in metadata["tree_metadata"].values():
            name = "/".join(key["key"] for key in entry["key_metadata"])
            entry["value_metadata"]["write_shape"] = shapes[name]
        metadata_file.write_text(json.dumps(metadata))
        for name in shapes:
            stub_folder = metadata_file.with_name(_leaf_folder(name))
            shutil.rmtree(stub_folder)
            (self._leaves_folder / _leaf_folder(name)).rename(stub_folder)
        self._leaves_folder.rmdir()

    def _wrap_errors(self, action: Callable[[], Any]) -> Any:
        """Run `action`; raise `OSError` with the part's path for any error in it."""
        try:
            return action()
        except Exception as error:  # a full disk raises many types of error here
            raise OSError(f"{str(self.path)!r} cannot be written: {_root_cause(error)}") from error


def _leaf_folder(name: str) -> str:
    """The name of orbax's folder for a leaf."""
    return name.replace("/", ".")


def _root_cause(error: BaseException) -> str:
    """The first line of the original error, without TensorStore's long specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or repr(error)).splitlines()[0].split(" [tensorstore_spec")[0]


def read_leaf_metadata(path: Path) -> dict[str, Any]:
    """Read orbax's metadata of a part: each leaf's `shape` and `dtype` by name.

    Raises:
        ValueError: the metadata cannot be read, or a leaf's is not as this module writes it.
    """
    problems = [
        problem for file in sorted(path.glob("*/*/zarr.json")) if (problem := _read_chunks(file)[1])
    ]
    if problems:  # TensorStore would abort the process for a chunk that does not fit into memory
        raise ValueError(f"{str(path)!r} cannot be read{listed(problems)}")
    try:
        with _orbax_context():
            tree: Any = _orbax().metadata(path.absolute()).metadata
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read: {_root_cause(error)}") from error
    if tree is None:
        raise ValueError(f"{str(path)!r} cannot be read: the metadata of its arrays is damaged")
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
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
    if not fits or size > max(MAX_CHUNK_BYTES, itemsize):
        return [], (
            f"{file}: chunk_shape is {shown(chunk)}; expected at most shape {shown(shape)} and "
            f"{MAX_CHUNK_BYTES} bytes"
        )
    counts = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    if math.prod(counts) > MAX_CHUNKS:
        return [], f"{file}: shape {shown(shape)} has more than {MAX_CHUNKS} chunks"
    return [("/".join(("c", *map(str, index))), size) for index in np.ndindex(*counts)], ""


def _itemsize(data_type: str) -> int:
    try:
        return jnp.dtype(data_type).itemsize
    except TypeError:
        raise ValueError(f"data_type is {shown(data_type)}; expected that of an array") from None


def _damaged_file(path: Path, name: str) -> str:
    """Describe the first missing or incomplete file of a leaf, or return ""."""
    (state,) = (file.parent for file in path.glob("*/_METADATA"))
    folder = state / _leaf_folder(name)
    chunks, problem = _read_chunks(folder / "zarr.json")
    for chunk, size in chunks:
        file = folder / chunk
        if not file.is_file():
            return f"{file} is missing"
        if (actual := file.stat().st_size) != size:
            return f"{file} has {actual} bytes; expected {size}"
    return problem


def read_arrays(
    path: Path, targets: Mapping[str, jax.ShapeDtypeStruct], digests: Mapping[str, str] | None
) -> Iterator[tuple[str, jax.Array | None, str]]:
    """Read the arrays of a part, in groups of at most `MAX_GROUP_BYTES`.

    Args:
        path: folder of the part.
        targets: all leaves of the part by name, with the stored dtype and a sharding each.
        digests: expected digest of each leaf, or None to skip the comparison. Arrays sharded
            across processes are not compared.

    Yields:
        name of a leaf, its array (None if unreadable), and a description of its damage, or "".
    """
    intact = {}
    for name, leaf in targets.items():
        if problem := _damaged_file(path, name):
            yield name, None, f"cannot be read: {problem}"
        else:
            intact[name] = leaf
    for group in _group_by_size(intact):
        yield from _read_group(path, targets, group, digests)


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
            yield names[0], None, f"cannot be read: {_root_cause(error)}"
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
    with _orbax_context():
        tree: Any = _orbax().load(path.absolute(), unflatten_dict(target, sep="/"))
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return {name: flat[name] for name in names}


def compare_digest(array: jax.Array, name: str, digests: Mapping[str, str] | None) -> str:
    """Compare an array with the digest of its name; return a description of a mismatch, or ""."""
    if digests is None or not array.is_fully_addressable:
        return ""
    digest = Digest(array.shape, array.dtype)
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
    rows = chunk_shape(array.shape, array.dtype.itemsize)[0]
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
