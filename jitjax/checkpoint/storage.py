"""Arrays on disk: written piece by piece as they come, read on to any sharding.

A part of a checkpoint is one orbax checkpoint, a Zarr array for each leaf. Orbax reads it, and
writes all but the numbers: it takes whole leaves only, of which the largest of FLUX.1 has 3.6 GB.
Leaves are cut into chunks of at most `CHUNK` bytes along their first axes: a chunk is one range of
memory and, as nothing is compressed, one file of the same bytes. No more than `AHEAD` bytes and one
piece wait in memory to be written, no more than `GROUP` bytes or one leaf to be checked.

Every leaf has a digest (XXH3, 128 bits: it finds damage at the speed of memory; it is no proof
against somebody who damages on purpose).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from flax.traverse_util import flatten_dict, unflatten_dict

from jitjax.checkpoint.direct_io import write_file

AHEAD = 128 * 2**20
GROUP = 256 * 2**20
CHUNK = 128 * 2**20


def _orbax() -> Any:
    # Importing orbax takes a second, which a program that loads no checkpoint need not wait for.
    import orbax.checkpoint.experimental.v1 as ocp

    return ocp


@contextmanager
def _context() -> Iterator[None]:
    """Orbax, told how the arrays are stored; without its warnings that there is no database."""
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
    """Of an array's dtype, shape and bytes, which may come in pieces."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._found = xxhash.xxh3_128(f"{np.dtype(dtype).name} {tuple(shape)}".encode())

    def update(self, piece: np.ndarray) -> None:
        """Take the next piece along the first axis."""
        if piece.size:
            self._found.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def hex(self) -> str:
        """The digest of what came so far."""
        return self._found.hexdigest()


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The largest chunk of at most `CHUNK` bytes that is one range of a row-major array."""
    chunk = list(shape)
    for axis in range(len(chunk)):
        row = max(1, itemsize * math.prod(chunk[axis + 1 :]))
        chunk[axis] = max(1, min(chunk[axis], CHUNK // row))
        if row <= CHUNK:
            break
    return tuple(chunk)


def chunks(
    piece: np.ndarray, chunk: tuple[int, ...], start: int
) -> Iterator[tuple[tuple[int, ...], np.ndarray, int]]:
    """The chunks of a leaf that its rows from `start` on fill: index, bytes (uint8), full size.

    At an array's end a chunk has fewer bytes than its full size. `chunk` is from `chunk_shape`.
    """
    if piece.ndim and start % chunk[0]:
        raise ValueError(f"rows from {start} on do not begin a chunk of {chunk[0]}")
    size = piece.itemsize * math.prod(chunk)
    counts = [-(-n // c) for n, c in zip(piece.shape, chunk, strict=True)]
    for index in np.ndindex(*counts):
        where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        part = np.ascontiguousarray(piece[where or ...]).reshape(-1).view(np.uint8)
        yield (index[0] + start // chunk[0], *index[1:]) if index else (), part, size


class Writer:
    """Writes one part; the checkpoint is complete with `finish`."""

    def __init__(self, path: Path):
        self.path = path
        self._leaves = path.with_name(f"{path.name}.leaves")
        self._stores: dict[str, Any] = {}
        self._digests: dict[str, Digest] = {}
        self._writing: deque[tuple[Future[None], int]] = deque()
        self._pool = ThreadPoolExecutor(2)

    def add(self, name: str, piece: np.ndarray, start: int, shape: tuple[int, ...]) -> None:
        """Give a leaf, or its next piece along its first axis.

        Args:
            name: its path in the tree, parts joined by "/".
            piece: its rows from `start` on; not to be changed afterwards. All but the last have
                as many as the first.
            start: 0, or where the last piece ended.
            shape: of the whole leaf.

        Raises:
            OSError: it cannot be written.
        """
        if start == 0:
            if name in self._stores:
                raise ValueError(f"{name} was written already")
            self._stores[name] = self._try(lambda: self._open(name, piece, shape))
            self._digests[name] = Digest(shape, piece.dtype)
        self._digests[name].update(piece)
        folder = self._leaves / _folder(name)
        for key, part, size in chunks(
            piece, self._stores[name].chunk_layout.write_chunk.shape, start
        ):
            path = folder.joinpath("c", *map(str, key))
            self._writing.append((self._pool.submit(write_file, path, part, size), size))
        while sum(size for _, size in self._writing) > AHEAD:
            self._wait()

    def finish(self) -> dict[str, str]:
        """Make the checkpoint complete. Returns leaf -> digest of what was given to be written."""
        while self._writing:
            self._wait()
        self._pool.shutdown()
        self._try(self._assemble)
        return {name: digest.hex() for name, digest in self._digests.items()}

    def _open(self, name: str, piece: np.ndarray, shape: tuple[int, ...]) -> Any:
        import tensorstore

        chunk = chunk_shape(piece.shape, piece.dtype.itemsize)
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        codec = {"name": "bytes", "configuration": {"endian": "little"}}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._leaves / _folder(name)}/"},
            "metadata": {
                "shape": shape,
                "data_type": piece.dtype.name,
                "chunk_grid": grid,
                "codecs": [codec],  # no compression: weights do not compress
            },
            "context": {"file_io_sync": False},  # all at the end
        }
        return tensorstore.open(spec, create=True).result()

    def _wait(self) -> None:
        self._try(self._writing.popleft()[0].result)

    def _assemble(self) -> None:
        """Have orbax write a checkpoint of the same tree, and put the arrays into it."""
        for path in self._leaves.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        shapes = {name: store.shape for name, store in self._stores.items()}
        stubs = {name: np.zeros(1, store.dtype.numpy_dtype) for name, store in self._stores.items()}
        with _context():
            cpu = jax.local_devices(backend="cpu")[0]
            _orbax().save(self.path, unflatten_dict(jax.device_put(stubs, cpu), sep="/"))
        (metadata,) = self.path.glob("*/_METADATA")
        told = json.loads(metadata.read_text())
        for entry in told["tree_metadata"].values():
            name = "/".join(key["key"] for key in entry["key_metadata"])
            entry["value_metadata"]["write_shape"] = shapes[name]
        metadata.write_text(json.dumps(told))
        for name in shapes:
            shutil.rmtree(metadata.with_name(_folder(name)))
            (self._leaves / _folder(name)).rename(metadata.with_name(_folder(name)))
        self._leaves.rmdir()

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a full disk raises many kinds here
            raise OSError(f"{str(self.path)!r} cannot be written: {_reason(error)}") from error


def _folder(name: str) -> str:
    """Where orbax keeps a leaf."""
    return name.replace("/", ".")


def _reason(error: BaseException) -> str:
    """The first line of what it came from, without tensorstore's long specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or repr(error)).splitlines()[0].split(" [tensorstore_spec")[0]


