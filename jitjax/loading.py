"""Loads parameters from checkpoints, bundled or not, and adds low-rank updates (LoRA)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.checkpoint import PARTS, FluxParams
from jitjax.checkpoint.restoring import Sharding, load_folder, place_on_devices

BUNDLED = Path(__file__).parent / "checkpoints"


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    parts: Sequence[str] = PARTS,
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None,
    check: bool = True,
    loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
) -> FluxParams:
    """Load the parameters of a pipeline.

    Args:
        path: name of a bundled checkpoint ("tiny"), or a folder written by `save` or by
            `python -m jitjax.convert`.
        dtype: floating-point dtype of the parameters and of the computation. The default is the
            stored dtype; the bundled checkpoint is stored in float16 and loaded as float32.
        parts: names of the parts to load, of `PARTS`; the others stay empty. The default is all
            parts of the checkpoint.
        sharding: sharding of all arrays, or a function that returns the sharding of a leaf from its
            path (such as "transformer/single_blocks/out/kernel") and shape. The default is the
            first device. Each device reads its own shards.
        check: compare every array with the digest stored when it was written. This copies each
            array from its device to the host. Arrays sharded across processes are not compared.
        loras: low-rank updates (LoRA) to add, a (safetensors file, scale) pair each. A scale of 1
            is the strength used in training. Changed leaves are computed in host memory, one after
            another.

    Returns:
        the parameters, with the configuration of the checkpoint.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder is not a complete checkpoint of this format and version; arrays are
            damaged; a requested part is missing; or an update does not fit the parameters (the
            message lists all keys that do not fit).
    """
    # `convert/` is mapped into the package at installation, which type checkers do not follow.
    from jitjax.convert.lora import merge_loras  # pyright: ignore[reportMissingImports]
    from jitjax.convert.sources.diffusers_folder import read_folder  # pyright: ignore[reportMissingImports]

    unknown = [part for part in parts if part not in PARTS]
    if unknown or isinstance(parts, str) or not parts:
        raise ValueError(f"parts is {parts!r}; expected some of {PARTS}")
    sharding_for = (
        sharding if callable(sharding) else lambda path, shape: sharding or _first_device()
    )
    if isinstance(path, str) and (BUNDLED / path / "model_index.json").is_file():
        params = read_folder(BUNDLED / path, dtype=dtype or jnp.float32, parts=parts)
        params = place_on_devices(params, sharding_for)
    else:
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(
                f"no checkpoint at {str(folder)!r}; expected a folder written by jitjax.save or "
                f"`python -m jitjax.convert`, or one of {bundled()}"
            )
        params = load_folder(folder, dtype, parts, sharding_for, check)
    return merge_loras(params, loras) if loras else params


def _first_device() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def bundled() -> list[str]:
    """Return the names of the checkpoints that the package contains."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/model_index.json"))
