"""Loads parameters: bundled ones, checkpoints, and low-rank updates on top."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.checkpoint import PARTS, FluxParams
from jitjax.checkpoint.restoring import Sharding, load_folder, placed

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
        params = placed(params, place)
    else:
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(
                f"no checkpoint at {str(folder)!r}; expected a folder that jitjax.save or "
                f"`python -m jitjax.convert` wrote, or one of {bundled()}"
            )
        params = load_folder(folder, dtype, parts, place, check)
    return merge_loras(params, loras) if loras else params


def _first_device() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def bundled() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))
