"""Loads checkpoints onto any devices, and verifies them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jitjax.checkpoint.array_reader import read_arrays, read_leaf_metadata
from jitjax.checkpoint.parameters import (
    PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    FluxParams,
    abstract_params,
)
from jitjax.checkpoint.saving import METADATA_FILE, read_metadata
from jitjax.config import FluxConfig
from jitjax.nested import flatten, unflatten
from jitjax.validation import listed

Sharding = jax.sharding.Sharding
ShardingFor = Callable[[str, tuple[int, ...]], Sharding]
"""Maps the path (such as "t5/token_embedding/embedding") and shape of a leaf to its sharding."""


def load_folder(
    folder: Path,
    dtype: DTypeLike | None,
    parts: Sequence[str],
    sharding_for: ShardingFor,
    check: bool,
) -> FluxParams:
    """Load the parameters of a checkpoint.

    Args:
        folder: the checkpoint.
        dtype, parts, check: as for `jitjax.load`.
        sharding_for: returns the sharding of each leaf.

    Raises:
        ValueError: as `jitjax.load`.
    """
    metadata = read_metadata(folder)
    available = metadata["parts"]
    requested = [part for part in available if part in parts]
    missing = [part for part in parts if part not in available]
    if missing and tuple(parts) != PARTS:
        raise ValueError(
            f"{str(folder)!r} has no {', '.join(missing)}, only {', '.join(available)}"
        )
    digests = {part: metadata["digests"][part] if check else None for part in requested}
    if check and not metadata["config_is_intact"]:
        _check_shapes(folder, metadata["config"], requested)  # a more precise message
        raise ValueError(f"{_CHANGED_CONFIG.format(folder / METADATA_FILE)}; {_REPAIR}")
    return _load_parts(folder, metadata["config"], digests, dtype, sharding_for)


_CHANGED_CONFIG = "{}: the configuration differs from what was written"
_REPAIR = "convert it again, or pass check=False to load the edited one"


def _check_shapes(folder: Path, config: FluxConfig, parts: Sequence[str]) -> None:
    abstract = _trees_by_part(abstract_params(config))
    for part in parts:
        _restore_targets(folder / "params" / part, part, abstract[part], on_cpu)


def on_cpu(path: str, shape: tuple[int, ...]) -> Sharding:
    """Return the sharding of an array that is whole on a CPU."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def place_on_devices(params: FluxParams, sharding_for: ShardingFor) -> FluxParams:
    """Put each leaf on the devices of the sharding that `sharding_for` returns for it."""
    trees = {}
    for part, tree in _trees_by_part(params).items():
        flat: dict[str, Any] = flatten(tree)
        trees[part] = {
            name: jax.device_put(leaf, sharding_for(f"{part}/{name}", leaf.shape))
            for name, leaf in flat.items()
        }
    trees = {part: unflatten(flat) for part, flat in trees.items()}
    return dataclasses.replace(params, **trees)


def _load_parts(
    folder: Path,
    config: FluxConfig,
    digests: Mapping[str, Mapping[str, str] | None],
    dtype: DTypeLike | None,
    sharding_for: ShardingFor,
) -> FluxParams:
    """Load the parts that `digests` names; a part whose digests are None is not compared."""
    parts = list(digests)
    has_text_encoders = any(part in TEXT_ENCODERS for part in parts)
    subfolders = [
        *(TOKENIZERS if has_text_encoders else ()),
        *(f"params/{part}" for part in parts),
    ]
    missing = [name for name in subfolders if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{str(folder)!r} has no {', '.join(missing)}: an incomplete checkpoint")
    abstract = _trees_by_part(abstract_params(config))
    trees: dict[str, Any] = {part: {} for part in PARTS}
    problems = []
    for part in parts:
        path = folder / "params" / part
        targets = _restore_targets(path, part, abstract[part], sharding_for)
        flat = {}
        for name, array, problem in read_arrays(path, targets, digests[part]):
            if array is not None and not problem:
                array, problem = _cast(array, dtype)
            flat[name] = array
            problems += [f"{part}/{name} {problem}"] if problem else []
        trees[part] = unflatten(flat)
    if problems:
        raise _damage_error(folder, problems)
    tokenizer = str(folder.absolute()) if has_text_encoders else ""
    return FluxParams(**trees, config=config, tokenizer=tokenizer)


def _cast(array: jax.Array, dtype: DTypeLike | None) -> tuple[jax.Array, str]:
    """Return the array in a dtype, and a description of an overflow, or ""."""
    if dtype is None or array.dtype == dtype:
        return array, ""
    cast = array.astype(dtype)
    if jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max:
        return cast, ""
    overflows = bool((jnp.isfinite(array) & ~jnp.isfinite(cast)).any())
    return cast, f"does not fit into {jnp.dtype(dtype).name}" if overflows else ""


def _damage_error(folder: Path, problems: Sequence[str]) -> ValueError:
    return ValueError(
        f"{str(folder)!r}: {len(problems)} arrays are damaged; convert it again{listed(problems)}"
    )


def _restore_targets(
    path: Path, part: str, abstract: Any, sharding_for: ShardingFor
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape, dtype and sharding that each leaf of a stored part is read with.

    Raises:
        ValueError: the leaves do not match the configuration; the message lists all mismatches.
    """
    leaves = read_leaf_metadata(path)
    abstract_leaves: dict[str, Any] = flatten(abstract)
    expected = {name: list(leaf.shape) for name, leaf in abstract_leaves.items()}
    stored = {name: list(leaf.shape) for name, leaf in leaves.items()}
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unknown" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {stored[name]}; expected {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        raise ValueError(
            f"{str(path)!r}: the arrays do not match the configuration{listed(problems)}"
        )
    wide = [name for name, leaf in leaves.items() if leaf.dtype == np.float64]
    if wide and jnp.zeros((), float).dtype != np.float64:
        raise ValueError(
            f"{str(path)!r}: {wide[0]} is float64; expected JAX_ENABLE_X64=1, or a checkpoint "
            "converted to float32"
        )
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding_for(f"{part}/{name}", tuple(leaf.shape))
        )
        for name, leaf in leaves.items()
    }


def verify(
    path: str | os.PathLike[str], progress: Callable[[str], object] = lambda name: None
) -> None:
    """Read a checkpoint and compare every array with the digest stored when it was written.

    Args:
        path: the checkpoint folder.
        progress: function that is called with the path of each leaf after it is read.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder is not a checkpoint, or arrays are damaged; the message lists all of
            them.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint at {str(folder)!r}; expected a checkpoint folder")
    metadata = read_metadata(folder)
    abstract, problems = _trees_by_part(abstract_params(metadata["config"])), []
    for part in metadata["parts"]:
        part_folder = folder / "params" / part
        try:
            targets = _restore_targets(part_folder, part, abstract[part], on_cpu)
        except ValueError as error:
            problems.append(str(error))
            continue
        digests = metadata["digests"][part]
        for name, _, problem in read_arrays(part_folder, targets, digests):
            progress(f"{part}/{name}")
            problems += [f"{part}/{name} {problem}"] if problem else []
    if problems:
        raise _damage_error(folder, problems)
    if not metadata["config_is_intact"]:
        raise ValueError(f"{_CHANGED_CONFIG.format(folder / METADATA_FILE)}; convert it again")


def _trees_by_part(params: FluxParams) -> dict[str, Any]:
    return {part: getattr(params, part) for part in PARTS}
