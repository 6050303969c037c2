"""How parameters and activations are divided over a mesh of devices.

A mesh has any of three axes:

    data    the batch is divided
    fsdp    the batch is divided, and so are the parameters; a block's are gathered when it runs
    model   the heads of attention and the features of MLPs are divided, with their parameters

`RULES` is the one table from names of parameters to these axes. The models call the functions at
the end of this module on activations where XLA alone would choose badly. They find the mesh in
JAX's context (`jax.set_mesh`), and change nothing without one.

Source of "model": Shoeybi et al., 2019 (arXiv 1909.08053); of "fsdp": Rajbhandari et al., 2019
(arXiv 1910.02054), stage 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "model")
"""Names that the axes of a mesh may have."""
BATCH_AXES = ("data", "fsdp")
"""Axes over which the batch is divided."""

MESH_AXES: dict[str | None, tuple[str, ...]] = {
    "channels": ("fsdp",),
    "heads": ("model",),
    "features": ("model",),
    "outputs": ("model", "fsdp"),
    "vector": ("model", "fsdp"),
    None: (),
}
"""Kind of a dimension in `RULES` -> the mesh axes that it is divided over.

The channels of the residual stream, heads, and features of an MLP have to be divisible. For the
others, an axis that does not divide them is left out. "vector" is the output of a product with one
vector per sample: its weights stay divided, because it is cheaper to gather the vectors.
"""
DIVISIBLE = ("channels", "heads", "features")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("transformer/*modulation/kernel", (None, None, "vector")),
    ("transformer/*attention/qkv/kernel", ("channels", None, "heads", None)),
    ("transformer/*attention/qkv/bias", (None, "heads", None)),
    ("transformer/*_attention_out/kernel", ("heads", "channels")),
    ("transformer/*_mlp/up/kernel", ("channels", "features")),
    ("transformer/*_mlp/up/bias", ("features",)),
    ("transformer/*_mlp/down/kernel", ("features", "channels")),
    ("transformer/single_blocks/mlp_up/kernel", ("channels", "features")),
    ("transformer/single_blocks/mlp_up/bias", ("features",)),
    # Its inputs are all heads, then all features, which no division of one axis follows.
    ("transformer/single_blocks/out/kernel", (None, "outputs")),
    ("t5/token_embedding/embedding", (None, "vector")),
    ("t5/relative_bias/embedding", (None, "heads")),
    ("t5/blocks/attention/qkv/kernel", ("channels", None, "heads", None)),
    ("t5/blocks/attention/out/kernel", ("heads", "channels")),
    ("t5/blocks/mlp/gate_up/kernel", ("channels", None, "features")),
    ("t5/blocks/mlp/down/kernel", ("features", "channels")),
)
"""Pattern of a parameter's path -> the kinds of its last dimensions; the first match applies.

