"""Writes checkpoints, and reads their metadata (`jitjax.json`)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jitjax.checkpoint import storage
from jitjax.checkpoint.atomic import atomic_folder
from jitjax.checkpoint.parameters import PARTS, TEXT_ENCODERS, TOKENIZERS, FluxParams
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig

FORMAT = 3
"""Version of the checkpoint format; `read_metadata` accepts no other."""

METADATA_FILE = "jitjax.json"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata of a checkpoint from `jitjax.json`.

    Returns:
        dictionary with "config" (a `FluxConfig`), "parts" (names of the stored parts), "sources"
        (what the weights were converted from) and "digests" (part -> leaf -> digest).

    Raises:
        ValueError: `path` is not a checkpoint of this format and version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; expected a checkpoint folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is a diffusers folder; expected a checkpoint: convert it once with "
            f"`python -m jitjax.convert {folder} --out CHECKPOINT`, then load CHECKPOINT"
        )
    file = folder / METADATA_FILE
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {METADATA_FILE}: not a jitjax checkpoint, or an incomplete one"
        )
    try:
        raw = json.loads(file.read_text())
        version = raw["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}); write it again") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version!r}; expected format {FORMAT}")
    try:
        keys = ("parts", "sources", "digests")
        return {key: raw[key] for key in keys} | {"config": _config_from_json(raw["config"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a FLUX configuration of this version ({error})") from error


def save(params: FluxParams, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Save parameters as a checkpoint folder that `load` reads.

    The folder is written under a temporary name and renamed when complete. An interrupted save
    leaves no incomplete checkpoint at `path` and does not damage the previous one.

    Args:
        params: the parameters; empty parts are not saved.
        path: the folder to write.
        overwrite: replace the checkpoint at `path` if there is one.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is false or it is not a checkpoint.
        FileNotFoundError: the text encoders' tokenizer folder does not exist.
        OSError: a file cannot be written.
        ValueError: all parts are empty.
    """
    parts = [part for part in PARTS if getattr(params, part)]
    config, tokenizer = params.config, params.tokenizer
    with checkpoint_writer(path, config, parts, tokenizer, overwrite=overwrite) as write:
        for part in parts:
            for key, leaf in jax.tree_util.tree_leaves_with_path(getattr(params, part)):
                name = jax.tree_util.keystr(key, simple=True, separator="/")
                write(part, name, np.asarray(leaf), 0, leaf.shape)


@contextmanager
def checkpoint_writer(
    path: str | os.PathLike[str],
    config: FluxConfig,
    parts: Sequence[str],
    tokenizer: str,
    *,
    overwrite: bool = False,
    sources: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[str, str, np.ndarray, int, tuple[int, ...]], None]]:
    """Write a checkpoint piece by piece.

    The checkpoint replaces `path` when the block ends without an error. Until then `path` is
    unchanged.

    Args:
        path, overwrite: as for `save`.
        config: configuration of the pipeline.
        parts: names of the parts that the block writes.
        tokenizer: path of the folder with `tokenizer/` and `tokenizer_2/`; read only if `parts` has
            a text encoder.
        sources: description of the files that the weights come from, stored in `jitjax.json`. The
            block may still change it.

    Yields:
        function that writes a piece of a leaf: it takes the name of the part, then the arguments of
        `storage.Writer.write`.

    Raises:
        FileExistsError, FileNotFoundError: as for `save`.
        ValueError: `parts` is empty.
        OSError: a file cannot be written.
    """
    target = Path(path)
    is_checkpoint = (target / METADATA_FILE).is_file()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_checkpoint and not is_empty:
        raise FileExistsError(
            f"{str(target)!r} is no jitjax checkpoint; expected a checkpoint, an empty folder or a "
            "new path"
        )
    if not parts:
        raise ValueError(f"there are no parameters to save; expected some of {', '.join(PARTS)}")
    has_text_encoders = any(part in TEXT_ENCODERS for part in parts)
    tokenizers = [Path(tokenizer) / name for name in TOKENIZERS if has_text_encoders]
    for folder in tokenizers:
        if not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer at {str(folder)!r}; expected a folder")
    with atomic_folder(target, overwrite=overwrite) as new:
        for folder in tokenizers:
            shutil.copytree(folder, new / folder.name)
        writers = {part: storage.Writer(new / "params" / part) for part in parts}
        yield lambda part, *arguments: writers[part].write(*arguments)
        metadata = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "parts": list(parts),
            "sources": sources or {},
            "digests": {part: writer.finish() for part, writer in writers.items()},
        }
        (new / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")


def _config_from_json(raw: dict[str, Any]) -> FluxConfig:
    classes = {
        "transformer": TransformerConfig,
        "t5": T5Config,
        "clip": CLIPConfig,
        "autoencoder": AutoencoderConfig,
    }

    def build(cls: type, values: dict[str, Any]) -> Any:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    models = {name: build(cls, raw[name]) for name, cls in classes.items()}
    return build(FluxConfig, {**raw, **models})
