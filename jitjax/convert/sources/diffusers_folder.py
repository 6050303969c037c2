"""Reads a diffusers folder of FLUX into `FluxParams`, without torch or diffusers.

Everything except the values is checked before any weight is read: missing files, settings that are
not implemented, keys and shapes.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jitjax.checkpoint import METADATA_FILE, PARTS, TEXT_ENCODERS, FluxParams
from jitjax.config import FluxConfig, TokenLimit
from jitjax.nested import unflatten
from jitjax.validation import check, listed, read_json, shown, type_hints

from ..components import (
    COMPONENTS,
    CONTROL_PIPELINES,
    KONTEXT_PIPELINES,
    PIPELINES,
    SCHEDULER,
    SHIFT_FIELDS,
    Component,
    byte_bar,
)
from ..tables.engine import (
    ConversionError,
    Rule,
    Shape,
    apply_rule,
    check_keys,
    leaf_dtypes,
    leaf_shapes,
)
from .file_kinds import explain_absence
from .other_models import explain_pipeline
from .tensors import WEIGHT_DTYPES, OriginalWeights, Weights, scan_all

TEXT_LENGTH = 512
"""Largest number of T5 tokens that FLUX was trained with; the tokenizer may have a lower limit."""
IMAGE_SIZE = 1024
"""Image side in pixels, if `vae/config.json` has no `sample_size`."""

THREADS = min(4, os.cpu_count() or 1)
SPLIT_BYTES = 32 * 2**20
"""Stacked leaves larger than this are made one block at a time."""


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the safetensors files of one model: a single file, or the shards of an index.

    Args:
        folder: folder of the model.
        stem: beginning of the file names, for example "model".

    Raises:
        FileNotFoundError: there are no weights, or a shard of the index is missing.
        ValueError: there are both a single file and an index, or the index lists files elsewhere.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise ValueError(f"{folder} has both {single.name} and {index.name}; expected one of them")
    if single.exists():
        return [single]
    if index.exists():
        return _shards(index)
    if links := [p for p in sorted(folder.iterdir()) if p.is_symlink() and not p.exists()]:
        raise FileNotFoundError(explain_absence(links[0]))
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".ckpt")]
    others += [p.name for p in sorted(folder.glob("*.safetensors"))]
    contents = ", ".join(others) or "no weight files"
    raise FileNotFoundError(f"{folder} has {contents}; expected {single.name} or {index.name}")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index lists; they are in its own folder."""
    names = read_json(index).get("weight_map")
    shards = sorted(set(check(names, dict[str, str], f"{index}: weight_map").values()))
    elsewhere = [shown(name) for name in shards if re.search(r"^\.*$|[/\\\0]", name)]
    if elsewhere:
        raise ValueError(f"{index} lists {elsewhere[0]}; expected names of files beside it")
    if not shards:
        raise FileNotFoundError(f"{index} lists no files")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} lists missing files:{listed(missing)}")
    return [index.parent / name for name in shards]


