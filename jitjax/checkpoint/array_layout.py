"""How the arrays of a checkpoint are stored: orbax's layout, in chunks, with digests.

Each part of a checkpoint is one orbax checkpoint with one Zarr array per leaf. `array_reader.py`
reads it with orbax. `array_writer.py` writes orbax's layout by hand, starting from stubs that orbax
saves:

    params/<part>/                  saved by orbax, with a stub of one element for each leaf
        state/_METADATA             orbax's, with the `write_shape` of each leaf edited
        state/<leaf>/zarr.json      replaces the stub's; written by TensorStore
        state/<leaf>/c/<i>/<j>/...  replaces the stub's; one file per chunk, by `write_file`

Why by hand: orbax's v1 API saves whole leaves only (orbax-checkpoint 0.12.8, on 2026-11-27 the
newest for Python 3.11 to 3.13). `partial.save` adds leaf after leaf, but never a piece of one, and
the largest leaf of FLUX.1 has 3.6 GB. With leaves of 0.5 GB, orbax took up to 2.1 GB of memory and
about four times as long as `cp`; the writer took 0.35 GB and about twice as long as `cp` (process
start included).

Alternative: v1 dropped user-defined leaf handlers in 0.11.40 (May 2026), but the older v0 API still
has `type_handlers.TypeHandler`. With it orbax would write the metadata, and the result loads with
equal values. But `write_shape` would be missing, a load without a target would not give
`jax.Array`, and the writer would still write the chunks. It is the way out if editing the metadata
breaks on a later orbax.

Guard: tests/checkpoint and tests/convert/test_streaming.py read what the writer writes through
orbax's public API. They must also pass with the newest orbax.

Leaves are split into chunks of at most `MAX_CHUNK_BYTES` along their first axes. A chunk is one
contiguous range of a row-major array and, without compression, one file of the same bytes.

Each leaf has a digest (XXH3, 128 bits). It detects accidental damage at the speed of memory; it is
not cryptographic and does not detect deliberate changes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import xxhash

MAX_CHUNK_BYTES = 128 * 2**20
MAX_CHUNKS = 100_000  # of one leaf; FLUX.1's largest leaf has 28


def orbax() -> Any:
    """Return orbax's v1 module.

    Importing it takes a second; a program that loads no checkpoint does not pay for it.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    return ocp


@contextmanager
def orbax_context() -> Iterator[None]:
    """Set orbax's options for this layout, and silence its warnings about the missing OCDBT."""
    context = orbax().Context()
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


def leaf_folder(name: str) -> str:
    """The name of orbax's folder for a leaf."""
    return name.replace("/", ".")


def root_cause(error: BaseException) -> str:
    """The first line of the original error, without TensorStore's long specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or repr(error)).splitlines()[0].split(" [tensorstore_spec")[0]
