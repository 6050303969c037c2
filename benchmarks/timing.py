"""Timing of compiled functions, random weights to time, and rows of results as JSON lines."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of several calls after warm-up."""

    median: float
    lowest: float
    highest: float

    def row(self) -> dict[str, float]:
        """Return the fields of a JSON line."""
        return {"seconds": self.median, "lowest": self.lowest, "highest": self.highest}


def measure(call: Callable[[], Any], rounds: int, calls: int = 1) -> Timing:
    """Time calls to completion, after one that does not count.

    Args:
        call: the function to time.
        rounds: number of times.
        calls: number of calls per time, dispatched without waiting for each other: the device works
            on one while Python dispatches the next. The times are divided by it.
    """
    jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [call() for _ in range(calls)]
        jax.block_until_ready(results[-1])
        seconds.append((time.perf_counter() - start) / calls)
    return timing_of(np.array(seconds))


def measure_in_turns(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    most_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Time several calls to completion in turns, so that they share whatever else the machine does.

    Warm up before. No round starts when, at the pace so far, it would end after `most_seconds`, but
    there is always one.

    Args:
        calls: the functions to time.
        rounds: number of turns of each.
        most_seconds: time limit of all rounds.
        clock: what tells the seconds.

    Returns:
        Seconds, [rounds, calls].
    """
    seconds: list[list[float]] = []
    while len(seconds) < rounds:
        spent = sum(map(sum, seconds))
        if seconds and spent * (1 + 1 / len(seconds)) > most_seconds:
            break
        turn = []
        for call in calls:
            start = clock()
            jax.block_until_ready(call())
            turn.append(clock() - start)
        seconds.append(turn)
    return np.array(seconds)


def timing_of(seconds: np.ndarray) -> Timing:
    """Return median and range of an array of seconds."""
    return Timing(float(np.median(seconds)), float(seconds.min()), float(seconds.max()))


def compile_for(
    function: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None
) -> tuple[Callable[[], Any], float]:
    """Compile `function` for `args`, with XLA's `options` if any.

    Returns:
        The compiled function, bound to `args`, and the seconds that lowering and compilation took.
    """
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile(options or None)
    return lambda: executable(*args), time.perf_counter() - start


def matmul_rate(dtype: Any, size: int, rounds: int = 7, calls: int = 20) -> float:
    """Measure the FLOP/s of a matrix product of two random [size, size] arrays.

    It serves as the attainable peak of the device in the same run.
    """
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    call, _ = compile_for(jnp.matmul, a, b)
    return 2 * size**3 / measure(call, rounds, calls).median


@partial(jax.jit, static_argnums=(0, 1))
def _random_leaf(shape: tuple[int, ...], dtype: Any, key: jax.Array, mean: float) -> jax.Array:
    return (mean + 0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Sample weights on the device, leaf by leaf.

    Args:
        abstract: a pytree of `jax.ShapeDtypeStruct`.
        seed: seed of the weights.

    Returns:
        The same pytree with normal values of standard deviation 0.02; their mean is 1 where the
        path of a leaf contains "scale", else 0.
    """

    def make_leaf(index: int, path: tuple, leaf_spec: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return _random_leaf(leaf_spec.shape, leaf_spec.dtype, key, mean)

    specs, structure = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = [make_leaf(index, path, leaf_spec) for index, (path, leaf_spec) in enumerate(specs)]
    return jax.tree_util.tree_unflatten(structure, leaves)


def device_info() -> dict[str, str | int]:
    """Return the kind of the first device and the version of JAX, for a JSON line.

    A CPU gets its model's name, and the number of cores that this process may use.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return {"device": device.device_kind, "jax": jax.__version__}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": names[0] if names else "cpu", "cores": cores or 1, "jax": jax.__version__}


def peak_gb() -> float:
    """Return the peak memory of the device so far in GB; on a CPU, that of the process."""
    stats = jax.devices()[0].memory_stats()
    if stats is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB
    return stats["peak_bytes_in_use"] / 1e9


def record_row(path: Path | None, row: dict[str, Any]) -> None:
    """Print a row and, if a path is given, append it to that file of JSON lines."""
    line = json.dumps(row)
    print(line, flush=True)
    if path:
        with path.open("a") as file:
            file.write(line + "\n")