def read_config(folder: str | os.PathLike[str]) -> FluxConfig:
    """Read the configuration of the pipeline in a diffusers folder.

    Raises:
        FileNotFoundError: files are missing; the message lists them.
        ValueError: the folder is a jitjax checkpoint, its pipeline is not one of `PIPELINES`, or
            a setting is not implemented.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a diffusers folder of FLUX")
    if (folder / METADATA_FILE).is_file():
        raise ValueError(
            f"{folder} is already a jitjax checkpoint; load it with `jitjax.load`, or convert it "
            "back with `jitjax convert --to-diffusers`"
        )
    paths = [folder / c.folder / "config.json" for c in COMPONENTS]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tokenizers = [folder / name / "tokenizer_config.json" for name in ("tokenizer", "tokenizer_2")]
    required = [folder / "model_index.json", *paths, scheduler, *tokenizers]
    missing = [str(path.relative_to(folder)) for path in required if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a complete diffusers folder of FLUX; missing: {', '.join(missing)}"
        )
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        what = explain_pipeline(pipeline)
        raise ValueError(
            f"{folder}/model_index.json: _class_name is {shown(pipeline)}; expected "
            + ", ".join((*CONTROL_PIPELINES.values(), KONTEXT_PIPELINES[0]))
            + (f" (this is {what})" if what else "")
        )
    models = {
        component.name: component.read_config(path)
        for component, path in zip(COMPONENTS, paths, strict=True)
    }
    limit = _optional(tokenizers[1], "model_max_length", TokenLimit, TEXT_LENGTH)
    size = type_hints(FluxConfig)["image_size"]
    try:
        return FluxConfig(
            **models,
            **_read_shift(scheduler),
            text_length=int(min(TEXT_LENGTH, limit)),
            uses_reference=pipeline in KONTEXT_PIPELINES,
            image_size=_optional(folder / "vae" / "config.json", "sample_size", size, IMAGE_SIZE),
        )
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{folder}: {error}") from None


def _optional(path: Path, key: str, expected: Any, default: Any) -> Any:
    """Return the value of a key in a JSON file, or `default` if it is missing or null."""
    return (
        default
        if (value := read_json(path).get(key)) is None
        else check(value, expected, f"{path}: {key}")
    )


def _read_shift(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    unsupported = [
        f"{key} is {shown(raw[key])}; only {expected!r} is implemented"
        for key, expected in (
            ("_class_name", SCHEDULER),
            ("num_train_timesteps", 1000),
            ("time_shift_type", "exponential"),
        )
        if raw.get(key, expected) != expected
    ]
    switches = ("invert_sigmas", "shift_terminal", "stochastic_sampling", "use_beta_sigmas")
    switches += ("use_exponential_sigmas", "use_karras_sigmas")
    unsupported += [
        f"{key} is {shown(raw[key])}, which is not implemented" for key in switches if raw.get(key)
    ]
    if unsupported:
        raise ValueError(f"{path}: " + ", and ".join(unsupported))
    hints = type_hints(FluxConfig)
    return {
        name: check(raw.get(key, default), hints[name], f"{path}: {key}")
        for key, (name, default) in SHIFT_FIELDS.items()
    }


@dataclass(frozen=True)
class ModelSource:
    """The source of one model, checked against its rule table; only the values are still unread.

    Attributes:
        name: field in `FluxParams`.
        rules: rule table of the model.
        shapes: path -> shape of every leaf.
        dtypes: path -> dtype of every leaf.
        read: returns a source tensor by name.
        origin: says where a source tensor is from: its name in its file, and the file.
    """

    name: str
    rules: list[Rule]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    origin: Callable[[str], str] = str

    @property
    def bytes(self) -> int:
        """Size of the model's parameters in bytes."""
        return sum(self.leaf_bytes(path) for path in self.shapes)

    def leaf_bytes(self, path: str) -> int:
        """Return the size of one leaf in bytes."""
        return self.dtypes[path].itemsize * math.prod(self.shapes[path])


def prepare_model(
    component: Component,
    config: Any,
    weights: Weights | OriginalWeights,
    dtype: Any = None,
    *,
    label: str,
    ignored: Iterable[str] = (),
) -> ModelSource:
    """Check the tensors of one model against its rule table.

    Args:
        component: the model.
        config: configuration of the model.
        weights: the source tensors.
        dtype: dtype of all leaves; None keeps the dtypes of the sources.
        label: name of the model, for the error messages.
        ignored: tensors that need no rule, in addition to `component.ignored`.

    Raises:
        ConversionError: keys or shapes do not match; the message lists all of them.
        ValueError: tensors have a dtype that weights cannot have.
    """
    rules, shapes = component.rules(config), leaf_shapes(component.abstract_params(config))
    check_keys(rules, shapes, weights.shapes, label=label, ignored=(*component.ignored, *ignored))
    used = [name for rule in rules for names in rule.source_names() for name in names]
    dtypes = {name: kind for name in used if (kind := weights.dtypes[name]) is not None}
    if unsupported := [name for name in used if name not in dtypes]:
        first, more = unsupported[0], len(unsupported) - 1
        others = f" (and {more} others)" if more else ""
        raise ValueError(
            f"{label}: unsupported dtype {weights.kind(first)} of {weights.origin(first)}{others}; "
            f"expected one of {', '.join(WEIGHT_DTYPES)}"
        )
    return ModelSource(
        component.name,
        rules,
        shapes,
        leaf_dtypes(rules, dtypes, dtype),
        weights.read,
        weights.origin,
    )


def _wait_for_piece(
    model: ModelSource, rule: Rule, start: int, future: Future[np.ndarray]
) -> tuple[ModelSource, Rule, int, np.ndarray]:
    return model, rule, start, future.result()


