"""Restores checkpoints, on to any devices, and verifies them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from jitjax.checkpoint import storage
from jitjax.checkpoint.parameters import (
    PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    FluxParams,
    abstract_params,
)
from jitjax.checkpoint.saving import read_metadata
from jitjax.config import FluxConfig

Sharding = jax.sharding.Sharding


def load_folder(
    folder: Path,
    dtype: DTypeLike | None,
    parts: Sequence[str],
    place: Callable[[str, tuple[int, ...]], Sharding],
    check: bool,
) -> FluxParams:
    """The parameters of a checkpoint that is there; see `jitjax.load`."""
    told = read_metadata(folder)
    held = told["parts"]
    wanted = [part for part in held if part in parts]
    absent = [part for part in parts if part not in held]
    if absent and tuple(parts) != PARTS:
        raise ValueError(f"{str(folder)!r} has no {', '.join(absent)}, only {', '.join(held)}")
    digests = {part: told["digests"][part] if check else None for part in wanted}
    return _restore(folder, told["config"], digests, dtype, place)


def _on_cpu(path: str, shape: tuple[int, ...]) -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def placed(params: FluxParams, place: Callable[[str, tuple[int, ...]], Sharding]) -> FluxParams:
    """Every leaf on the devices that it belongs to."""
    trees = {}
    for part, tree in _trees(params).items():
        flat: dict[str, Any] = flatten_dict(tree, sep="/")
        trees[part] = {
            name: jax.device_put(leaf, place(f"{part}/{name}", leaf.shape))
            for name, leaf in flat.items()
        }
    trees = {part: unflatten_dict(flat, sep="/") for part, flat in trees.items()}
    return dataclasses.replace(params, **trees)


def _restore(
    folder: Path,
    config: FluxConfig,
    digests: Mapping[str, Mapping[str, str] | None],
    dtype: DTypeLike | None,
    place: Callable[[str, tuple[int, ...]], Sharding],
) -> FluxParams:
    parts = list(digests)
    speaks = any(part in TEXT_ENCODERS for part in parts)
    needed = [*(TOKENIZERS if speaks else ()), *(f"params/{part}" for part in parts)]
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing)}: not a whole checkpoint")
    abstract = _trees(abstract_params(config))
    trees: dict[str, Any] = {part: {} for part in PARTS}
    problems = []
    for part in parts:
        wanted = _wanted(folder / "params" / part, part, abstract[part], place)
        flat = {}
        for name, array, problem in storage.read(folder / "params" / part, wanted, digests[part]):
            flat[name] = array if array is None or dtype is None else array.astype(dtype)
            problems += [f"{part}/{name} {problem}"] if problem else []
        trees[part] = unflatten_dict(flat, sep="/")
    if problems:
        raise _damaged(folder, problems)
    tokenizer = str(folder.absolute()) if speaks else ""
    return FluxParams(**trees, config=config, tokenizer=tokenizer)


def _damaged(folder: Path, problems: Sequence[str]) -> ValueError:
    return ValueError(
        f"{str(folder)!r}: {len(problems)} arrays are damaged; convert it again\n  "
        + "\n  ".join(problems)
    )


def _wanted(
    path: Path, part: str, abstract: Any, place: Callable[[str, tuple[int, ...]], Sharding]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a stored part, and where each of them goes.

    Raises:
        ValueError: they are not those of the configuration; the message lists every misfit.
    """
    stored = storage.stored(path)
    expected: dict[str, Any] = flatten_dict(abstract, sep="/")
    want = {name: list(leaf.shape) for name, leaf in expected.items()}
    have = {name: list(leaf.shape) for name, leaf in stored.items()}
    problems = [f"{name} is missing" for name in want if name not in have]
    problems += [f"{name} is unknown" for name in have if name not in want]
    problems += [
        f"{name} is {have[name]}, expected {shape}"
        for name, shape in want.items()
        if name in have and have[name] != shape
    ]
    if problems:
        raise ValueError(
            f"{str(path)!r}: the arrays are not those of its configuration\n  "
            + "\n  ".join(problems)
        )
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place(f"{part}/{name}", tuple(leaf.shape))
        )
        for name, leaf in stored.items()
    }


def verify(
    path: str | os.PathLike[str], progress: Callable[[str], object] = lambda name: None
) -> None:
    """Read a checkpoint again and compare every array with the digest of what was written.

    Args:
        path: the checkpoint.
        progress: called with the name of every leaf read.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no checkpoint, or arrays are damaged; the message lists them all.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint at {str(folder)!r}")
    raw = read_metadata(folder)
    abstract, problems = _trees(abstract_params(raw["config"])), []
    for part in raw["parts"]:
        stored = folder / "params" / part
        try:
            wanted = _wanted(stored, part, abstract[part], _on_cpu)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name, _, problem in storage.read(stored, wanted, raw["digests"][part]):
            progress(f"{part}/{name}")
            problems += [f"{part}/{name} {problem}"] if problem else []
    if problems:
        raise _damaged(folder, problems)


def _trees(params: FluxParams) -> dict[str, Any]:
    return {part: getattr(params, part) for part in PARTS}
