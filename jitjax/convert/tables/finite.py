"""Fast search for NaN and infinity in arrays, and the error that names their source tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

LOWEST_NON_FINITE = {
    np.dtype(jnp.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
}
"""dtype -> bits of its infinity; larger ones without the sign bit are NaN."""
CHUNK = 2**17  # values that are looked at together, so that the second look finds them in the cache


def all_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity.

    As signed integers, the positive non-finite values are the largest; as unsigned integers, the
    negative ones are. Two maxima are several times as fast as `np.isfinite`, which has no fast
    loop for bfloat16, and need no memory.

    Args:
        array: of any shape; other dtypes than the usual floating ones go to `np.isfinite`.
    """
    infinity = LOWEST_NON_FINITE.get(array.dtype)
    if infinity is None:
        return bool(np.isfinite(array).all())
    size = array.dtype.itemsize
    sign = 1 << (8 * size - 1)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    flat = array.reshape(-1)
    signed, unsigned = flat.view(f"i{size}"), flat.view(f"u{size}")
    for start in range(0, flat.size, CHUNK):
        part = slice(start, start + CHUNK)
        if signed[part].max() >= infinity or unsigned[part].max() >= sign + infinity:
            return False
    return True


def describe_non_finite(array: Any) -> str:
    """Return how many values are NaN and infinite, for example "3 values that are NaN"."""
    values = np.asarray(array)
    if values.dtype not in (np.float16, np.float32, np.float64):
        values = values.astype(np.float32)
    counts = {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    found = [f"{n} value{'s' * (n != 1)} that {'are' if n != 1 else 'is'} {kind}"
             for kind, n in counts.items() if n]  # fmt: skip
    return " and ".join(found)


def explain_non_finite(
    leaf: str, dtype: Any, names: Sequence[str], tensors: Sequence[np.ndarray]
) -> str:
    """Say why a leaf is not finite: a source tensor is not, or a value does not fit into the dtype.

    Args:
        leaf: name of the leaf.
        dtype: its dtype.
        names: where each source tensor of the leaf is from.
        tensors: the source tensors.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if not all_finite(tensor):
            return f"{name} has {describe_non_finite(tensor)}; expected finite weights"
    largest = [float(np.abs(tensor.astype(np.float64)).max(initial=0)) for tensor in tensors]
    worst = max(range(len(tensors)), key=largest.__getitem__)
    advice = "use bfloat16" if np.dtype(dtype) == np.float16 else "use float32"
    return (
        f"{leaf} does not fit into {np.dtype(dtype)}: {names[worst]} has magnitudes up to "
        f"{largest[worst]:.4g}; {advice}"
    )
