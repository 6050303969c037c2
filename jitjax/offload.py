"""Parameters in host memory, which are on their devices only while a model runs.

`load(path, low_memory=True)` puts all arrays into the pinned host memory of their devices (JAX's
memory kind "pinned_host"): they keep their sharding, and copies to the device are fast. The
functions that run a model copy its parameters to the device, wait for the result, and delete the
copies. So at any time the device holds one model instead of all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from jax.core import Tracer

HOST = "pinned_host"
"""The memory kind of host memory from which devices copy directly; CPUs, GPUs and TPUs have it."""

Args = ParamSpec("Args")
Result = TypeVar("Result")


def in_host_memory(tree: Any) -> bool:
    """Whether a pytree has an array in the host memory of its device."""
    return any(_is_on_host(leaf) for leaf in jax.tree.leaves(tree))


def _is_on_host(leaf: Any) -> bool:
    if isinstance(leaf, Tracer):
        return jax.typeof(leaf).memory_space == jax.memory.Space.Host
    return isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == HOST


def host_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the same sharding in the host memory of its devices.

    Raises:
        ValueError: a device has no such memory.
    """
    for device in sharding.addressable_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise ValueError(
                f"low_memory: {device} has the memory kinds {', '.join(kinds)}; expected {HOST}"
            )
    return sharding.with_memory_kind(HOST)


def move_to_host(
    tree: dict[str, Any],
    path: str,
    sharding_for: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
) -> None:
    """Replace the arrays of nested dictionaries by copies in host memory, one after another.

    In place, so that there is never a second copy of more than one array.

    Args:
        tree: nested dictionaries of arrays.
        path: path of `tree`, such as "transformer".
        sharding_for: returns the sharding of an array from its path and shape.
    """
    for name, node in tree.items():
        if isinstance(node, dict):
            move_to_host(node, f"{path}/{name}", sharding_for)
            continue

        def put(key: Any, leaf: Any, name: str = name) -> jax.Array:
            below = jax.tree_util.keystr(key, simple=True, separator="/")
            leaf_path = f"{path}/{name}/{below}" if below else f"{path}/{name}"
            return jax.device_put(leaf, host_sharding(sharding_for(leaf_path, leaf.shape)))

        # Waits, since the original is freed only when the copy is complete.
        tree[name] = jax.block_until_ready(jax.tree_util.tree_map_with_path(put, node))


def with_parts_on_device(
    *parts: str,
) -> Callable[[Callable[Concatenate[Any, Args], Result]], Callable[Concatenate[Any, Args], Result]]:
    """Let a function of `FluxParams` run with parts that are in host memory.

    They are copied to their devices. When the result is complete the copies are deleted: not
    before, or the next model would be put beside them. With parameters on a device nothing changes.

    Args:
        parts: names of the parts that the function uses.
    """

    def decorate(
        function: Callable[Concatenate[Any, Args], Result],
    ) -> Callable[Concatenate[Any, Args], Result]:
        @functools.wraps(function)
        def wrapped(params: Any, *args: Args.args, **kwargs: Args.kwargs) -> Result:
            trees = {part: getattr(params, part, None) for part in parts}
            if not in_host_memory(trees):
                return function(params, *args, **kwargs)
            _check_not_traced((trees, args, kwargs))
            copies: list[jax.Array] = []
            try:
                trees = jax.tree.map(functools.partial(_copy_to_device, copies), trees)
                result = function(dataclasses.replace(params, **trees), *args, **kwargs)
                return jax.block_until_ready(result)
            finally:
                for copy in copies:
                    copy.delete()

        return wrapped

    return decorate


def _check_not_traced(leaves: Any) -> None:
    """Raise `ValueError` if an array is traced: a traced program runs after its copies are gone."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(leaves)):
        raise ValueError(
            "the parameters are in host memory (low_memory=True), and the call is traced by a "
            "transformation such as jit or grad; expected parameters on a device"
        )


def _copy_to_device(copies: list[jax.Array], leaf: Any) -> Any:
    """Return a leaf on its device; add it to `copies` if it was not there."""
    if not _is_on_host(leaf):
        return leaf
    kind = next(iter(leaf.sharding.addressable_devices)).default_memory().kind
    copy = jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
    _check_not_traced(copy)  # within `jit`, if the parameters are constants of it
    copies.append(copy)
    return copy
