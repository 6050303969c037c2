"""Nested dictionaries of arrays as flat ones, with the names joined by "/".

Flax has the same in `flax.traverse_util`; but importing it takes a quarter of a second, and loading
a checkpoint needs nothing else of Flax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested dictionaries by path; {"a": {"b": 1}} gives {"a/b": 1}.

    Empty dictionaries are left out.
    """
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            flat |= {f"{name}/{path}": leaf for path, leaf in flatten(node).items()}
        else:
            flat[name] = node
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