Dimensions before them, such as that of the stacked blocks, are not divided. A parameter without a
rule is whole on every device: norms and biases, the layers before and after the blocks (0.5 % of
FLUX.1's transformer), CLIP and the autoencoder. The last two have 0.2 of 17 billion parameters, and
every layer of them would wait for other devices.
"""
QUANTISED = ("values", "scales")
"""Names below a kernel's path of the arrays that a quantised kernel consists of."""


def check_mesh(mesh: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the axes of a mesh are known, and divide the parameters.

    Args:
        mesh: a `jax.sharding.Mesh`.
        shapes: path -> shape of all parameters that are loaded, unquantised.

    Raises:
        TypeError: `mesh` is not a mesh of devices.
        ValueError: an axis has another name, or a size that does not divide channels, heads or
            features.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh has the type {type(mesh).__name__}; expected a jax.sharding.Mesh")
    check_axes(mesh.shape, shapes)


def check_axes(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the axes of a mesh as `check_mesh` does.

    Args:
        sizes: size of each axis by name.
        shapes: as for `check_mesh`.
    """
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ValueError(f"mesh has the axis {unknown[0]!r}; expected axes of {', '.join(AXES)}")
    for axis, size in sizes.items():
        numbers = _numbers_to_divide(axis, shapes)
        bad = [f"{n} {what}" for what, n in numbers.items() if n % size]
        if bad:
            largest = math.gcd(*numbers.values())
            fitting = [str(n) for n in range(1, largest + 1) if largest % n == 0]
            raise ValueError(
                f"mesh axis {axis!r} has size {size}, which does not divide {' and '.join(bad)}; "
                f"expected {' or '.join(filter(None, (', '.join(fitting[:-1]), fitting[-1])))}"
            )


def _numbers_to_divide(axis: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What a mesh axis has to divide, such as "heads of the transformer" -> 24."""
    numbers: dict[str, int] = {}
    for path, shape in shapes.items():
        kinds = kinds_of_dimensions(path)
        for kind, size in zip(reversed(kinds), reversed(shape), strict=False):
            if kind in DIVISIBLE and axis in MESH_AXES[kind]:
                part = path.partition("/")[0]
                what = f"{kind} of {'the ' if part == 'transformer' else ''}{part}"
                # The inputs of an output projection are heads times their width.
                numbers[what] = math.gcd(numbers.get(what, 0), size)
    return numbers


def kinds_of_dimensions(path: str) -> tuple[str | None, ...]:
    """Return the kinds of the last dimensions of a parameter, by `RULES`."""
    parent, _, name = path.rpartition("/")
    path = parent if name in QUANTISED else path
    return next((kinds for pattern, kinds in RULES if fnmatchcase(path, pattern)), ())


def partition_spec(
    path: str, shape: tuple[int, ...], sizes: Mapping[str, int], *, gathered: bool = False
) -> PartitionSpec:
    """Return how a parameter is divided.

    A dimension that its mesh axes do not divide, such as one of length 1 of a quantised kernel's
    scales, is whole.

    Args:
        path: path, such as "transformer/single_blocks/out/kernel"; one of a quantised kernel's
            arrays has "/values" or "/scales" after it.
        shape: shape of the parameter, or of one block's.
        sizes: sizes of the mesh axes by name.
        gathered: whether to return how it is divided when it is used, by "model" alone.
    """
    kinds = kinds_of_dimensions(path)
    if len(kinds) > len(shape):
        return PartitionSpec()
    kinds = (*(None,) * (len(shape) - len(kinds)), *kinds)
    entries = []
    for kind, length in zip(kinds, shape, strict=True):
        wanted = [axis for axis in MESH_AXES[kind] if axis in sizes]
        if gathered and kind != "vector":
            wanted = [axis for axis in wanted if axis != "fsdp"]
        entries.append(_dividing(wanted, length, sizes))
    return PartitionSpec(*entries)


def sharding_function(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return a function from the path and shape of a parameter to its sharding.

    The axes of its mesh are auto axes: XLA decides how the results of operations are divided.
    """
    types = (AxisType.Auto,) * len(mesh.axis_names)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return lambda path, shape: NamedSharding(auto, partition_spec(path, shape, auto.shape))


def current_mesh() -> AbstractMesh | None:
    """Return the mesh in JAX's context; None if there is none that this module divides over."""
    mesh = jax.sharding.get_abstract_mesh()
    known = not mesh.empty and all(name in AXES for name in mesh.axis_names)
    return mesh if known and all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def batch_axes(mesh: AbstractMesh, batch: int) -> tuple[str, ...] | None:
    """Return the axes that divide a batch of this size; None if there are none."""
    return _dividing([axis for axis in BATCH_AXES if axis in mesh.shape], batch, mesh.shape)


def _dividing(axes: Sequence[str], length: int, sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    """Return those of the axes that together divide a length; None if there are none."""
    chosen: tuple[str, ...] = ()
    for axis in axes:
        if length % math.prod(sizes[name] for name in (*chosen, axis)) == 0:
            chosen = (*chosen, axis)
    return chosen or None


def over_batch(x: Array) -> Array:
    """Divide an array over its first axis, the batch, and over nothing else.

    A batch that the mesh does not divide is whole on every device.
    """
    mesh = current_mesh()
    return x if mesh is None else _constrain(x, batch_axes(mesh, x.shape[0]))


def whole(x: Array) -> Array:
    """Let every device have the whole array."""
    return x if current_mesh() is None else _constrain(x)


def _constrain(x: Array, *entries: Any) -> Array:
    if not isinstance(x, Tracer):
        try:
            jax.sharding.get_mesh()
        except ValueError:  # inside a transformation, where only the mesh's shape is known
            return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def gather_block(prefix: str) -> Callable[[Any, Any], Any] | None:
    """Return what gathers the parameters of one block over "fsdp", for `nn.scan`.

    If "fsdp" does not divide the batch, XLA would divide the channels of the activations instead,
    and sum all products, which at 1024 x 1024 pixels are more bytes than the weights. Quantised
    weights are gathered as they are stored.

    Args:
        prefix: path of the stack, such as "transformer/single_blocks".

    Returns:
        The argument `data_transform` of `nn.scan`; None if there is nothing to gather.
    """
    mesh = current_mesh()
    if mesh is None or "fsdp" not in mesh.shape:
        return None

    def gather(path: Any, leaf: Array) -> Array:
        # Keys of dictionaries, and attributes of quantised kernels.
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        name = "/".join(str(key) for key in keys[keys.index("params") + 1 :])
        spec = partition_spec(f"{prefix}/{name}", leaf.shape, mesh.shape, gathered=True)
        return jax.lax.with_sharding_constraint(leaf, spec)

    def transform(variables: Any, rngs: Any) -> tuple[Any, Any]:
        return jax.tree.map_with_path(gather, variables), rngs

    return transform


def over_heads(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Let each device attend with its own samples and heads.

    XLA cannot divide a Pallas kernel, nor a loop over heads.

    Args:
        attend: a function of query, key and value, [b, s, heads, width], and of the mask,
            [b, 1, 1, s] or None, that treats samples and heads independently.
    """
    mesh = current_mesh()
    if mesh is None:
        return attend

    def divided(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
        batch = batch_axes(mesh, query.shape[0])
        heads = "model" if query.shape[2] % mesh.shape.get("model", math.inf) == 0 else None
        spec = PartitionSpec(batch, None, heads, None)
        masks = None if mask is None else PartitionSpec(batch)
        run = jax.shard_map(
            attend, mesh=mesh, in_specs=(spec, spec, spec, masks), out_specs=spec, check_vma=False
        )
        return run(query, key, value, mask)

    return divided


def product_of_joined(product: Callable[..., Array], width: int) -> Callable[..., Array]:
    """Return `product` for inputs that are joined of two arrays, both divided over "model".

    Device i has the i-th part of either array, and these are not neighbours in the joined one. So
    the two are multiplied with their own rows of the weights. Each device exchanges weights, which
    are divided over their columns, for others; it never holds more of a block's than its share.

    Args:
        product: a function with the arguments of `lax.dot_general`; its kernel may be a pytree of
            a quantised kernel's values and scales, whose rows follow the inputs.
        width: channels of the first array.
    """
    mesh = current_mesh()
    if mesh is None or "model" not in mesh.shape:
        return product
    devices = mesh.shape["model"]

    def multiply(x: Array, kernel: Any, *args: Any, **kwargs: Any) -> Array:
        leaves, structure = jax.tree.flatten(kernel)
        cuts = [_cut(leaf, width, x.shape[-1], devices) for leaf in leaves]
        # More than values and scales are a low-rank update, whose rows are not all inputs.
        if None in cuts or len(leaves) > 2:
            return product(x, kernel, *args, **kwargs)  # XLA gathers `x`
        # Divided over columns first, or XLA would exchange rows, and then rows of rows.
        leaves = [_constrain(leaf, None, "model") for leaf in leaves]
        pairs = list(zip(leaves, cuts, strict=True))
        halves = (
            [leaf[:cut] if cut else leaf for leaf, cut in pairs],
            [leaf[cut:] if cut else leaf for leaf, cut in pairs],
        )
        weights = [[_constrain(part, None, "model") for part in half] for half in halves]
        spec = structure.unflatten([PartitionSpec("model" if cut else None) for cut in cuts])
        batch = batch_axes(mesh, x.shape[0])
        inputs = PartitionSpec(batch, None, "model")

        def of_device(x: Array, y: Array, for_x: Any, for_y: Any) -> Array:
            out = product(x, for_x, *args, **kwargs) + product(y, for_y, *args, **kwargs)
            return jax.lax.psum(out, "model")

        run = jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(inputs, inputs, spec, spec),
            out_specs=PartitionSpec(batch),
            check_vma=False,
        )
        return run(x[..., :width], x[..., width:], *map(structure.unflatten, weights))

    return multiply


def _cut(leaf: Array, width: int, inputs: int, devices: int) -> int | None:
    """Return how many rows of a kernel's array belong to the first `width` of the inputs.

    It is 0 for a single row, such as the scales of output channels, which belongs to all inputs;
    and None if the array cannot be cut there, or the devices do not divide the two parts.
    """
    rows = leaf.shape[0]
    if rows == 1:
        return 0
    cut, rest = divmod(rows * width, inputs)
    return None if rest or leaf.ndim != 2 or cut % devices or (rows - cut) % devices else cut
