"""Quantised weights: values of 8 or 4 bits with scales, and the product with them.

    kind      values                     bytes per weight   one scale per
    int8      int8, -127 to 127          1                  block and output channel
    int4      -8 to 7, two in a uint8    0.53               64 inputs of an output channel
    float8    float8_e4m3fn, as uint8    1                  block and output channel

Quantised are the kernels of all projections inside the scanned blocks of the transformer and of T5:
98 % of FLUX.1-dev's weights. Everything else stays as it is, because it is small or sensitive:
biases, norms, embeddings, the layers outside the blocks (`image_in`, `text_in`, those that embed
sigma, guidance and the pooled prompt, `final_modulation`, `image_out`), and CLIP and the
autoencoder.

A kernel is stacked, [blocks, inputs, *outputs]. `nn.scan` slices values and scales together, so
that one block at a time is made floating-point, within the scan, and never a stack.

4 bits are packed by hand: JAX's own `int4` takes a whole byte on CPUs and in files. The bits of
float8 are kept as uint8, because XLA for CPUs makes float16 of a stack of float8 to slice it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

GROUP = 64
"""Number of inputs that share a scale in int4; fewer in a layer whose inputs it does not divide."""
QUANTISED_PARTS = ("transformer", "t5")
"""The parts that have quantised weights."""

KINDS = ("int8", "int4", "float8")
"""Names of the kinds of quantisation."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised kernel: a pytree of two arrays, of one block or stacked over blocks.

    Attributes:
        values: [..., inputs, *outputs] int8, or uint8 for the bits of float8_e4m3fn; or
            [..., inputs / 2, *outputs] uint8 for int4, where the low four bits are an even input
            and the high four bits the next.
        scales: [..., groups, *outputs], one per group of inputs; float32, and bfloat16 for int4.
            A weight is its value times its scale.
        kind: name of the quantisation, in `KINDS`.
        down, up: [..., inputs, rank] and [..., rank, *outputs], a low-rank update (LoRA) whose
            product is added to the weights; None without one. It is kept beside them, because most
            of it is smaller than what rounding to the quantised values leaves.
    """

    values: Any
    scales: Any
    kind: str = dataclasses.field(metadata={"static": True})
    down: Any = None
    up: Any = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.values.shape) * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = jax.tree.leaves(self)
        return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)


def is_quantised(leaf: Any) -> bool:
    """Whether `leaf` is a quantised kernel; for `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Quantised)


def check_kind(kind: Any) -> str:
    """Return `kind`. Raises `ValueError` unless it is one of `KINDS`."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"quantise is {kind!r}; expected one of {', '.join(KINDS)}")
    return kind


def is_quantisable(part: str, path: str) -> bool:
    """Whether a leaf is one that quantisation changes.

    Args:
        part: name of its part, such as "transformer".
        path: its path within the part, such as "single_blocks/out/kernel".
    """
    in_blocks = path.partition("/")[0].endswith("blocks")
    return part in QUANTISED_PARTS and in_blocks and path.endswith("/kernel")


@functools.partial(jax.jit, static_argnames="kind")
def quantise_stack(kernel: Float[Array, "blocks inputs *outputs"], kind: str) -> Quantised:
    """Quantise a stacked kernel, each value to the nearest.

    Args:
        kernel: one or more blocks of a kernel.
        kind: one of `KINDS`.

    Raises:
        ValueError: `kind` is unknown, or int4 has an odd number of inputs to pack.
    """
    return jax.vmap(functools.partial(_quantise_block, kind=check_kind(kind)))(kernel)


def _quantise_block(kernel: Float[Array, " inputs *outputs"], kind: str) -> Quantised:
    inputs, *outputs = kernel.shape
    size = math.gcd(inputs, GROUP) if kind == "int4" else inputs
    if kind == "int4" and size % 2:
        raise ValueError(f"a kernel has {inputs} inputs; int4 expects an even number")
    weights = kernel.astype(jnp.float32).reshape(inputs // size, size, *outputs)
    largest = jnp.abs(weights).max(axis=1, keepdims=True)
    if kind == "int4":
        # The weight of the largest magnitude becomes -8, so that all 16 values are used. Scales are
        # rounded before the values, which then make up for it.
        positive = weights.max(axis=1, keepdims=True) == largest
        scales = (jnp.where(positive, -largest, largest) / 8).astype(jnp.bfloat16)
        low, high = -8, 7
    else:
        high = 127 if kind == "int8" else float(jnp.finfo(jnp.float8_e4m3fn).max)
        scales, low = largest / high, -high
    scales = jnp.where(scales == 0, jnp.ones_like(scales), scales)  # all weights are 0
    values = (weights / scales.astype(jnp.float32)).reshape(kernel.shape)
    if kind != "float8":
        values = jnp.round(values)
    values = jnp.clip(values, low, high)
    if kind == "int4":
        pairs = values.astype(jnp.int32).reshape(inputs // 2, 2, *outputs)
        stored = ((pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4)).astype(jnp.uint8)
    elif kind == "int8":
        stored = values.astype(jnp.int8)
    else:
        stored = jax.lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)
    return Quantised(stored, scales[:, 0], kind)


def dequantise(kernel: Quantised, dtype: DTypeLike) -> Float[Array, " inputs *outputs"]:
    """Return the weights of one block of a quantised kernel, without its low-rank update."""
    wide = jnp.promote_types(dtype, jnp.float32)
    values = _values(kernel).astype(wide)
    groups = values.reshape(len(kernel.scales), -1, *values.shape[1:])
    return (groups * kernel.scales[:, None].astype(wide)).reshape(values.shape).astype(dtype)


def _values(kernel: Quantised) -> Array:
    """Return the values of one block, one per weight: int8, or float8_e4m3fn."""
    if kernel.kind == "int8":
        return kernel.values
    if kernel.kind == "float8":
        return jax.lax.bitcast_convert_type(kernel.values, jnp.float8_e4m3fn)
    packed = jax.lax.bitcast_convert_type(kernel.values, jnp.int8)
    pairs = jnp.stack([packed << 4, packed], axis=1) >> 4  # the shift keeps the sign
    return pairs.reshape(-1, *packed.shape[1:])


def multiply(x: Float[Array, "*batch inputs"], kernel: Quantised) -> Float[Array, ...]:
    """Multiply with one block of a quantised kernel.

    Where a channel has one scale, the values are multiplied as they are, which is exact in every
    dtype, and the products scaled. They are summed in float32, since float16 would overflow. With
    groups (int4) the weights are made first.

    Args:
        x: inputs; their dtype is that of the computation and of the result.
        kernel: the kernel, [inputs, *outputs].

    Returns:
        [*batch, *outputs].
    """
    if kernel.kind == "int4":
        product = _times(x, dequantise(kernel, x.dtype))
    else:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        sums = _times(x, _values(kernel).astype(x.dtype), preferred_element_type=wide)
        scales = kernel.scales.astype(wide)
        scales = scales.reshape((1,) * (x.ndim - 1) + scales.shape[1:])
        product = (sums * scales).astype(x.dtype)
    if kernel.down is None:
        return product
    down, up = (factor.astype(x.dtype) for factor in (kernel.down, kernel.up))
    return product + _times(_times(x, down), up)


def _times(x: Array, matrix: Array, **options: Any) -> Array:
    return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), **options)


def quantise_tree(part: str, tree: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Quantise the parameters of one part, leaf by leaf and block by block.

    Args:
        part: name of the part; of those not in `QUANTISED_PARTS` nothing is changed.
        tree: nested dictionaries of arrays, or of `jax.ShapeDtypeStruct`s for the shapes alone.
        kind: one of `KINDS`.

    Raises:
        ValueError: `kind` is unknown, or the tree is quantised in another way.
    """
    check_kind(kind)
    if (found := kind_of(tree)) not in (None, kind):
        raise ValueError(f"{part} is already quantised to {found}; expected {found}, not {kind}")

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {name: walk(child, f"{path}/{name}") for name, child in node.items()}
        if is_quantised(node) or not is_quantisable(part, path[1:]):
            return node
        return _quantise_leaf(node, kind)

    return walk(tree, "")


def _quantise_leaf(leaf: Any, kind: str) -> Quantised:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(functools.partial(quantise_stack, kind=kind), leaf)
    blocks = [quantise_stack(leaf[i : i + 1], kind) for i in range(len(leaf))]
    return _join(*blocks)


@jax.jit
def _join(*blocks: Quantised) -> Quantised:
    """Return a stack of blocks; a program for each stack, and not for each of its arrays."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *blocks)


def kind_of(tree: Any) -> str | None:
    """Return the kind that the leaves of a tree are quantised to; None if none is.

    Raises:
        ValueError: there are several kinds.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_quantised)
    kinds = sorted({leaf.kind for leaf in leaves if is_quantised(leaf)})
    if len(kinds) > 1:
        raise ValueError(f"weights are quantised to {' and '.join(kinds)}; expected one kind")
    return kinds[0] if kinds else None


def float_dtype(tree: Any) -> Any:
    """Return the dtype of the parameters that are not quantised, in which a model computes."""
    leaves = jax.tree.leaves(tree, is_leaf=is_quantised)
    return next(leaf.dtype for leaf in leaves if not is_quantised(leaf))


def as_dicts(tree: Any) -> Any:
    """Return a tree with {"values": ..., "scales": ...} for each quantised kernel.

    Kernels with a low-rank update also have "down" and "up".
    """
    if isinstance(tree, Mapping):
        return {name: as_dicts(node) for name, node in tree.items()}
    if not is_quantised(tree):
        return tree
    arrays = {name: getattr(tree, name) for name in ("values", "scales", "down", "up")}
    return {name: array for name, array in arrays.items() if array is not None}


def from_dicts(tree: Any, kind: str | None) -> Any:
    """Undo `as_dicts`: return a tree with a `Quantised` of a kind for each of its dictionaries."""
    if kind is None or not isinstance(tree, Mapping):
        return tree
    if {"values", "scales"} <= tree.keys():
        return Quantised(**tree, kind=kind)
    return {name: from_dicts(node, kind) for name, node in tree.items()}


def product(
    x: Array, kernel: Array | Quantised, dimension_numbers: Any, precision: Any = None
) -> Array:
    """Multiply with a kernel that may be quantised; as `lax.dot_general`, of the last axis of `x`.

    Quantised kernels are used by `nn.Dense` and `nn.DenseGeneral`, whose axes are always these.
    """
    if isinstance(kernel, Quantised):
        return multiply(x, kernel)
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision)


def promote(*arrays: Any, dtype: Any = None, **options: Any) -> Iterable[Any]:
    """Cast arrays to `dtype`, as Flax's `promote_dtype`; quantised kernels stay as they are."""
    from flax.linen.dtypes import promote_dtype

    plain = [None if is_quantised(array) else array for array in arrays]
    promoted = promote_dtype(*plain, dtype=dtype, **options)
    return [a if is_quantised(a) else p for a, p in zip(arrays, promoted, strict=True)]
