"""Writes a checkpoint from its sources piece by piece, and keeps what the sources were.

    file --- mapped ---> tensors of one block ---> block of a leaf ---> checkpoint
      \\--- SHA-256, in a thread of its own --------------------------> jitjax.json

Peak memory is some of the largest blocks, whatever the size of the model.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jitjax import checkpoint
from jitjax.checkpoint.direct_io import aligned_buffer

from ..components import byte_bar
from ..lora import read_loras
from ..sources.diffusers_folder import Source
from ..tables.engine import Shape


class Recycled:
    """Makes arrays, as `np.empty` does, in the memory of arrays that are gone.

    The kernel clears fresh pages, which takes as long as it takes to transpose what goes there.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._returned: deque[np.ndarray] = deque()  # from any thread, at any moment
        self._lock = threading.Lock()

    def __call__(self, shape: Shape, dtype: Any) -> np.ndarray:
        """An array of that shape and dtype with any numbers."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        if size < 2**20:
            return np.empty(shape, dtype)
        with self._lock:
            while self._returned:
                bisect.insort(self._free, self._returned.popleft(), key=len)
            fits = bisect.bisect_left(self._free, size, key=len)
            if fits < len(self._free):
                memory = self._free.pop(fits)
            else:  # in place of the largest that is free, so that no more is kept than was needed
                del self._free[-1:]
                memory = aligned_buffer(size)
        # All views have `root` as their base, not `memory`: when it goes, they are gone.
        root = np.frombuffer(memory.data, np.uint8, size)
        weakref.finalize(root, self._returned.append, memory).atexit = False
        return root.view(dtype).reshape(shape)


def write_checkpoint(
    source: Source,
    target: str | os.PathLike[str],
    *,
    loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write what was found as a checkpoint that `jitjax.load` reads.

    The folder appears when it is complete.

    Args:
        source: what `open_folder` or `open_sources` returns.
        target: the folder.
        loras: low-rank updates to add, (file, scale) of each; see `lora.py`.
        overwrite: replace the checkpoint that is there.
        progress: show a bar of bytes.

    Raises:
        FileExistsError: there is something, and it may not be replaced.
        ConversionError: a number does not fit into float16, or an update does not fit.
        OSError: it cannot be written (a full disk, say).
    """
    parts = [job.name for job in source.jobs]
    updates = read_loras(loras, source.config, parts)
    files = [*source.files, *(Path(file) for file, _ in loras)]
    kept: dict[str, Any] = {}
    with (
        ThreadPoolExecutor(1) as pool,
        checkpoint.checkpoint_writer(
            target, source.config, parts, source.tokenizer, overwrite=overwrite, sources=kept
        ) as add,
        byte_bar(source.bytes, "converting", progress) as bar,
    ):
        described = pool.submit(describe, files)
        for job, rule, start, piece in source.pieces(Recycled()):
            updates.add_to(job.name, rule, piece, start)
            add(job.name, rule.target, piece, start, job.shapes[rule.target])
            bar.update(piece.nbytes)
        kept["files"] = described.result()
        kept["loras"] = [{"path": str(Path(file).resolve()), "scale": s} for file, s in loras]


def describe(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Path, size and SHA-256 of each file."""
    found = []
    for path in files:
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        found.append({"path": str(path.resolve()), "bytes": path.stat().st_size, "sha256": value})
    return found


def compare_sources(path: str | os.PathLike[str]) -> str:
    """Compare the files that a checkpoint was made from with what they were then.

    Returns:
        a sentence: how many are as they were, and how many are no longer there.

    Raises:
        ValueError: one has changed; the message lists all that have.
    """
    files = checkpoint.read_metadata(path)["sources"].get("files", [])
    there = [file for file in files if Path(file["path"]).is_file()]
    now = describe([Path(file["path"]) for file in there])
    changed = [then["path"] for then, file in zip(there, now, strict=True) if then != file]
    if changed:
        raise ValueError(f"changed since the conversion: {', '.join(changed)}")
    gone = f"; {len(files) - len(there)} are no longer there" if len(there) < len(files) else ""
    return f"all arrays are as written; {len(there)} source files as they were{gone}"