def stored(path: Path) -> dict[str, Any]:
    """Name -> leaf, with `shape` and `dtype`, of a part. Raises `ValueError` if damaged."""
    try:
        with _context():
            tree: Any = _orbax().metadata(path.absolute()).metadata
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read: {_reason(error)}") from error
    if tree is None:
        raise ValueError(f"{str(path)!r} cannot be read: its list of arrays is damaged")
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
    return leaves


def read(
    path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], digests: Mapping[str, str] | None
) -> Iterator[tuple[str, jax.Array | None, str]]:
    """The arrays of a part, a group after another.

    Args:
        path: the part.
        wanted: all its leaves, in the dtype that they are stored in and with a sharding each.
        digests: to compare with, if given. An array of which other processes hold shares is not
            compared.

    Yields:
        name, array, and what is wrong with it, or "".
    """
    for group in _groups(wanted):
        yield from _read(path, wanted, group, digests)


def _read(
    path: Path,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    names: Sequence[str],
    digests: Mapping[str, str] | None,
) -> Iterator[tuple[str, jax.Array | None, str]]:
    """As `read`, of some leaves; where one cannot be read, by halves, to tell which."""
    try:
        arrays = _load(path, wanted, names)
    except Exception as error:
        if len(names) == 1:
            yield names[0], None, f"cannot be read: {_reason(error)}"
            return
        middle = len(names) // 2
        yield from _read(path, wanted, names[:middle], digests)
        yield from _read(path, wanted, names[middle:], digests)
        return
    for name in names:
        array = arrays.pop(name)
        yield name, array, difference(array, name, digests)


def _load(
    path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], names: Sequence[str]
) -> dict[str, jax.Array]:
    target: Any = {name: leaf if name in names else ... for name, leaf in wanted.items()}
    with _context():
        tree: Any = _orbax().load(path.absolute(), unflatten_dict(target, sep="/"))
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return {name: flat[name] for name in names}


def difference(array: jax.Array, name: str, digests: Mapping[str, str] | None) -> str:
    """What is wrong with an array of that name, or ""."""
    if digests is None or not array.is_fully_addressable:
        return ""
    found = Digest(array.shape, array.dtype)
    for piece in _on_host(array):
        found.update(piece)
    return "" if found.hex() == digests.get(name) else "differs from what was written"


def _on_host(array: jax.Array) -> Iterator[np.ndarray]:
    """An array in pieces along its first axis.

    JAX keeps what it copies to the host as long as the array is there, so no array is copied as a
    whole; those of the CPU are not copied.
    """
    if all(device.platform == "cpu" for device in array.devices()):
        yield np.asarray(array)
        return
    rows = chunk_shape(array.shape, array.dtype.itemsize)[0]
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows])


def _groups(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Names of leaves of together `GROUP` bytes at most, or of one that is larger."""
    group: list[str] = []
    filled = 0
    for name, leaf in leaves.items():
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and filled + size > GROUP:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends without an error.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false.
    """
    path = path.absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists; give overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    new = work / "new"
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(work / "old")
        try:
            new.rename(path)
        except OSError:
            if (work / "old").exists():
                (work / "old").rename(path)
            raise
    finally:
        for _ in range(100):  # threads of a write that failed may still make files there
            shutil.rmtree(work, ignore_errors=True)
            if not work.exists():
                break
            time.sleep(0.05)
