"""Writes checkpoints, and reads what `jitjax.json` says of them."""

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
from jitjax.checkpoint.parameters import PARTS, TEXT_ENCODERS, TOKENIZERS, FluxParams
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig

FORMAT = 3
"""Version of the checkpoint folder; another one is refused."""

METADATA_FILE = "jitjax.json"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `jitjax.json` says of a checkpoint, its "config" a `FluxConfig`.

    Raises:
        ValueError: it is not a checkpoint of this format and version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; expected a checkpoint folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is a diffusers folder; convert it once with "
            f"`python -m jitjax.convert {folder} --out CHECKPOINT`, then load CHECKPOINT"
        )
    file = folder / METADATA_FILE
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {METADATA_FILE}: not a jitjax checkpoint, or not a whole one"
        )
    try:
        raw = json.loads(file.read_text())
        version = raw["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}); write it anew") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version!r}; this version reads {FORMAT}")
    try:
        keys = ("parts", "sources", "digests")
        return {key: raw[key] for key in keys} | {"config": _config_from_json(raw["config"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a FLUX configuration of this version ({error})") from (error)


def save(params: FluxParams, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write parameters to a checkpoint folder that `load` reads.

    The folder appears when it is complete: a run that is killed leaves what was there before.
    Parts that are empty are left out.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false, or it is something else than a
            checkpoint.
        FileNotFoundError: the text encoders' tokenizer folder is gone.
        ValueError: all parts are empty.
    """
    held = [part for part in PARTS if getattr(params, part)]
    with checkpoint_writer(path, params.config, held, params.tokenizer, overwrite=overwrite) as add:
        for part in held:
            for key, leaf in jax.tree_util.tree_leaves_with_path(getattr(params, part)):
                name = jax.tree_util.keystr(key, simple=True, separator="/")
                add(part, name, np.asarray(leaf), 0, leaf.shape)


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
    """A checkpoint written piece by piece; yields the function that takes them.

    It takes the part's name and what `storage.Writer.add` does.

    The folder appears when the block ends without an error; until then nothing is changed.

    Args:
        path, overwrite: as for `save`.
        config: the pipeline's configuration.
        parts: names of the parts that will be given, one after another.
        tokenizer: folder of the tokenizers.
        sources: what the weights were made from, kept with the checkpoint.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `save` does.
    """
    target = Path(path)
    foreign = target.exists() and not (target / METADATA_FILE).is_file()
    if foreign and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} is no jitjax checkpoint; it is not replaced")
    if not parts:
        raise ValueError("there are no parameters to save; expected some of the parts")
    speaks = any(part in TEXT_ENCODERS for part in parts)
    folders = [Path(tokenizer) / name for name in TOKENIZERS if speaks]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer at {str(folder)!r}; expected a folder")
    with storage.atomic_folder(target, overwrite=overwrite) as new:
        for folder in folders:
            shutil.copytree(folder, new / folder.name)
        writers = {part: storage.Writer(new / "params" / part) for part in parts}
        yield lambda part, *piece: writers[part].add(*piece)
        told = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "parts": list(parts),
            "sources": sources or {},
            "digests": {part: writer.finish() for part, writer in writers.items()},
        }
        (new / METADATA_FILE).write_text(json.dumps(told, indent=2) + "\n")


def _config_from_json(raw: dict[str, Any]) -> FluxConfig:
    parts = {
        "transformer": TransformerConfig,
        "t5": T5Config,
        "clip": CLIPConfig,
        "autoencoder": AutoencoderConfig,
    }

    def build(cls: type, values: dict[str, Any]) -> Any:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    models = {name: build(cls, raw[name]) for name, cls in parts.items()}
    return build(FluxConfig, {**raw, **models})
