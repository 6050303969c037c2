"""Loads checkpoints, on to any devices, and verifies them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from jitjax.checkpoint import (
    PARTS,
    TEXT,
    TOKENIZERS,
    FluxParams,
    abstract_params,
    description,
    storage,
)
from jitjax.config import FluxConfig

BUNDLED = Path(__file__).parent / "checkpoints"
Sharding = jax.sharding.Sharding


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    parts: Sequence[str] = PARTS,
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None,
    check: bool = True,
    loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
) -> FluxParams:
    """Load parameters.

    Args:
        path: the name of a bundled checkpoint ("tiny"), or a folder that `save` or
            `python -m jitjax.convert` wrote.
        dtype: floating-point type of the parameters, which is also the one computed in; by
            default as stored (the bundled checkpoint is stored in float16 and loaded as
            float32).
        parts: which of `PARTS` to load; the others are left empty. By default all there are.
        sharding: where the arrays go: one sharding for all, or a function of a leaf's path (such
            as "transformer/single_blocks/out/kernel") and shape; by default the first device.
            Every device reads its own share.
        check: compare every array with the digest of what was written. It costs a copy of each
            from its device to the host; arrays that other processes share are not compared.
        loras: low-rank updates to add, (safetensors file, scale) of each; 1 is the strength that
            it was trained at. Changed leaves are made in the host's memory, one after another.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a checkpoint of this format and version, not a whole one, or arrays
            are damaged; or it lacks a part that was asked for; or an update does not fit, and the
            message lists all of its keys that do not.
    """
    # `convert/` is mapped into the package at installation, which type checkers do not follow.
    from jitjax.convert.lora import merge_loras  # pyright: ignore[reportMissingImports]
    from jitjax.convert.sources.diffusers_folder import read_folder  # pyright: ignore[reportMissingImports]

    unknown = [part for part in parts if part not in PARTS]
    if unknown or isinstance(parts, str) or not parts:
        raise ValueError(f"parts is {parts!r}; expected some of {PARTS}")
    place = sharding if callable(sharding) else lambda path, shape: sharding or _first_device()
    if isinstance(path, str) and (BUNDLED / path / "model_index.json").is_file():
        params = read_folder(BUNDLED / path, dtype=dtype or jnp.float32, parts=parts)
        params = _placed(params, place)
    else:
        params = _load_folder(Path(path), dtype, parts, place, check)
    return merge_loras(params, loras) if loras else params


def _load_folder(
    folder: Path,
    dtype: DTypeLike | None,
    parts: Sequence[str],
    place: Callable[[str, tuple[int, ...]], Sharding],
    check: bool,
) -> FluxParams:
    if not folder.exists():
        raise FileNotFoundError(
            f"no checkpoint at {str(folder)!r}; expected a folder that jitjax.save or "
            f"`python -m jitjax.convert` wrote, or one of {bundled()}"
        )
    told = description(folder)
    held = told["parts"]
    wanted = [part for part in held if part in parts]
    absent = [part for part in parts if part not in held]
    if absent and tuple(parts) != PARTS:
        raise ValueError(f"{str(folder)!r} has no {', '.join(absent)}, only {', '.join(held)}")
    digests = {part: told["digests"][part] if check else None for part in wanted}
    return _restore(folder, told["config"], digests, dtype, place)


def _first_device() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _on_cpu(path: str, shape: tuple[int, ...]) -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def _placed(params: FluxParams, place: Callable[[str, tuple[int, ...]], Sharding]) -> FluxParams:
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


def bundled() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def _restore(
    folder: Path,
    config: FluxConfig,
    digests: Mapping[str, Mapping[str, str] | None],
    dtype: DTypeLike | None,
    place: Callable[[str, tuple[int, ...]], Sharding],
) -> FluxParams:
    parts = list(digests)
    speaks = any(part in TEXT for part in parts)
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
    raw = description(folder)
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
