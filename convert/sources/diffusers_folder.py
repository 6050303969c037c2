"""Reads a diffusers folder of FLUX into `FluxParams`.

Neither torch nor diffusers is needed. All that can be found wrong without reading weights is
found first: missing files, settings that are not implemented, keys and shapes that do not fit.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jitjax.checkpoint import METADATA_FILE, PARTS, TEXT_ENCODERS, FluxParams
from jitjax.config import FluxConfig

from ..components import (
    COMPONENTS,
    PIPELINE,
    SCHEDULER,
    SHIFT_FIELDS,
    Component,
    byte_bar,
    read_json,
)
from ..tables.engine import ConversionError, Rule, Shape, apply, check, leaf_shapes, leaf_types
from .tensors import TYPES, OriginalWeights, Weights, scan_all

TEXT_LENGTH = 512
"""Most T5 tokens that FLUX was trained with; the tokenizer may say less."""
IMAGE_SIZE = 1024
"""Side of FLUX's pictures in pixels, where `vae/config.json` has no `sample_size`."""


THREADS = min(4, os.cpu_count() or 1)
WHOLE = 32 * 2**20


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one model: one, or those that an index lists.

    Raises:
        FileNotFoundError: none is there, or one that the index lists is not.
        ValueError: there is both one file and an index.
    """
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
        ValueError: it is another pipeline or no diffusers folder, or a setting is not implemented.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a diffusers folder of FLUX")
    if (folder / METADATA_FILE).is_file():
        raise ValueError(
            f"{folder} is a jitjax checkpoint already: `jitjax.load` reads it, and "
            "`python -m jitjax.convert --to-diffusers` turns it back"
        )
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


@dataclass(frozen=True)
class Job:
    """One model, checked and ready to be read: all but the numbers is known.

    Attributes:
        name: field in `FluxParams`.
        rules, shapes, types: table, and shape and dtype of every leaf.
        read: returns a source tensor by name.
    """

    name: str
    rules: list[Rule]
    shapes: Mapping[str, Shape]
    types: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]

    @property
    def bytes(self) -> int:
        """Size of the parameters."""
        return sum(self.size(path) for path in self.shapes)

    def size(self, path: str) -> int:
        """Size of one leaf."""
        return self.types[path].itemsize * math.prod(self.shapes[path])


def prepare(
    component: Component,
    config: Any,
    weights: Weights | OriginalWeights,
    dtype: Any = None,
    *,
    what: str,
    ignored: Iterable[str] = (),
) -> Job:
    """Check a model's tensors against its table.

    Raises:
        ConversionError: keys or shapes do not fit; the message lists them.
        ValueError: a tensor has a type that no weight may have.
    """
    rules, shapes = component.rules(config), leaf_shapes(component.abstract_params(config))
    check(rules, shapes, weights.shapes, what=what, ignored=(*component.ignored, *ignored))
    used = [name for rule in rules for names in rule.names() for name in names]
    types = {name: kind for name in used if (kind := weights.types[name]) is not None}
    if len(types) < len(used):
        wrong = ", ".join(name for name in used if name not in types)
        raise ValueError(f"{what}: {wrong}: expected one of the types {', '.join(TYPES)}")
    return Job(component.name, rules, shapes, leaf_types(rules, types, dtype), weights.read)


def _made(
    job: Job, rule: Rule, start: int, made: Future[np.ndarray]
) -> tuple[Job, Rule, int, np.ndarray]:
    return job, rule, start, made.result()


@dataclass(frozen=True)
class Source:
    """Models found and checked: all but the numbers is known, and nothing is left to go wrong.

    Attributes:
        config: the pipeline's configuration.
        jobs: the models.
        tokenizer: folder of the two tokenizers; empty if there is none.
        files: what the weights are in.
    """

    config: FluxConfig
    jobs: tuple[Job, ...]
    tokenizer: str
    files: tuple[Path, ...]

    def pieces(
        self, empty: Callable[[Shape, Any], np.ndarray] = np.empty
    ) -> Iterator[tuple[Job, Rule, int, np.ndarray]]:
        """All leaves, one after another: model, rule, number of the first block, and array.

        A stacked leaf of more than `WHOLE` bytes comes block by block. A few threads work ahead
        (NumPy copies without Python's lock); no other array is kept in memory.

        Args:
            empty: makes the arrays, from their shapes and dtypes.
        """
        ahead: deque[tuple[Job, Rule, int, Future[np.ndarray]]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for job, rule, blocks in self._plan():
                own = job.shapes[rule.target], job.types[rule.target], blocks
                made = pool.submit(apply, rule, job.read, *own, empty)
                ahead.append((job, rule, blocks.start or 0, made))
                if len(ahead) > THREADS:
                    yield _made(*ahead.popleft())
            while ahead:
                yield _made(*ahead.popleft())

    def _plan(self) -> Iterator[tuple[Job, Rule, slice]]:
        for job in self.jobs:
            for rule in job.rules:
                if rule.blocks is None or job.size(rule.target) <= WHOLE:
                    yield job, rule, slice(None)
                else:
                    yield from ((job, rule, slice(i, i + 1)) for i in range(rule.blocks))

    @property
    def bytes(self) -> int:
        """Size of all parameters."""
        return sum(job.bytes for job in self.jobs)

    def read(self, *, progress: bool = False) -> FluxParams:
        """All parameters, as NumPy arrays in host memory; models that are not there are empty."""
        found: dict[str, dict[str, np.ndarray]] = {component.name: {} for component in COMPONENTS}
        with byte_bar(self.bytes, "reading", progress) as bar:
            for job, rule, start, piece in self.pieces():
                shape = job.shapes[rule.target]
                if piece.shape == shape:
                    found[job.name][rule.target] = piece
                else:
                    leaf = found[job.name].setdefault(rule.target, np.empty(shape, piece.dtype))
                    leaf[start : start + len(piece)] = piece
                bar.update(piece.nbytes)
        trees = {model: unflatten_dict(flat, sep="/") for model, flat in found.items()}
        return FluxParams(**trees, config=self.config, tokenizer=self.tokenizer)


def open_folder(
    folder: str | os.PathLike[str], dtype: Any = None, *, parts: Sequence[str] = PARTS
) -> Source:
    """A diffusers folder of FLUX; see `read_folder`."""
    folder = Path(folder)
    config = read_config(folder)
    jobs, problems, files = [], [], []
    for component in COMPONENTS:
        if component.name not in parts:
            continue
        own = weight_files(folder / component.folder, component.stem)
        weights = Weights(scan_all(own), component.aliases)
        one = getattr(config, component.name)
        try:
            jobs.append(prepare(component, one, weights, dtype, what=component.folder))
        except ConversionError as error:
            problems.append(str(error))
        files += own
    if problems:
        raise ConversionError("\n".join(problems))
    speaks = any(part in TEXT_ENCODERS for part in parts)
    return Source(config, tuple(jobs), str(folder.resolve()) if speaks else "", tuple(files))


def read_folder(
    folder: str | os.PathLike[str],
    dtype: Any = None,
    *,
    parts: Sequence[str] = PARTS,
    progress: bool = False,
) -> FluxParams:
    """Read a diffusers folder of FLUX.

    The leaves are NumPy arrays in host memory; `jax.device_put` moves them. Beside the result, no
    more than one block of one layer is in memory.

    Args:
        folder: the folder; its two tokenizers stay where they are.
        dtype: of all parameters; None keeps them as stored.
        parts: names of the models to read; the others are left empty.
        progress: show a bar.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or a setting is not implemented.
        ConversionError: keys or shapes do not fit; the message lists them for all models.
    """
    return open_folder(folder, dtype, parts=parts).read(progress=progress)
