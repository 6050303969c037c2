"""Arrays on disk: written leaf by leaf as they come, read on to any sharding. By orbax.

A part of a checkpoint is one orbax checkpoint. No more than `GROUP` bytes and one leaf wait in
memory to be written. Leaves are cut into chunks of at most `CHUNK` bytes, so that a device that
wants a share of a leaf reads no more than that share and its chunks' edges.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

GROUP = 64 * 2**20
CHUNK = 64 * 2**20


def _orbax() -> Any:
    # Importing orbax takes a second, which a program that loads no checkpoint need not wait for.
    import orbax.checkpoint.experimental.v1 as ocp

    return ocp


def _context() -> Any:
    context = _orbax().Context()
    context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False  # weights do not compress; zstd is the bottleneck
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    return context


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    found = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    if array.size:
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


class Writer:
    """Writes one part; the orbax checkpoint appears at `path` with `finish`.

    Attributes:
        digests: leaf -> digest of what was given to be written.
    """

    def __init__(self, path: Path):
        self.path, self.digests = path, {}
        self._waiting: dict[str, np.ndarray] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Give one leaf; `name` is its path in the tree, parts joined by "/"."""
        if name in self.digests:
            raise ValueError(f"{name} was written already")
        self.digests[name] = digest(array)
        self._waiting[name] = array
        if sum(one.nbytes for one in self._waiting.values()) >= GROUP:
            self._flush()

    def finish(self) -> None:
        """Write what still waits, and make the checkpoint appear."""
        self._flush()
        self._try(lambda: _orbax().partial.finalize(self.path))

    def _flush(self) -> None:
        if self._waiting:
            tree = unflatten_dict(self._waiting, sep="/")
            self._try(lambda: _orbax().partial.save(self.path, tree))
            self._waiting = {}

    def _try(self, action: Callable[[], object]) -> None:
        try:
            with _context():
                action()
        except (Exception, CancelledError) as error:  # a full disk raises many kinds here
            raise OSError(f"{str(self.path)!r} cannot be written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of a message, without tensorstore's long specification."""
    return (str(error) or repr(error)).splitlines()[0].split(" [tensorstore_spec")[0]


def stored(path: Path) -> Any:
    """The tree of a part, its leaves with `shape` and `dtype`. Raises `ValueError` if damaged."""
    try:
        return _orbax().metadata(path.absolute()).metadata
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read: {_reason(error)}") from error


def restore(path: Path, target: Any) -> Any:
    """The arrays of a part.

    Args:
        path: the part.
        target: its tree, with a `jax.ShapeDtypeStruct` with sharding for every leaf, or `...` for a
            leaf to be left out.

    Raises:
        ValueError: the part is damaged.
    """
    try:
        with _context():
            return _orbax().load(path.absolute(), target)
    except Exception as error:
        raise ValueError(f"{str(path)!r} is damaged: {_reason(error)}") from error


def damaged(path: Path, digests: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Reads a part in groups; yields each leaf's name and what is wrong with it, or ""."""
    leaves = {
        jax.tree_util.keystr(key, simple=True, separator="/"): leaf
        for key, leaf in jax.tree_util.tree_leaves_with_path(stored(path))
    }
    for name in digests.keys() - leaves.keys():
        yield name, "is missing"
    for name in leaves.keys() - digests.keys():
        yield name, "has no recorded digest"
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def read(names: list[str]) -> dict[str, Any]:
        target: dict[str, Any] = dict.fromkeys(leaves, ...)
        for name in names:
            leaf = leaves[name]
            target[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        return flatten_dict(restore(path, unflatten_dict(target, sep="/")), sep="/")

    def judge(names: list[str]) -> Iterator[tuple[str, str]]:
        try:
            arrays = read(names)
        except ValueError as error:
            yield from ((name, f"cannot be read, or one beside it ({error})") for name in names)
            return
        for name in names:
            same = digest(np.asarray(arrays[name])) == digests[name]
            yield name, "" if same else "differs from what was written"

    group: list[str] = []
    filled = 0
    for name in leaves.keys() & digests.keys():
        size = math.prod(leaves[name].shape) * np.dtype(leaves[name].dtype).itemsize
        if group and filled + size > GROUP:
            yield from judge(group)
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield from judge(group)


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
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
