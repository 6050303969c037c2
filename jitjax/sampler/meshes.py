"""Functions that run over auto axes when their arrays or the mesh have explicit ones.

With explicit axes (`jax.make_mesh`, `jax.set_mesh`) every operation must say how its result is
sharded. The models and the sampler leave that to XLA, which is what auto axes mean.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)

Args = ParamSpec("Args")
Result = TypeVar("Result")


def with_auto_axes(*batched: str) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Let a function run over auto axes; its results are back on the mesh that it was called with.

    It works with and without `jax.set_mesh`, under `jit` and the other transformations. Arguments
    are not moved. Without explicit axes nothing changes.

    Args:
        batched: names of arguments whose first axis is the batch. Results with the batch as their
            first axis are sharded as in the first of these arguments that is sharded over it;
            others are replicated.
    """

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            arrays = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.Array)]
            explicit = [x for x in arrays if _has_explicit_axes(_mesh(x))]
            context = get_abstract_mesh()
            if not explicit and not _has_explicit_axes(context):
                with _mesh_of(arrays):
                    return function(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            batch, axis = _batch_axis([arguments.get(name) for name in batched])

            def spec(leaf: jax.Array) -> PartitionSpec:
                over_batch = leaf.ndim > 0 and leaf.shape[0] == batch
                return PartitionSpec(
                    *([axis if over_batch else None] + [None] * leaf.ndim)[: leaf.ndim]
                )

            if _has_explicit_axes(context) or any(isinstance(x, Tracer) for x in explicit):
                mesh = context if _has_explicit_axes(context) else _mesh(explicit[0])
                return _run_in_context(function, args, kwargs, mesh, spec)
            # Without a context, operations outside `jit` run where their arrays are.
            args, kwargs = jax.tree.map(_put_on_auto_axes, (args, kwargs))
            sharding: Any = explicit[0].sharding
            with _mesh_of(jax.tree.leaves((args, kwargs))):
                result = function(*args, **kwargs)
            return _map_arrays(
                lambda leaf: jax.device_put(leaf, NamedSharding(sharding.mesh, spec(leaf))), result
            )

        return wrapped

    return decorate


def _run_in_context(
    function: Callable, args: Any, kwargs: Any, mesh: Any, spec: Callable[[Any], PartitionSpec]
) -> Any:
    names = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {name: AxisType.Auto for name, kind in names if kind == AxisType.Explicit}
    with use_abstract_mesh(mesh.update_axis_types(auto)):
        # Over auto axes an empty specification leaves the sharding to XLA.
        on_auto = _map_arrays(lambda leaf: reshard(leaf, PartitionSpec()), (args, kwargs))
        result = function(*on_auto[0], **on_auto[1])
    with use_abstract_mesh(mesh):
        return _map_arrays(lambda leaf: reshard(leaf, spec(leaf)), result)


def _mesh_of(arrays: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Set the mesh of the first array that lies on several devices, unless one is set."""
    meshes = [mesh for x in arrays if (mesh := _mesh(x)) is not None and mesh.size > 1]
    if not meshes or not get_abstract_mesh().empty:
        return contextlib.nullcontext()
    concrete = [getattr(x, "sharding", None) for x in arrays if not isinstance(x, Tracer)]
    for mesh in (getattr(sharding, "mesh", None) for sharding in concrete):
        if isinstance(mesh, Mesh) and mesh.abstract_mesh == meshes[0]:
            with contextlib.suppress(ValueError):  # inside a transformation
                return jax.set_mesh(mesh)
    return use_abstract_mesh(meshes[0])


def _map_arrays(change: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(lambda leaf: change(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _mesh(array: Any) -> AbstractMesh | None:
    known = isinstance(array, jax.Array)
    return getattr(jax.typeof(array).sharding, "mesh", None) if known else None


def _has_explicit_axes(mesh: AbstractMesh | None) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _put_on_auto_axes(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or not _has_explicit_axes(_mesh(leaf)):
        return leaf
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    types = (AxisType.Auto,) * len(sharding.mesh.axis_names)
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names, axis_types=types)
    kind = sharding.memory_kind  # parameters may be in host memory
    return jax.device_put(leaf, NamedSharding(mesh, sharding.spec, memory_kind=kind))


def _batch_axis(arguments: list[Any]) -> tuple[int | None, Any]:
    """Return the batch size and the mesh axis over which it is sharded; (None, None) if none is."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array) and leaf.ndim and _has_explicit_axes(_mesh(leaf)):
            spec = jax.typeof(leaf).sharding.spec
            if spec and spec[0] is not None:
                return leaf.shape[0], spec[0]
    return None, None
