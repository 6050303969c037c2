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

from jitjax.checkpoint.array_reader import StoredLeaf, read_arrays, read_leaf_metadata
from jitjax.checkpoint.parameters import (
    PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    FluxParams,
    abstract_params,
)
from jitjax.checkpoint.quantising import place, quantise_stored
from jitjax.checkpoint.saving import METADATA_FILE, read_metadata
from jitjax.models.quantised import (
    as_dicts,
    from_dicts,
    is_quantisable,
    kind_of,
    quantise_tree,
)
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
    quantise: str | None = None,
) -> FluxParams:
    """Load the parameters of a checkpoint.

    Args:
        folder: the checkpoint.
        dtype, parts, check, quantise: as for `jitjax.load`.
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
    _check_quantisation(folder, metadata["quantisation"], requested, dtype, quantise)
    if check and not metadata["config_is_intact"]:
        _check_shapes(folder, metadata, requested)  # a more precise message
        raise ValueError(f"{_CHANGED_CONFIG.format(folder / METADATA_FILE)}; {_REPAIR}")
    return _load_parts(folder, metadata, requested, dtype, sharding_for, check, quantise)


def _check_quantisation(
    folder: Path,
    stored: Mapping[str, str],
    parts: Sequence[str],
    dtype: DTypeLike | None,
    quantise: str | None,
) -> None:
    """Raise `ValueError` if `dtype` or `quantise` does not go with what is stored."""
    for part, kind in stored.items():
        if part not in parts:
            continue
        if quantise not in (None, kind):
            raise ValueError(
                f"{str(folder)!r}: {part} is quantised to {kind}; expected no quantise, or "
                f"{kind!r}; to get {quantise!r}, quantise the checkpoint it was made from"
            )
        if dtype is not None and quantise is None:
            raise ValueError(
                f"{str(folder)!r}: {part} is quantised to {kind}, which dtype does not change; "
                f"expected no dtype; or, with quantise={kind!r}, the dtype of all else"
            )


_CHANGED_CONFIG = "{}: the configuration differs from what was written"
_REPAIR = "convert it again, or pass check=False to load the edited one"


def _check_shapes(folder: Path, metadata: Mapping[str, Any], parts: Sequence[str]) -> None:
    abstract = _stored_shapes(metadata)
    for part in parts:
        _restore_targets(folder / "params" / part, part, abstract[part], on_cpu)


def on_cpu(path: str, shape: tuple[int, ...]) -> Sharding:
    """Return the sharding of an array that is whole on a CPU."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def place_on_devices(params: FluxParams, sharding_for: ShardingFor) -> FluxParams:
    """Put each leaf on the devices of the sharding that `sharding_for` returns for it."""
    trees = {}
    for part, tree in _trees_by_part(params).items():
        flat: dict[str, Any] = flatten(as_dicts(tree))
        placed = {
            name: jax.device_put(leaf, sharding_for(f"{part}/{name}", leaf.shape))
            for name, leaf in flat.items()
        }
        trees[part] = from_dicts(unflatten(placed), kind_of(tree))
    return dataclasses.replace(params, **trees)


def _load_parts(
    folder: Path,
    metadata: Mapping[str, Any],
    parts: Sequence[str],
    dtype: DTypeLike | None,
    sharding_for: ShardingFor,
    check: bool,
    quantise: str | None,
) -> FluxParams:
    """Load some of the stored parts; the arguments are those of `load_folder`."""
    has_text_encoders = any(part in TEXT_ENCODERS for part in parts)
    subfolders = [
        *(TOKENIZERS if has_text_encoders else ()),
        *(f"params/{part}" for part in parts),
    ]
    missing = [name for name in subfolders if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{str(folder)!r} has no {', '.join(missing)}: an incomplete checkpoint")
    abstract = _stored_shapes(metadata)
    trees: dict[str, Any] = {part: {} for part in PARTS}
    problems = []
    for part in parts:
        path = folder / "params" / part
        stored = metadata["quantisation"].get(part)
        digests = metadata["digests"][part] if check else None
        targets = _restore_targets(path, part, abstract[part], sharding_for)
        to_quantise = [
            name
            for name in targets
            if quantise is not None and stored is None and is_quantisable(part, name)
        ]
        flat: dict[str, Any] = {}
        for name, array, problem in read_arrays(path, targets, digests, to_quantise):
            # The values and the scales of a kernel keep their dtypes.
            is_float = not (stored and is_quantisable(part, name.rpartition("/")[0]))
            if array is not None and not problem and is_float:
                array, problem = _cast(array, dtype)
            flat[name] = array
            problems += [f"{part}/{name} {problem}"] if problem else []
        for name in to_quantise:
            assert quantise is not None
            digest = None if digests is None else digests.get(name, "")
            try:
                leaf = StoredLeaf(path, name)
                host, problem = quantise_stored(leaf, quantise, digest)
            except OSError as error:
                problems.append(f"{part}/{name} {error}")
                continue
            for key, array in as_dicts(host).items():
                sharding = sharding_for(f"{part}/{name}/{key}", array.shape)
                flat[f"{name}/{key}"] = place(array, sharding)
            problems += [f"{part}/{name} {problem}"] if problem else []
        trees[part] = from_dicts(unflatten(flat), stored or quantise)
    if problems:
        raise _damage_error(folder, problems)
    tokenizer = str(folder.absolute()) if has_text_encoders else ""
    return FluxParams(**trees, config=metadata["config"], tokenizer=tokenizer)


def _cast(array: jax.Array, dtype: DTypeLike | None) -> tuple[jax.Array, str]:
    """Return the array in a dtype, and a description of an overflow, or ""."""
    if dtype is None or array.dtype == dtype:
        return array, ""
    cast = array.astype(dtype)
    if jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max:
        return cast, ""
    return cast, f"does not fit into {jnp.dtype(dtype).name}" if _overflows(array, cast) else ""


@jax.jit  # One program, without arrays of truth values; not with the cast, which XLA may leave out.
def _overflows(array: jax.Array, cast: jax.Array) -> jax.Array:
    """Whether a finite value is not finite after a cast."""
    return (jnp.isfinite(array) & ~jnp.isfinite(cast)).any()


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
    abstract, problems = _stored_shapes(metadata), []
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


def _stored_shapes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shapes of the stored leaves of each part, as nested dictionaries."""
    trees = _trees_by_part(abstract_params(metadata["config"]))
    for part, kind in metadata["quantisation"].items():
        trees[part] = as_dicts(quantise_tree(part, trees[part], kind))
    return trees


def _trees_by_part(params: FluxParams) -> dict[str, Any]:
    return {part: getattr(params, part) for part in PARTS}
