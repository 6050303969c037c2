"""Quantises the weights of a checkpoint while they are read, one block after another.

Neither the host nor a device ever holds an unquantised stack: a block is read, quantised on the
default device, and copied into the quantised stack in host memory. A stack goes to the devices when
it is complete.
"""

from __future__ import annotations

import jax
import numpy as np

from jitjax.checkpoint.array_layout import Digest
from jitjax.checkpoint.array_reader import StoredLeaf
from jitjax.models.quantised import Quantised, quantise_stack


def quantise_stored(leaf: StoredLeaf, kind: str, digest: str | None) -> tuple[Quantised, str]:
    """Read and quantise a stacked leaf.

    Args:
        leaf: the leaf on disk.
        kind: what it is quantised to.
        digest: the leaf's stored digest, or None to skip the comparison.

    Returns:
        the quantised leaf in host memory, and a description of its damage, or "".
    """
    shapes = jax.eval_shape(
        lambda kernel: quantise_stack(kernel, kind), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    )
    stack = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), shapes)
    stored = Digest(leaf.shape, leaf.dtype)
    for i in range(len(leaf)):
        block = leaf[i][None]
        if digest is not None:
            stored.update(block)
        quantised = quantise_stack(block, kind)
        stack.values[i], stack.scales[i] = quantised.values[0], quantised.scales[0]
    is_damaged = digest is not None and stored.hexdigest() != digest
    return stack, "differs from what was written" if is_damaged else ""


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put an array of host memory on devices; each process gives its own devices their shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
