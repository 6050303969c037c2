"""What several processes have to agree on that share one mesh of devices.

Every process calls the same functions with the same arguments (multi-controller JAX).
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def spans_processes(tree: Any) -> bool:
    """Whether arrays of a tree lie on devices of several processes."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return any(not isinstance(x, Tracer) and not x.is_fully_addressable for x in arrays)


def check_same_call(params: Any, **arguments: Any) -> None:
    """Check that all processes have called a function with the same arguments.

    Otherwise each process would compute its part of another picture, or wait for ever for a program
    that the others do not run. It takes one small exchange; in a single process, nothing.

    Args:
        params: nothing is done unless these span processes.
        arguments: arguments by name: arrays, or what `repr` shows completely.

    Raises:
        ValueError: an argument differs. It is raised in every process.
    """
    if jax.process_count() == 1 or not spans_processes(params):
        return
    from jax.experimental import multihost_utils

    digests = np.array([_digest(value) for value in arguments.values()])
    of_processes = np.asarray(multihost_utils.process_allgather(digests))
    differ = (of_processes != of_processes[:1]).any(axis=(0, 2))
    names = [name for name, different in zip(arguments, differ, strict=True) if different]
    if names:
        raise ValueError(
            f"{' and '.join(names)} of this process, number {jax.process_index()} of "
            f"{jax.process_count()}, differ from another's; expected the same call in every process"
        )


def _digest(value: Any) -> np.ndarray:
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(value)):
        return np.zeros(8, np.uint32)
    parts = []
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, (jax.Array, np.ndarray)):
            known = getattr(leaf, "is_fully_addressable", True)
            parts.append((leaf.shape, np.asarray(leaf).tobytes() if known else b""))
        else:
            parts.append(leaf)
    return np.frombuffer(hashlib.sha256(repr(parts).encode()).digest(), np.uint32)


def on_every_process(array: Any) -> Any:
    """Return an array that every process can read as a whole: a copy on each of its devices."""
    if not spans_processes(array) or array.is_fully_replicated:
        return array
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    return jax.device_put(array, NamedSharding(sharding.mesh, PartitionSpec()))
