"""Writes a checkpoint from its sources piece by piece, and records the source files.

    file --- mapped ---> tensors of one block ---> block of a leaf ---> checkpoint
      \\--- SHA-256, in a separate thread ----------------------------> jitjax.json

Peak memory is a few of the largest blocks, and does not grow with the size of the model.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jitjax import checkpoint
from jitjax.checkpoint.direct_io import aligned_buffer
from jitjax.models.quantised import (
    QUANTISED_PARTS,
    as_dicts,
    is_quantisable,
    quantise_stack,
    quantise_tree,
)
from jitjax.nested import unflatten
from jitjax.validation import check

from ..components import byte_bar
from ..lora import read_loras, widened_source
from ..sources.diffusers_folder import ModelSource, Source
from ..tables.engine import ConversionError, Shape


class ArrayPool:
    """Allocates arrays like `np.empty`, reusing the memory of arrays that were freed.

    The kernel zeroes fresh pages, which takes as long as transposing a tensor into them.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # sorted by size
        self._returned: deque[np.ndarray] = deque()  # appended by finalizers, in any thread
        self._lock = threading.Lock()

    def __call__(self, shape: Shape, dtype: Any) -> np.ndarray:
        """Return an uninitialised array of a shape and dtype."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        if size < 2**20:
            return np.empty(shape, dtype)
        with self._lock:
            while self._returned:
                bisect.insort(self._free, self._returned.popleft(), key=len)
            smallest_fit = bisect.bisect_left(self._free, size, key=len)
            if smallest_fit < len(self._free):
                memory = self._free.pop(smallest_fit)
            else:  # replace the largest free buffer, so that the pool does not grow
                del self._free[-1:]
                memory = aligned_buffer(size)
        # All views have `root` as their base, not `memory`: `root` is freed after all of them.
        root = np.frombuffer(memory.data, np.uint8, size)
        weakref.finalize(root, self._returned.append, memory).atexit = False
        return root.view(dtype).reshape(shape)


def write_checkpoint(
    source: Source,
    target: str | os.PathLike[str],
    *,
    loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
    overwrite: bool = False,
    quantise: str | None = None,
    progress: bool = False,
) -> None:
    """Convert a source to a checkpoint that `jitjax.load` reads.

    The folder appears when it is complete.

    Args:
        source: result of `open_folder` or `open_sources`.
        target: the folder to write.
        loras: (file, scale) of each low-rank update to add; see `lora/`.
        overwrite: replace an existing checkpoint.
        quantise: quantise the weights to this kind, after the updates are added; see
            `jitjax.models.quantised`.
        progress: show a progress bar.

    Raises:
        FileExistsError: `target` exists and may not be replaced.
        ConversionError: a value does not fit into float16, or an update does not match the models.
        OSError: writing fails (for example, the disk is full).
    """
    parts = [model.name for model in source.models]
    kinds = {part: quantise for part in parts if quantise and part in QUANTISED_PARTS}
    for model in source.models:
        _check_quantisable(model, kinds.get(model.name))
    updates = read_loras(loras, source.config, parts)
    if updates.config != source.config:
        source = widened_source(source, updates.config)
    files = [*source.files, *updates.files]
    sources_metadata: dict[str, Any] = {}  # the writer saves it at the end
    stop = threading.Event()
    with (
        ThreadPoolExecutor(1) as pool,
        checkpoint.checkpoint_writer(
            target,
            source.config,
            parts,
            source.tokenizer,
            overwrite=overwrite,
            sources=sources_metadata,
            quantisation=kinds,
        ) as add,
        byte_bar(source.bytes, "converting", progress) as bar,
    ):
        records = pool.submit(file_records, files, stop)
        try:
            for model, rule, start, piece in source.pieces(ArrayPool()):
                updates.add_to(model.name, rule, piece, start, model.read)
                shape = model.shapes[rule.target]
                kind = kinds.get(model.name)
                if kind is not None and is_quantisable(model.name, rule.target):
                    for key, array in as_dicts(quantise_stack(piece, kind)).items():
                        whole = (shape[0], *array.shape[1:])
                        add(model.name, f"{rule.target}/{key}", np.asarray(array), start, whole)
                else:
                    add(model.name, rule.target, piece, start, shape)
                bar.update(piece.nbytes)
            sources_metadata["files"] = [dataclasses.asdict(file) for file in records.result()]
        finally:
            stop.set()  # after an error nobody waits for the digests of the files
        sources_metadata["loras"] = [
            {"path": str(Path(file).resolve()), "scale": scale} for file, scale in loras
        ]


def _check_quantisable(model: ModelSource, kind: str | None) -> None:
    """Raise `ConversionError` if a kernel cannot be quantised to `kind`, before long work."""
    if kind is None:
        return
    shapes = {
        path: jax.ShapeDtypeStruct(shape, model.dtypes[path])
        for path, shape in model.shapes.items()
    }
    try:
        quantise_tree(model.name, unflatten(shapes), kind)
    except ValueError as error:
        raise ConversionError(f"{model.name}: {error}") from None


@dataclass(frozen=True)
class SourceFile:
    """A file that weights were read from: its path, size in bytes and SHA-256."""

    path: str
    bytes: int
    sha256: str


def file_records(files: Sequence[Path], stop: threading.Event | None = None) -> list[SourceFile]:
    """Return the record of each file; give up if `stop` is set."""
    records = []
    for path in files:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
        with path.open("rb", buffering=0) as file:
            while (size := file.readinto(buffer)) and not (stop and stop.is_set()):
                digest.update(buffer[:size])
        records.append(SourceFile(str(path.resolve()), path.stat().st_size, digest.hexdigest()))
    return records


def compare_sources(path: str | os.PathLike[str]) -> str:
    """Compare the source files of a checkpoint with the sizes and digests recorded in it.

    Args:
        path: folder of the checkpoint.

    Returns:
        A sentence with the numbers of unchanged and of missing source files.

    Raises:
        ValueError: source files have changed (the message lists them), or their records in
            `jitjax.json` are damaged.
    """
    sources = checkpoint.read_metadata(path)["sources"]
    label = f"{Path(path) / checkpoint.METADATA_FILE}: sources.files"
    recorded: list[SourceFile] = check(sources.get("files", []), list[SourceFile], label)
    available = [record for record in recorded if Path(record.path).is_file()]
    current = file_records([Path(record.path) for record in available])
    changed = [old.path for old, new in zip(available, current, strict=True) if old != new]
    if changed:
        raise ValueError(f"source files changed since the conversion: {', '.join(changed)}")
    missing = len(recorded) - len(available)
    suffix = f", {missing} missing" if missing else ""
    return f"all arrays are intact; source files: {len(available)} unchanged{suffix}"
