"""Says what a file is that holds no readable weights, from its first bytes, and what to do.

Also says what is at a path where no file is.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import zipfile
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".sft", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes, in lower case, of files that hold weights (of any kind, also of unsupported ones)."""
GGUF_MAGIC = b"GGUF"
HEAD_BYTES = 4096

PICKLE = (
    "a PyTorch pickle (.ckpt, .pt, .bin), which can run any code when it is opened, and is not "
    "read; expected its safetensors version (or save its tensors with safetensors)"
)
MAGIC = (
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"\x93NUMPY", "a NumPy array; expected safetensors or GGUF"),
    (b"\x89HDF", "an HDF5 file; expected safetensors or GGUF"),
    (b"\x89PNG", "a PNG picture; expected safetensors or GGUF"),
    (b"\xff\xd8\xff", "a JPEG picture; expected safetensors or GGUF"),
    (b"%PDF", "a PDF document; expected safetensors or GGUF"),
)
"""First bytes -> what the file is, and what to do."""


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def explain_file(path: Path) -> str:
    """Say in one line what a file is that the safetensors library does not read.

    Args:
        path: an existing file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not size:
        return f"{path} is empty (0 bytes); download it again"
    if not any(head):
        return f"{path} begins with zeros only: an unfinished download; download it again"
    if head.startswith(b"version https://git-lfs"):
        fields = dict(line.split(" ", 1) for line in _text(head).splitlines() if " " in line)
        return (
            f"{path} is a Git LFS pointer, not the file of {fields.get('size', 'unknown')} bytes "
            "itself; fetch it with `git lfs pull` or `hf download`"
        )
    if (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or (
        zipfile.is_zipfile(path) and _is_torch_archive(path)
    ):
        return f"{path} is {PICKLE}"
    if head.startswith(b"PK"):
        return f"{path} is a zip archive (or a part of one); unpack it first"
    known = next((what for magic, what in MAGIC if head.startswith(magic)), None)
    return f"{path} is {known}" if known else _explain_safetensors(path, head, size)


def _is_torch_archive(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "data.pkl" for name in archive.namelist())


def _text(head: bytes) -> str:
    return head.decode("utf-8", errors="ignore")


def _explain_safetensors(path: Path, head: bytes, size: int) -> str:
    """Compare a safetensors file with its header; what has no such header may be text."""
    length = int.from_bytes(head[:8], "little")
    if size < 8 or head[8:9] != b"{":
        return _explain_text(path, head)
    if 8 + length > size:
        return (
            f"{path} is not a complete safetensors file: it has {size} bytes, and its header alone "
            f"has {8 + length}; the download was cut, download it again"
        )
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        ends = [int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"{path} is not a complete safetensors file: its header is damaged"
    expected = 8 + length + max(ends, default=0)
    if expected > size:
        return (
            f"{path} is not a complete safetensors file: it has {size} of {expected} bytes; the "
            "download was cut, download it again"
        )
    if expected < size:
        return (
            f"{path} is not a complete safetensors file: it has {size} bytes; its header expects "
            f"{expected}"
        )
    return f"{path} is not a complete safetensors file: its header is damaged"


def _explain_text(path: Path, head: bytes) -> str:
    text = _text(head).strip()
    if not text.isprintable() and not all(c.isprintable() or c.isspace() for c in text):
        return (
            f"{path} is not a complete safetensors file, and no other known one; expected "
            "safetensors or GGUF"
        )
    if text.startswith("<"):
        return (
            f"{path} is a web page, not weights: the download was refused (a gated repository "
            "needs `hf auth login` and an accepted licence); download it with `hf download`"
        )
    excerpt = " ".join(text.split())
    excerpt = excerpt if len(excerpt) <= 80 else excerpt[:77] + "..."
    kind = "JSON" if text.startswith(("{", "[")) else "text"
    return (
        f"{path} is {kind}, not weights: {excerpt!r}; expected a safetensors or GGUF file "
        "(`hf download` fetches it)"
    )


def explain_absence(path: Path) -> str:
    """Say in one line why there is no file or folder at a path, with similar names beside it."""
    if path.is_symlink():
        try:
            path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return f"{path} is a circle of symbolic links; expected a file or folder"
        return f"{path} is a symlink to {os.readlink(path)}, which is gone; download it again"
    if path.exists():
        return f"{path} is a pipe or a device; expected a file or folder"
    parent = path.parent
    if not parent.is_dir():
        return f"{path}: no such file; there is no folder {parent}"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    by_stem = {Path(name).stem.lower(): name for name in names}  # suffixes are alike anyway
    near = [by_stem[n] for n in difflib.get_close_matches(path.stem.lower(), by_stem, n=3)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{path}: no such file or folder{hint}"


def explain_folder(folder: Path) -> str:
    """Say in one line what a folder has that is neither a pipeline's nor a model's."""
    links = [p for p in sorted(folder.iterdir()) if p.is_symlink() and not p.exists()]
    if links:
        return explain_absence(links[0])
    weights = [p.name for p in sorted(folder.iterdir()) if p.suffix.lower() in WEIGHT_SUFFIXES]
    listed = ", ".join(weights[:5]) + (f" and {len(weights) - 5} more" if len(weights) > 5 else "")
    if weights:
        return (
            f"{folder} is no diffusers folder (it has no model_index.json); it has single files: "
            f"{listed}; expected one of them as SOURCE, or by --transformer, --vae, --t5, --clip"
        )
    return (
        f"{folder} is no diffusers folder: it has no model_index.json, no config.json and no "
        "weights; expected a diffusers folder of FLUX, or a safetensors or GGUF file"
    )
