"""Loads parameters from checkpoints, bundled or not, and adds low-rank updates (LoRA)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jitjax.checkpoint import PARTS, FluxParams, abstract_params, quantise_params, read_metadata
from jitjax.checkpoint.restoring import (
    Sharding,
    ShardingFor,
    load_folder,
    on_cpu,
    place_on_devices,
)
from jitjax.config import FluxConfig
from jitjax.models.partitioning import check_mesh, sharding_function
from jitjax.models.quantised import check_kind
from jitjax.nested import flatten
from jitjax.offload import move_to_host
from jitjax.validation import shown

BUNDLED = Path(__file__).parent / "checkpoints"


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    quantise: str | None = None,
    parts: Iterable[str] = PARTS,
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None,
    mesh: Mesh | None = None,
    check: bool = True,
    loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
    low_memory: bool = False,
) -> FluxParams:
    """Load the parameters of a pipeline.

    Args:
        path: name of a bundled checkpoint (the string "tiny"), or a folder written by `save` or by
            `jitjax convert`. `"./tiny"` and `Path("tiny")` are folders.
        dtype: dtype of the parameters and of the computation: bfloat16, float16, float32, or, with
            `jax_enable_x64`, float64. The default is the stored dtype; the bundled checkpoint is
            stored in float16 and loaded as float32. With quantised weights it is the dtype of all
            other arrays and of the computation; a checkpoint that is stored quantised takes it only
            together with `quantise`.
        quantise: "int8" (a scale per output channel), "int4" (a scale per 64 inputs of it) or
            "float8" (e4m3, a scale per output channel): quantises the projections in the blocks of
            the transformer and of T5, block by block, so that no unquantised stack is ever held.
            The default loads weights as they are stored.
        parts: names of the parts to load, of `PARTS`; the others stay empty. The default is all
            parts of the checkpoint.
        sharding: sharding of all arrays, or a function that returns the sharding of a leaf from its
            path (such as "transformer/single_blocks/out/kernel") and shape. The default is
            `jax.default_device` or, if it is not set, the first device of this process; the arrays
            are committed to it. Each device reads its own shards.
        mesh: devices to divide the parameters over, instead of `sharding`: a `jax.sharding.Mesh`
            with axes of "data" (divides the batch), "fsdp" (divides the batch and the parameters)
            and "model" (divides heads and features). See docs/devices.md. The arrays have auto
            axes, whatever those of the mesh are.
        check: compare every array, and the configuration, with the digest stored when it was
            written. This copies each array from its device to the host. Arrays sharded across
            processes are not compared.
        loras: low-rank updates (LoRA) to add, a (safetensors file, scale) pair each. A scale of 1
            is the strength used in training. Changed leaves are computed in host memory, one after
            another. A control LoRA (such as FLUX.1-Canny-dev-lora) makes a model that takes a
            control picture.
        low_memory: keep the arrays in the (pinned) host memory of their devices. `encode_prompt`,
            `denoise`, `decode` and so `sample` then copy a model to its devices when it runs, and
            delete the copies afterwards: the devices hold one model at a time instead of all. The
            pictures are the same. These functions cannot be traced (by `jit`, `grad`, ...) then.

    Returns:
        the parameters, with the configuration of the checkpoint.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError: `path`, `sharding` or `mesh` has another type.
        ValueError: the folder is not a complete checkpoint of this format and version; arrays are
            damaged, or do not fit into `dtype`; `dtype` or `quantise` is not one of the above, or
            does not go with how the checkpoint is quantised; a requested part is missing; an update
            does not fit the parameters; or an axis of `mesh` is unknown or does not divide the
            heads or features (raised before any array is read).

    Examples:
        >>> params = jitjax.load("tiny", parts=("transformer",), dtype="bfloat16")
        >>> params.part("transformer")["image_in"]["kernel"].dtype
        dtype(bfloat16)
    """
    from jitjax.convert.lora import find_files, merge_loras
    from jitjax.convert.sources.diffusers_folder import read_folder

    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {shown(path)}; expected a path, or one of {bundled()}")
    if path == "":
        raise ValueError(f"path is empty; expected a checkpoint folder, or one of {bundled()}")
    wanted = _check_parts(parts)
    kind = None if dtype is None else _check_dtype(dtype)
    if mesh is not None and sharding is not None:
        raise ValueError("mesh and sharding are both given; expected one of them")
    if quantise is not None:
        check_kind(quantise)
    sharding_for = _sharding_function(sharding)
    find_files(loras)  # said before the weights are read
    if loras and isinstance(mesh, Mesh) and mesh.is_multi_process:
        raise ValueError(
            "loras are given with a mesh of several processes; expected one process, or a "
            "checkpoint into which they are merged (load and save it in one process)"
        )
    if isinstance(path, str) and path in bundled():
        params = read_folder(BUNDLED / path, dtype=kind or jnp.float32, parts=wanted)
        if quantise is not None:
            params = quantise_params(params, quantise)
        if mesh is not None:
            sharding_for = _sharding_over_mesh(mesh, params.config, wanted)
        params = params if low_memory else place_on_devices(params, sharding_for)
    else:
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(
                f"no checkpoint at {str(folder)!r}; expected a folder written by jitjax.save or "
                f"`jitjax convert`, or one of {bundled()}"
            )
        if mesh is not None:
            sharding_for = _sharding_over_mesh(mesh, read_metadata(folder)["config"], wanted)
        read_to = on_cpu if low_memory else sharding_for
        params = load_folder(folder, kind, wanted, read_to, check, quantise)
    params = merge_loras(params, loras) if loras else params
    if low_memory:
        for part in PARTS:
            move_to_host(getattr(params, part), part, sharding_for)
    return params


def _check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts as a tuple. Raises `ValueError` unless they are some of `PARTS`."""
    wanted = () if isinstance(parts, str) or not isinstance(parts, Iterable) else tuple(parts)
    if not wanted or any(part not in PARTS for part in wanted):
        value = wanted or parts
        raise ValueError(f"parts is {shown(value)}; expected some of {PARTS}")
    return wanted


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype. Raises `ValueError` unless parameters can be computed with in it."""
    names = ["bfloat16", "float16", "float32"]
    if jnp.zeros((), float).dtype == np.float64:
        names.append("float64")
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in names:
        hint = ", and jax_enable_x64 for it" if kind == np.float64 else ""
        raise ValueError(
            f"dtype is {kind.name if kind else shown(dtype)}; expected {', '.join(names)}{hint}"
        )
    return kind


def _sharding_function(sharding: Any) -> ShardingFor:
    """Return a function from the path and shape of a leaf to its sharding."""
    if sharding is None:
        default = jax.sharding.SingleDeviceSharding(_default_device())
        return lambda path, shape: default
    if isinstance(sharding, Sharding):
        return lambda path, shape: sharding
    if not callable(sharding):
        raise TypeError(
            f"sharding is {shown(sharding)}; expected a jax.sharding.Sharding, or a function that "
            "returns one from the path and shape of a leaf"
        )

    def checked(path: str, shape: tuple[int, ...]) -> Sharding:
        found = sharding(path, shape)
        if not isinstance(found, Sharding):
            raise TypeError(
                f"sharding({path!r}, {shape}) is {shown(found)}; expected a jax.sharding.Sharding"
            )
        return found

    return checked


def _sharding_over_mesh(mesh: Mesh, config: FluxConfig, parts: Sequence[str]) -> ShardingFor:
    """Return a function from the path and shape of a leaf to its sharding, by `RULES`."""
    abstract = abstract_params(config)
    trees: dict[str, Any] = {part: getattr(abstract, part) for part in parts}
    check_mesh(mesh, {path: leaf.shape for path, leaf in flatten(trees).items()})
    return sharding_function(mesh)


def _default_device() -> Any:
    """Return the device of `jax.default_device`, or the first device of this process."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):  # the name of a platform
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]


def bundled() -> list[str]:
    """Return the names of the checkpoints that the package contains."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/model_index.json"))
