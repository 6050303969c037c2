"""Splitting of a pytree into arrays, which `jit` traces, and the rest, which it compiles for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Static:
    """A pytree without its arrays: hashable, and equal for equal structures and values.

    Attributes:
        structure: the structure of the pytree.
        leaves: its leaves that are no arrays; None in the place of an array.
        is_array: whether each leaf is an array.
    """

    structure: Any
    leaves: tuple[Any, ...]
    is_array: tuple[bool, ...]

    def join(self, arrays: list[Any]) -> Any:
        """Return the pytree with `arrays` in their places; the inverse of `split_arrays`."""
        rest = iter(arrays)
        leaves = [
            next(rest) if is_array else leaf
            for leaf, is_array in zip(self.leaves, self.is_array, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def split_arrays(name: str, tree: Any) -> tuple[list[Any], Static]:
    """Split a pytree, such as an equinox module, into its arrays and a hashable rest.

    A function is a pytree with one leaf. A `functools.partial` counts as a pytree of its arguments.

    Args:
        name: name of the argument, for the message.
        tree: the pytree.

    Raises:
        ValueError: something that is no array is not hashable.
    """
    if type(tree) is functools.partial:
        tree = jax.tree_util.Partial(tree.func, *tree.args, **tree.keywords)
    leaves, structure = jax.tree.flatten(tree)
    is_array = tuple(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves)
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    rest = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    static = Static(structure, rest, is_array)
    try:
        hash(static)
    except TypeError as error:
        raise ValueError(
            f"{name} is a {type(tree).__name__} that is not hashable ({error}); expected a "
            "hashable function, or a pytree of arrays and hashable values"
        ) from None
    return arrays, static
