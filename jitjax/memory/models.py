"""The models that `estimate_memory` takes: configurations, checkpoints, names of FLUX.1."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from jitjax.checkpoint import PARTS, read_metadata
from jitjax.config import FluxConfig
from jitjax.loading import BUNDLED, bundled
from jitjax.validation import read_json, shown

DEV = FluxConfig()
NAMED = {
    "flux-dev": DEV,
    "flux-schnell": dataclasses.replace(
        DEV,
        transformer=dataclasses.replace(DEV.transformer, guidance_embeds=False),
        text_length=256,
        dynamic_shift=False,
        shift=1.0,
    ),
}
"""FLUX.1's models by name; the schedules are those of the converter."""


class Model(NamedTuple):
    """What is known of a model.

    Attributes:
        name: its name.
        config: its configuration.
        parts: the parts that it has.
        dtype: dtype of its parameters as they are loaded; None if there is no checkpoint.
        disk: bytes of the checkpoint; 0 if there is none.
        quantise: what its transformer and T5 are quantised to; None if they are not.
    """

    name: str
    config: FluxConfig
    parts: tuple[str, ...] = PARTS
    dtype: str | None = None
    disk: int = 0
    quantise: str | None = None


def find_model(model: Any) -> Model:
    """Return what is known of a configuration, a checkpoint folder, or a name.

    Raises:
        ValueError: the folder is no checkpoint.
        FileNotFoundError: there is no such folder or name.
    """
    from jitjax.convert.sources.diffusers_folder import read_config

    if isinstance(model, FluxConfig):
        return Model("a FLUX model", model)
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model is {shown(model)}; expected a FluxConfig, a folder or a name")
    if isinstance(model, str) and model in bundled():
        folder = BUNDLED / model
        return Model(model, read_config(folder), dtype="float32", disk=folder_bytes(folder))
    folder, name = Path(model), os.fspath(model)
    if name and folder.exists():
        metadata = read_metadata(folder)
        parts = tuple(part for part in PARTS if part in metadata["parts"])
        quantise = next(iter(metadata["quantisation"].values()), None)
        size = folder_bytes(folder)
        return Model(name, metadata["config"], parts, _dtype(folder), size, quantise)
    if name in NAMED:
        return Model(name, NAMED[name])
    raise FileNotFoundError(
        f"no checkpoint at {name!r}; expected a folder written by jitjax.save or `python -m "
        f"jitjax.convert`, or one of {', '.join((*NAMED, *bundled()))}"
    )


def _dtype(folder: Path) -> str | None:
    """Return the stored dtype of a layer that is never quantised; None if it cannot be read."""
    file = folder / "params" / "transformer" / "state" / "image_in.kernel" / "zarr.json"
    return read_json(file).get("data_type") if file.is_file() else None


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
