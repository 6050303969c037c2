"""Writes the arrays of a checkpoint piece by piece; `array_layout.py` says how they are stored."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jitjax.checkpoint.array_layout import (
    Digest,
    chunk_shape,
    leaf_folder,
    orbax,
    orbax_context,
    root_cause,
)
from jitjax.checkpoint.direct_io import write_file
from jitjax.nested import unflatten

MAX_PENDING_BYTES = 128 * 2**20  # chunks that are still to be written when `Writer.write` returns


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
        self._thread_name = f"jitjax-writer-{id(self)}"
        self._pool = ThreadPoolExecutor(2, self._thread_name)

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
        folder = self._leaves_folder / leaf_folder(name)
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
        # The pool does not know a thread if Ctrl-C came while it was starting that thread.
        for thread in threading.enumerate():
            if thread.name.startswith(self._thread_name):
                thread.join()

    def _create_array(self, name: str, piece: np.ndarray, shape: tuple[int, ...]) -> Any:
        """Write a leaf's `zarr.json`; the first piece determines the chunk shape."""
        import tensorstore

        chunk = chunk_shape(piece.shape, piece.dtype.itemsize)
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        codec = {"name": "bytes", "configuration": {"endian": "little"}}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._leaves_folder / leaf_folder(name)}/"},
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
        with orbax_context():
            cpu = jax.local_devices(backend="cpu")[0]
            orbax().save(self.path, unflatten(jax.device_put(stubs, cpu)))
        (metadata_file,) = self.path.glob("*/_METADATA")
        metadata = json.loads(metadata_file.read_text())
        for entry in metadata["tree_metadata"].values():
            name = "/".join(key["key"] for key in entry["key_metadata"])
            entry["value_metadata"]["write_shape"] = shapes[name]
        metadata_file.write_text(json.dumps(metadata))
        for name in shapes:
            stub_folder = metadata_file.with_name(leaf_folder(name))
            shutil.rmtree(stub_folder)
            (self._leaves_folder / leaf_folder(name)).rename(stub_folder)
        self._leaves_folder.rmdir()

    def _wrap_errors(self, action: Callable[[], Any]) -> Any:
        """Run `action`; raise `OSError` with the part's path for any error in it."""
        try:
            return action()
        except Exception as error:  # a full disk raises many types of error here
            raise OSError(f"{str(self.path)!r} cannot be written: {root_cause(error)}") from error
