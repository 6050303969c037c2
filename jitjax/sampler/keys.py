"""Random draws that depend on the key's bits and the shape only.

`jax.random` gives other numbers for the same key under `jax_enable_x64` and without
`jax_threefry_partitionable`; and under `vmap` all rbg keys draw from the first one. Here every key
becomes a threefry key first, and each draw names its dtype and its algorithm. Threefry keys under
JAX's default configuration draw the same numbers as with `jax.random`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_RAW_WIDTHS = {2: "threefry2x32", 4: "rbg"}
"""Words of a raw uint32 key (from `jax.random.PRNGKey`) -> its implementation."""


def is_key(key: Any) -> bool:
    """Whether `key` is an array of typed `jax.random` keys."""
    dtype = getattr(key, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def threefry_keys(key: Array) -> Key[Array, ...]:
    """Return threefry keys with the bits of keys of any implementation.

    Threefry keys are returned unchanged. Of other keys, the first two words become the key, into
    which the remaining words are folded.

    Args:
        key: typed `jax.random` keys; or raw ones, uint32 with 2 (threefry) or 4 (rbg) words along
            the last axis.

    Returns:
        One key for each given one.

    Raises:
        ValueError: `key` has no keys.
    """
    key = _as_array(key)
    if key.dtype == jnp.uint32 and key.ndim and key.shape[-1] in _RAW_WIDTHS:
        key = jax.random.wrap_key_data(key, impl=_RAW_WIDTHS[key.shape[-1]])
    if not is_key(key):
        raise ValueError(
            f"key has dtype {key.dtype} and shape {list(key.shape)}; expected "
            "jax.random.key(seed) or an array of such keys"
        )
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key).reshape(*key.shape, -1)
    if words.shape[-1] < 2:
        words = jnp.concatenate([jnp.zeros_like(words), words], axis=-1)
    folded = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    for i in range(2, words.shape[-1]):
        folded = fold_in(folded, words[..., i])
    return folded


def _as_array(key: Any) -> Array:
    try:
        return jnp.asarray(key)
    except (TypeError, ValueError):
        raise ValueError(
            f"key is {key!r}; expected jax.random.key(seed) or an array of such keys"
        ) from None


def fold_in(keys: Key[Array, ...], data: Array) -> Key[Array, ...]:
    """Fold one integer into each key.

    Args:
        keys: threefry keys.
        data: integers, one per key.
    """
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold)
    return fold(keys, data)


def split(keys: Array) -> tuple[Key[Array, ...], Key[Array, ...]]:
    """Split each key into two; returns the first and the second ones, in the shape of `keys`."""
    keys = threefry_keys(keys)
    divide = jax.random.split
    for _ in range(keys.ndim):
        divide = jax.vmap(divide)
    with jax.threefry_partitionable(True):
        pairs = divide(keys)
    return pairs[..., 0], pairs[..., 1]


def uniform(key: Array, shape: tuple[int, ...] = ()) -> Float[Array, ...]:
    """Draw float32 numbers from [0, 1) with one key."""
    with jax.threefry_partitionable(True):
        return jax.random.uniform(threefry_keys(key), shape, jnp.float32)


def normal(key: Array, shape: tuple[int, ...] = ()) -> Float[Array, ...]:
    """Draw standard normal float32 numbers with one key."""
    with jax.threefry_partitionable(True):
        return jax.random.normal(threefry_keys(key), shape, jnp.float32)


def batch_keys(key: Array, batch: int) -> Key[Array, " b"]:
    """Return one key per sample.

    Sample i depends on its own key only, so `key=keys[i : i + 1]` reproduces it in a batch of one.
    All draws are made with threefry, so that neither the implementation of the key nor JAX's
    configuration decides how a batch is drawn.

    Args:
        key: one `jax.random` key, which is folded with 0, 1, ...; or one key per sample, which are
            only turned into threefry keys.
        batch: number of samples, 1 or more.

    Returns:
        Threefry keys, [batch].

    Raises:
        ValueError: `key` is not a `jax.random` key, or its shape is neither [] nor [batch].
    """
    key = threefry_keys(key)
    if key.ndim == 0:
        return fold_in(jnp.broadcast_to(key, (batch,)), jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key has shape {list(key.shape)}; expected [] or [{batch}]")
    return key
