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
import xxhash

from jitjax.checkpoint.array_writer import Writer
from jitjax.checkpoint.atomic import atomic_folder, check_target
from jitjax.checkpoint.parameters import PARTS, TEXT_ENCODERS, TOKENIZERS, FluxParams
from jitjax.config import FluxConfig
from jitjax.models.quantised import KINDS, QUANTISED_PARTS, is_quantised, kind_of
from jitjax.validation import check, read_json, shown

FORMAT = 5
"""Version of the checkpoint format that is written."""
READABLE_FORMATS = (3, 4, FORMAT)
"""Versions that `read_metadata` accepts. 3 has no quantised weights. 3 and 4 have no
`out_channels` of the transformer, which was `in_channels`, and no `uses_reference`."""

METADATA_FILE = "jitjax.json"

OWNED = (METADATA_FILE, "params", *TOKENIZERS)
"""All that stands in the folder of a checkpoint; anything else there is the user's."""

SCHEMA = {
    "config": FluxConfig,
    "parts": list[str],
    "sources": dict[str, Any],
    "digests": dict[str, dict[str, str]],
    "config_digest": str | None,  # older checkpoints have none
    "quantisation": dict[str, str] | None,
}
"""Key of `jitjax.json` -> type."""


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata of a checkpoint from `jitjax.json`.

    Returns:
        dictionary with "config" (a `FluxConfig`), "parts" (names of the stored parts), "sources"
        (what the weights were converted from), "digests" (part -> leaf -> digest),
        "config_is_intact" (whether the configuration has its digest, or there is none) and
        "quantisation" (part -> kind, such as "int8", of the parts that are quantised).

    Raises:
        ValueError: `path` is not a checkpoint of this format and version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; expected a checkpoint folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is a diffusers folder; expected a checkpoint: convert it once with "
            f"`jitjax convert {folder} --out CHECKPOINT`, then load CHECKPOINT"
        )
    file = folder / METADATA_FILE
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {METADATA_FILE}: not a jitjax checkpoint, or an incomplete one"
        )
    try:
        raw = read_json(file)
        version = raw["format"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error}); write it again") from None
    if version not in READABLE_FORMATS:
        expected = " or ".join(map(str, READABLE_FORMATS))
        raise ValueError(f"{str(folder)!r} has format {shown(version)}; expected format {expected}")
    try:
        current = _with_new_fields(raw) if version < 5 else raw
        checked = {key: check(current.get(key), hint, key) for key, hint in SCHEMA.items()}
        parts, digests = checked["parts"], checked["digests"]
        if len(set(parts)) != len(parts) or not parts or set(parts) - set(PARTS):
            raise ValueError(f"parts is {shown(parts)}; expected some of {', '.join(PARTS)}")
        if missing := [part for part in parts if part not in digests]:
            raise ValueError(f"digests has no {missing[0]}; expected the digests of every part")
        quantisation = checked["quantisation"] or {}
        for part, kind in quantisation.items():
            if part not in QUANTISED_PARTS or kind not in KINDS:
                raise ValueError(
                    f"quantisation has {shown(part)}: {shown(kind)}; expected "
                    f"{' or '.join(QUANTISED_PARTS)}, and {', '.join(KINDS)}"
                )
    except ValueError as error:
        raise ValueError(f"{file}: not a FLUX configuration of this version ({error})") from None
    config_digest = checked["config_digest"]
    is_intact = config_digest in (None, digest_of_config(raw["config"]))
    return checked | {"config_is_intact": is_intact, "quantisation": quantisation}


