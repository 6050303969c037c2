"""Reads a diffusers folder of FLUX into `FluxParams`.

Neither torch nor diffusers is needed. All that can be found wrong without reading weights is
found first: missing files, settings that are not implemented, keys and shapes that do not fit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig

from .components import COMPONENTS, PIPELINE, SCHEDULER, SHIFT_FIELDS, byte_bar, read_json
from .engine import ConversionError, Rule, check, fill, leaf_shapes, leaf_types
from .text_tables import canonical_names

TEXT_LENGTH = 512
"""Most T5 tokens that FLUX was trained with; the tokenizer may say less."""
IMAGE_SIZE = 1024
"""Side of FLUX's pictures in pixels, where `vae/config.json` has no `sample_size`."""

TYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""safetensors' names of the types that weights may have."""


class Weights:
    """The tensors of one component's safetensors files: headers at once, numbers on demand.

    Attributes:
        shapes: canonical name -> shape.
        types: canonical name -> dtype; None for types that no weight may have.
    """

    def __init__(self, folder: Path, stem: str, aliases: Mapping[str, str]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, np.dtype | None] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        files: dict[str, Path] = {}
        for path in _weight_files(folder, stem):
            for name in _header(path):
                if name in files:
                    raise ValueError(f"{name} is both in {files[name]} and in {path}")
                files[name] = path
        for canonical, name in canonical_names(files, aliases).items():
            shape, kind = _header(files[name])[name]
            self.shapes[canonical], self.types[canonical] = shape, TYPES.get(kind)
            self._places[canonical] = files[name], name

    def read(self, name: str) -> np.ndarray:
        """One tensor, by canonical name, with the dtype of the file."""
        path, stored = self._places[name]
        with safe_open(path, "numpy") as file:
            return file.get_tensor(stored)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}") from None


def _weight_files(folder: Path, stem: str) -> list[Path]:
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.exists() and index.exists():
        raise ValueError(f"{folder} has both {whole.name} and {index.name}; expected one of them")
    if whole.exists():
        return [whole]
    if index.exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            listed = ", ".join(missing) or "(it lists none)"
            raise FileNotFoundError(f"{index} lists files that are not there: {listed}")
        return [folder / name for name in shards]
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".ckpt")]
    others += [p.name for p in sorted(folder.glob("*.safetensors"))]
    found = f"; it has {', '.join(others)}, which is not read" if others else ""
    raise FileNotFoundError(f"{folder}: expected {whole.name} or {index.name}{found}")


def read_config(folder: str | os.PathLike[str]) -> FluxConfig:
    """The configuration of the pipeline in a diffusers folder.

    Raises:
        FileNotFoundError: files are missing; the message lists them.
        ValueError: it is another pipeline, or a setting is not implemented.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a diffusers folder of FLUX")
    paths = [folder / c.folder / "config.json" for c in COMPONENTS]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tokenizers = [folder / name / "tokenizer_config.json" for name in ("tokenizer", "tokenizer_2")]
    needed = [folder / "model_index.json", *paths, scheduler, *tokenizers]
    missing = [str(path.relative_to(folder)) for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete diffusers folder of FLUX: {', '.join(missing)} not found"
        )
    got = read_json(folder / "model_index.json").get("_class_name")
    if got != PIPELINE:
        raise ValueError(f"{folder}/model_index.json: _class_name is {got!r}, expected {PIPELINE}")
    models = {
        component.name: component.config.from_diffusers(read_json(path))
        for component, path in zip(COMPONENTS, paths, strict=True)
    }
    limit = read_json(tokenizers[1]).get("model_max_length") or TEXT_LENGTH
    return FluxConfig(
        **models,
        **_read_shift(scheduler),
        text_length=int(min(TEXT_LENGTH, limit)),
        image_size=read_json(folder / "vae" / "config.json").get("sample_size", IMAGE_SIZE),
    )


def _read_shift(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    unknown = [
        f"{key} is {raw[key]!r}, only {expected!r} is implemented"
        for key, expected in (
            ("_class_name", SCHEDULER),
            ("num_train_timesteps", 1000),
            ("time_shift_type", "exponential"),
        )
        if raw.get(key, expected) != expected
    ]
    switches = ("invert_sigmas", "shift_terminal", "stochastic_sampling", "use_beta_sigmas")
    switches += ("use_exponential_sigmas", "use_karras_sigmas")
    unknown += [f"{key} is {raw[key]!r}, not implemented" for key in switches if raw.get(key)]
    if unknown:
        raise ValueError(f"{path}: " + "; ".join(unknown))
    return {name: raw.get(key, absent) for key, (name, absent) in SHIFT_FIELDS.items()}


def read_folder(
    folder: str | os.PathLike[str], dtype: Any = None, *, progress: bool = False
) -> FluxParams:
    """Read a diffusers folder of FLUX.

    The leaves are NumPy arrays in host memory; `jax.device_put` moves them. Beside the result, no
    more than one block of one layer is in memory.

    Args:
        folder: the folder; its two tokenizers stay where they are.
        dtype: of all parameters; None keeps them as stored.
        progress: show a bar.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or a setting is not implemented.
        ConversionError: keys or shapes do not fit; the message lists them for all models.
    """
    folder = Path(folder)
    config = read_config(folder)
    jobs, problems, total = [], [], 0
    for component in COMPONENTS:
        one = getattr(config, component.name)
        rules, shapes = component.rules(one), leaf_shapes(component.abstract_params(one))
        weights = Weights(folder / component.folder, component.stem, component.aliases)
        try:
            check(rules, shapes, weights.shapes, what=component.folder, ignored=component.ignored)
        except ConversionError as error:
            problems.append(str(error))
            continue
        types = _stored_types(weights, rules, component.folder)
        targets = leaf_types(rules, types, dtype)
        total += sum(targets[path].itemsize * math.prod(shapes[path]) for path in shapes)
        jobs.append((component.name, rules, shapes, targets, weights.read))
    if problems:
        raise ConversionError("\n".join(problems))
    trees = {}
    with byte_bar(total, "reading", progress) as bar:
        for name, rules, shapes, targets, read in jobs:
            trees[name] = fill(rules, shapes, targets, read, bar.update)
    return FluxParams(**trees, config=config, tokenizer=str(folder.resolve()))


def _stored_types(weights: Weights, rules: list[Rule], what: str) -> dict[str, np.dtype]:
    used = [name for rule in rules for names in rule.names() for name in names]
    wrong = [name for name in used if weights.types[name] is None]
    if wrong:
        raise ValueError(
            f"{what}: {', '.join(wrong)}: expected one of the types {', '.join(TYPES)}"
        )
    return {name: kind for name in used if (kind := weights.types[name]) is not None}