@dataclass(frozen=True)
class Source:
    """The sources of all models of a pipeline, checked; only the values are still unread.

    Attributes:
        config: the pipeline's configuration.
        models: the source of each model.
        tokenizer: folder of the two tokenizers; empty if there is none.
        files: the weight files.
    """

    config: FluxConfig
    models: tuple[ModelSource, ...]
    tokenizer: str
    files: tuple[Path, ...]

    def pieces(
        self, empty: Callable[[Shape, Any], np.ndarray] = np.empty
    ) -> Iterator[tuple[ModelSource, Rule, int, np.ndarray]]:
        """Read all leaves one after another, large ones in pieces.

        A stacked leaf of more than `SPLIT_BYTES` is split into its blocks. A few threads read ahead
        (NumPy releases the interpreter lock when it copies). Only a few pieces are in memory.

        Args:
            empty: allocates an array of a shape and dtype.

        Yields:
            (model, rule, number of the piece's first block, piece).
        """
        pending: deque[tuple[ModelSource, Rule, int, Future[np.ndarray]]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for model, rule, blocks in self._split():
                shape, dtype = model.shapes[rule.target], model.dtypes[rule.target]
                arguments = (rule, model.read, shape, dtype, blocks, empty, model.origin)
                future = pool.submit(apply_rule, *arguments)
                pending.append((model, rule, blocks.start or 0, future))
                if len(pending) > THREADS:
                    yield _wait_for_piece(*pending.popleft())
            while pending:
                yield _wait_for_piece(*pending.popleft())

    def _split(self) -> Iterator[tuple[ModelSource, Rule, slice]]:
        for model in self.models:
            for rule in model.rules:
                if rule.blocks is None or model.leaf_bytes(rule.target) <= SPLIT_BYTES:
                    yield model, rule, slice(None)
                else:
                    yield from ((model, rule, slice(i, i + 1)) for i in range(rule.blocks))

    @property
    def bytes(self) -> int:
        """Size of all parameters in bytes."""
        return sum(model.bytes for model in self.models)

    def read(self, *, progress: bool = False) -> FluxParams:
        """Read all parameters as NumPy arrays in host memory.

        Args:
            progress: show a progress bar.

        Returns:
            The parameters; models that are not in the source are empty.
        """
        leaves: dict[str, dict[str, np.ndarray]] = {component.name: {} for component in COMPONENTS}
        with byte_bar(self.bytes, "reading", progress) as bar:
            for model, rule, start, piece in self.pieces():
                shape = model.shapes[rule.target]
                if piece.shape == shape:
                    leaves[model.name][rule.target] = piece
                else:
                    leaf = leaves[model.name].setdefault(rule.target, np.empty(shape, piece.dtype))
                    leaf[start : start + len(piece)] = piece
                bar.update(piece.nbytes)
        trees = {name: unflatten(flat) for name, flat in leaves.items()}
        return FluxParams(**trees, config=self.config, tokenizer=self.tokenizer)


def open_folder(
    folder: str | os.PathLike[str], dtype: Any = None, *, parts: Sequence[str] = PARTS
) -> Source:
    """Check a diffusers folder of FLUX without reading values. Arguments as for `read_folder`."""
    folder = Path(folder)
    config = read_config(folder)
    models: list[ModelSource] = []
    problems: list[ConversionError] = []
    files: list[Path] = []
    for component in COMPONENTS:
        if component.name not in parts:
            continue
        model_files = weight_files(folder / component.folder, component.stem)
        weights = Weights(scan_all(model_files), component.aliases)
        model_config = getattr(config, component.name)
        try:
            models.append(
                prepare_model(component, model_config, weights, dtype, label=component.folder)
            )
        except ConversionError as error:
            problems.append(error)
        files += model_files
    if problems:
        raise ConversionError.from_errors(problems)
    has_text_encoders = any(part in TEXT_ENCODERS for part in parts)
    tokenizer = str(folder.resolve()) if has_text_encoders else ""
    return Source(config, tuple(models), tokenizer, tuple(files))


def read_folder(
    folder: str | os.PathLike[str],
    dtype: Any = None,
    *,
    parts: Sequence[str] = PARTS,
    progress: bool = False,
) -> FluxParams:
    """Read a diffusers folder of FLUX.

    Apart from the result, only a few blocks of a layer are in memory at a time.

    Args:
        folder: the folder. Its two tokenizers are not copied.
        dtype: dtype of all parameters; None keeps the stored dtypes.
        parts: names of the models to read, of `jitjax.checkpoint.PARTS`.
        progress: show a progress bar.

    Returns:
        The parameters, as NumPy arrays in host memory (`jax.device_put` moves them to devices);
        models that are not in `parts` are empty.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a setting is not implemented.
        ConversionError: keys or shapes do not match; the message lists them for all models.
    """
    return open_folder(folder, dtype, parts=parts).read(progress=progress)
