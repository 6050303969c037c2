"""Arrays over meshes with explicit axes (`jax.make_mesh`), moved to the same mesh with auto axes.

With explicit axes every operation must say how its result is sharded. The models and the sampler
leave that to XLA, which is what auto axes mean.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding


def to_auto_axes(tree: Any) -> Any:
    """Return a pytree whose arrays are sharded over auto axes; no data moves.

    Args:
        tree: a pytree of arrays; other leaves are returned unchanged.

    Raises:
        ValueError: an array is traced (under `jit`) and sharded over explicit axes.
    """
    return jax.tree.map(_to_auto_axes, tree)


def _to_auto_axes(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
    explicit = () if mesh is None else tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )  # fmt: skip
    if not explicit:
        return leaf
    if isinstance(leaf, Tracer):
        raise ValueError(
            f"an array under jit lies on a mesh with explicit axes {explicit}; expected a mesh "
            "with auto axes: jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
        )
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    types = (AxisType.Auto,) * len(sharding.mesh.axis_names)
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names, axis_types=types)
    return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))
