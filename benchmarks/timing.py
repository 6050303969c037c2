"""Timing on a device: warm medians, the FLOP/s of a large matrix product, random weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of several warm calls."""

    median: float
    lowest: float
    highest: float

    def row(self) -> dict[str, float]:
        """For a JSON line."""
        return {"seconds": self.median, "lowest": self.lowest, "highest": self.highest}


def measure(call: Callable[[], Any], rounds: int) -> Timing:
    """Time `rounds` calls, after one that is not counted; each is waited for."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return Timing(float(np.median(seconds)), min(seconds), max(seconds))


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float]:
    """`function` compiled for `args` and bound to them, and the seconds that compiling took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return lambda: program(*args), time.perf_counter() - start


def matmul_rate(dtype: Any, size: int, rounds: int = 10) -> float:
    """FLOP/s of a square matrix product of random numbers: the ceiling of this device and run."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    call, _ = compiled(jnp.matmul, a, b)
    return 2 * size**3 / measure(call, rounds).median


@partial(jax.jit, static_argnums=(0, 1))
def _normal(shape: tuple[int, ...], dtype: Any, key: jax.Array, centre: float) -> jax.Array:
    return (centre + 0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Random weights, made on the device leaf by leaf: normal, 0.02 wide; scales around 1."""

    def leaf(number: int, path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return _normal(shape.shape, shape.dtype, key, centre)

    flat, tree = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = [leaf(number, path, shape) for number, (path, shape) in enumerate(flat)]
    return jax.tree_util.tree_unflatten(tree, leaves)


def device() -> dict[str, str]:
    """What the figures were measured on."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def append(path: Path | None, row: dict[str, Any]) -> None:
    """Print a row, and add it to a file of JSON lines as soon as it is known."""
    line = json.dumps(row)
    print(line, flush=True)
    if path:
        with path.open("a") as file:
            file.write(line + "\n")