def _with_new_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of formats 3 and 4 with what format 5 has besides."""
    config = check(raw.get("config"), dict[str, Any], "config")
    transformer = check(config.get("transformer"), dict[str, Any], "config.transformer")
    transformer = {**transformer, "out_channels": transformer.get("in_channels")}
    return {**raw, "config": {**config, "transformer": transformer, "uses_reference": False}}


def digest_of_config(config: Mapping[str, Any]) -> str:
    """Return the digest of a configuration as it stands in `jitjax.json`."""
    return xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode()).hexdigest()


def save(params: FluxParams, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Save parameters as a checkpoint folder that `load` reads.

    The folder is written under a temporary name and renamed when complete. An interrupted save
    leaves no incomplete checkpoint at `path` and does not damage the previous one.

    Args:
        params: the parameters; empty parts are not saved.
        path: the folder to write.
        overwrite: replace the checkpoint at `path` if there is one. Other files in its folder
            stay.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is false or it is not a checkpoint; it
            appears meanwhile; or another process is writing it.
        FileNotFoundError: the text encoders' tokenizer folder does not exist.
        OSError: a file cannot be written.
        ValueError: all parts are empty, a part is quantised in several ways, or quantised weights
            have a low-rank update beside them.
    """
    _check_no_updates(params)
    parts = [part for part in PARTS if getattr(params, part)]
    kinds = {part: kind for part in parts if (kind := kind_of(getattr(params, part)))}
    config, tokenizer = params.config, params.tokenizer
    with checkpoint_writer(
        path, config, parts, tokenizer, overwrite=overwrite, quantisation=kinds
    ) as write:
        for part in parts:
            for key, leaf in jax.tree_util.tree_leaves_with_path(getattr(params, part)):
                name = jax.tree_util.keystr(key, simple=True, separator="/")
                write(part, name, np.asarray(leaf), 0, leaf.shape)


def _check_no_updates(params: FluxParams) -> None:
    leaves = jax.tree.leaves(params, is_leaf=is_quantised)
    if any(is_quantised(leaf) and leaf.down is not None for leaf in leaves):
        raise ValueError(
            "a LoRA is kept beside quantised weights, which a checkpoint does not store; save the "
            "parameters without it, and pass it to load (loras=); or merge it for good, with "
            "`jitjax convert SOURCE --lora FILE --quantise KIND`"
        )


@contextmanager
def checkpoint_writer(
    path: str | os.PathLike[str],
    config: FluxConfig,
    parts: Sequence[str],
    tokenizer: str,
    *,
    overwrite: bool = False,
    sources: Mapping[str, Any] | None = None,
    quantisation: Mapping[str, str] | None = None,
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
        quantisation: part -> kind of the parts that are quantised; the leaves of a quantised kernel
            are "<kernel>/values" and "<kernel>/scales".

    Yields:
        function that writes a piece of a leaf: it takes the name of the part, then the arguments of
        `array_writer.Writer.write`.

    Raises:
        FileExistsError, FileNotFoundError: as for `save`.
        ValueError: `parts` is empty.
        OSError: a file cannot be written.
    """
    if not parts:
        raise ValueError(f"there are no parameters to save; expected some of {', '.join(PARTS)}")
    has_text_encoders = any(part in TEXT_ENCODERS for part in parts)
    tokenizers = [Path(tokenizer) / name for name in TOKENIZERS if has_text_encoders]
    for folder in tokenizers:
        if not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer at {str(folder)!r}; expected a folder")
    with atomic_folder(
        path, overwrite=overwrite, owned=OWNED, check_replaceable=check_replaceable
    ) as new:
        for folder in tokenizers:
            shutil.copytree(folder, new / folder.name)
        writers = {part: Writer(new / "params" / part) for part in parts}
        try:
            yield lambda part, *arguments: writers[part].write(*arguments)
            digests = {part: writer.finish() for part, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.close()
        raw_config = dataclasses.asdict(config)
        metadata = {
            "format": FORMAT,
            "config": raw_config,
            "config_digest": digest_of_config(raw_config),
            "parts": list(parts),
            "quantisation": dict(quantisation or {}),
            "sources": sources or {},
            "digests": digests,
        }
        (new / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")


def check_new_checkpoint(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check that a checkpoint may be written, without writing anything; for use before long work.

    Raises:
        FileExistsError, OSError: as for `save`.
    """
    check_target(path, overwrite, check_replaceable)


def check_replaceable(folder: Path) -> None:
    """Raise `FileExistsError` unless `folder` is a checkpoint or an empty folder."""
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / METADATA_FILE).is_file()):
        raise FileExistsError(
            f"{str(folder)!r} is no jitjax checkpoint; expected a checkpoint, an empty folder or a "
            "new path"
        )
