"""The conversion engine: applies a table of rules in both directions.

A rule names the source tensors (PyTorch names) of one target leaf (a path in our parameter tree)
and the transform between them. The tables are data in the neighbouring modules; nothing in this
module is specific to a model.

    sources                                    transform       target
    blocks.{i}.attn.to_q.weight  [out, in]
    blocks.{i}.attn.to_k.weight  [out, in]  -- "fused" -->     double_blocks/attention/qkv/kernel
    blocks.{i}.attn.to_v.weight  [out, in]                     [blocks, in, 3, heads, width]

Every source tensor must be used exactly once, and every target leaf filled exactly once, with the
exact shape. One `ConversionError` has all mismatches; its message lists the first ones.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jitjax.nested import flatten, unflatten

from .finite import all_finite, explain_non_finite

Array = Any
Shape = tuple[int, ...]
Tree = dict[str, Any]
"""Nested dictionaries with arrays at the leaves: the Flax `params` collection of one model."""


MAX_LINES = 20
"""Largest number of problems that the message of a `ConversionError` lists."""


class ConversionError(ValueError):
    """The source tensors do not match the rule table.

    The message lists the first `MAX_LINES` mismatches and the number of the others.

    Attributes:
        lists: title -> all problems under it.
    """

    def __init__(self, message: str = "", lists: Mapping[str, Sequence[str]] | None = None) -> None:
        self.lists = dict(lists or {})
        if not message:
            limit = max(1, MAX_LINES // max(1, len(self.lists)))
            message = "\n".join(_shortened(*item, limit) for item in self.lists.items())
        super().__init__(message)

    @classmethod
    def from_problems(cls, label: str, problems: Sequence[str]) -> ConversionError:
        """Return the error that lists the problems of the model or file called `label`."""
        return cls(lists={f"{label}: {len(problems)} mismatched key(s)": problems})

    @classmethod
    def from_errors(cls, errors: Sequence[ConversionError]) -> ConversionError:
        """Return one error for several models; its message is no longer than that of one."""
        lists: dict[str, Sequence[str]] = {}
        for error in errors:
            lists |= error.lists or {str(error): ()}
        return cls(lists=lists)


def _shortened(title: str, problems: Sequence[str], limit: int) -> str:
    lines = [title, *problems[:limit]]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    return "\n  ".join(lines)


@dataclass(frozen=True)
class Rule:
    """One target leaf and the source tensors it is made from.

    Attributes:
        target: path of the leaf in the parameter tree, joined by "/".
        sources: names of the source tensors; of one block, if the leaf is stacked.
        transform: key of `TRANSFORMS`.
        blocks: number of blocks stacked along the leaf's first axis, or None if it is not
            stacked. `{i}` in `sources` stands for the block's number.
    """

    target: str
    sources: tuple[str, ...]
    transform: str = "same"
    blocks: int | None = None

    def source_names(self) -> list[tuple[str, ...]]:
        """Return the source names of each block; one entry if the leaf is not stacked."""
        if self.blocks is None:
            return [self.sources]
        return [tuple(s.replace("{i}", str(i)) for s in self.sources) for i in range(self.blocks)]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions between source tensors and one (unstacked) target leaf.

    Attributes:
        source_shapes: (target shape, number of sources) -> shapes of the source tensors.
        forward: (source tensors, target) -> None; writes into `target`, a row-major array.
        backward: (target, number of sources) -> source tensors.
    """

    source_shapes: Callable[[Shape, int], list[Shape]]
    forward: Callable[[Sequence[Array], np.ndarray], None]
    backward: Callable[[Array, int], list[Array]]


TILE, STRIP = 128, 1024  # rows and columns that are transposed at once
PADDING = 32  # columns; rows a power of two apart compete for the same few cache lines


def transpose(source: np.ndarray, out: np.ndarray) -> None:
    """Write `source.T` into `out`, several times as fast as NumPy does.

    Works strip by strip. Each strip is first copied into a padded buffer, whose rows do not evict
    each other from the cache. Values are moved as unsigned integers of the same size, because
    NumPy has no fast copy of bfloat16.

    Args:
        source: [rows, columns].
        out: [columns, rows]; the values are cast if its dtype differs.
    """
    if source.dtype == out.dtype:
        bits = np.dtype(f"u{out.dtype.itemsize}")
        source, out = source.view(bits), out.view(bits)
    rows, columns = source.shape
    buffer = np.empty((TILE, min(STRIP, columns) + PADDING), source.dtype)
    for i in range(0, rows, TILE):
        for j in range(0, columns, STRIP):
            strip = source[i : i + TILE, j : j + STRIP]
            copy = buffer[: strip.shape[0], : strip.shape[1]]
            copy[...] = strip
            out[j : j + STRIP, i : i + TILE] = copy.T


def _write_linear(sources: Sequence[Array], out: np.ndarray) -> None:
    transpose(sources[0], out.reshape(len(out), -1))


def _write_fused(sources: Sequence[Array], out: np.ndarray) -> None:
    matrices = out.reshape(len(out), len(sources), -1)
    for j, source in enumerate(sources):
        transpose(source, matrices[:, j])


def _write_fused_bias(sources: Sequence[Array], out: np.ndarray) -> None:
    for source, part in zip(sources, out, strict=True):
        part[...] = source.reshape(part.shape)


def _write_conv(sources: Sequence[Array], out: np.ndarray) -> None:
    out[...] = sources[0].transpose(2, 3, 1, 0)


def _write_reshaped(sources: Sequence[Array], out: np.ndarray) -> None:
    out[...] = sources[0].reshape(out.shape)


def _linear_source_shapes(shape: Shape, n: int) -> list[Shape]:
    return [(math.prod(shape[1:]), shape[0])]


def _fused_source_shapes(shape: Shape, n: int) -> list[Shape]:
    return [(math.prod(shape[2:]), shape[0])] * n


TRANSFORMS: dict[str, Transform] = {
    # no change
    "same": Transform(lambda shape, n: [shape], _write_reshaped, lambda y, n: [y]),
    # a vector to a bias of several axes (heads, width)
    "flat": Transform(
        lambda shape, n: [(math.prod(shape),)],
        _write_reshaped,
        lambda y, n: [y.reshape(-1)],
    ),
    # torch Linear [out, in] to a Dense(General) kernel [in, *out]
    "linear": Transform(
        _linear_source_shapes,
        _write_linear,
        lambda y, n: [y.reshape(y.shape[0], -1).T],
    ),
    # n Linears [out, in] to one DenseGeneral kernel [in, n, *out]
    "fused": Transform(
        _fused_source_shapes,
        _write_fused,
        lambda y, n: [y[:, j].reshape(y.shape[0], -1).T for j in range(n)],
    ),
    # n biases [out] to one bias [n, *out]
    "fused_bias": Transform(
        lambda shape, n: [(math.prod(shape[1:]),)] * n,
        _write_fused_bias,
        lambda y, n: [y[j].reshape(-1) for j in range(n)],
    ),
    # torch Conv2d [out, in, h, w] to a Conv kernel [h, w, in, out]
    "conv": Transform(
        lambda shape, n: [(shape[3], shape[2], shape[0], shape[1])],
        _write_conv,
        lambda y, n: [y.transpose(3, 2, 0, 1)],
    ),
}


def expected_sources(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return name -> shape of the source tensors that `rules` need.

    Args:
        rules: the rule table.
        shapes: path -> shape of every target leaf.
    """
    expected: dict[str, Shape] = {}
    for rule in rules:
        shape = shapes[rule.target]
        block_shape = shape if rule.blocks is None else shape[1:]
        for names in rule.source_names():
            source_shapes = TRANSFORMS[rule.transform].source_shapes(block_shape, len(names))
            expected.update(zip(names, source_shapes, strict=True))
    return expected


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Return path (joined by "/") -> leaf."""
    return flatten(tree)


def leaf_shapes(tree: Tree) -> dict[str, Shape]:
    """Return path -> shape of every leaf; leaves are arrays or `jax.ShapeDtypeStruct`s."""
    return {path: tuple(leaf.shape) for path, leaf in leaves_by_path(tree).items()}


def check_keys(
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    sources: Mapping[str, Shape],
    *,
    label: str,
    ignored: Iterable[str] = (),
) -> None:
    """Check that rule table, parameter tree and source tensors match.

    Args:
        rules: the rule table.
        shapes: path -> shape of every leaf of the parameter tree.
        sources: name -> shape of every source tensor.
        label: name of the model, for the error message.
        ignored: names of source tensors that need no rule (buffers such as position ids).

    Raises:
        ConversionError: something does not match; it has every mismatch.
    """
    problems: list[str] = []
    targets = Counter(rule.target for rule in rules)
    problems += [f"leaf filled twice: {t}" for t, n in targets.items() if n > 1]
    problems += [f"leaf without a rule: {t}" for t in shapes if t not in targets]
    problems += [f"rule for a leaf that does not exist: {t}" for t in targets if t not in shapes]
    used = Counter(name for rule in rules for names in rule.source_names() for name in names)
    problems += [f"key used twice: {k}" for k, n in used.items() if n > 1]
    matching_rules: list[Rule] = []
    for rule in rules:
        shape = shapes.get(rule.target)
        if shape is not None and rule.blocks is not None and shape[:1] != (rule.blocks,):
            problems.append(
                f"leaf {rule.target} has shape {list(shape)}; its rule has {rule.blocks} blocks"
            )
        elif shape is not None:
            matching_rules.append(rule)
    expected = expected_sources(matching_rules, shapes)
    problems += find_mismatches(expected, sources, used.keys() | set(ignored))
    if problems:
        raise ConversionError.from_problems(label, problems)


def find_mismatches(
    expected: Mapping[str, Shape], sources: Mapping[str, Shape], known: Container[str]
) -> list[str]:
    """Return a message for each source tensor that is unknown, missing or of another shape.

    Args:
        expected: name -> shape of every tensor that is needed.
        sources: name -> shape of every tensor that is available.
        known: names that are allowed in `sources`.
    """
    problems = [f"unmatched key: {k}" for k in sources if k not in known]
    for name, shape in expected.items():
        if name not in sources:
            problems.append(f"missing key: {name} {list(shape)}")
        elif tuple(sources[name]) != tuple(shape):
            problems.append(
                f"wrong shape: {name} has shape {list(sources[name])}; expected {list(shape)}"
            )
    return problems


def apply_rule(
    rule: Rule,
    read: Callable[[str], np.ndarray],
    shape: Shape,
    dtype: Any,
    blocks: slice = slice(None),
    empty: Callable[[Shape, Any], np.ndarray] = np.empty,
    origin: Callable[[str], str] = str,
) -> np.ndarray:
    """Make one target leaf, or some blocks of a stacked leaf, from its source tensors.

    Apart from the result, the source tensors of at most one block are in memory.

    Args:
        rule: the leaf's rule.
        read: returns a source tensor by name.
        shape: shape of the whole leaf.
        dtype: dtype of the leaf.
        blocks: which blocks of a stacked leaf to make; the result keeps the block axis.
        empty: allocates an array of a shape and dtype.
        origin: says where a source tensor is from (its name and file), for the error message.

    Raises:
        ConversionError: a source tensor has NaN or infinity, or a value does not fit into `dtype`;
            the message names the tensor.
    """
    transform, names = TRANSFORMS[rule.transform], rule.source_names()[blocks]
    out = empty(shape if rule.blocks is None else (len(names), *shape[1:]), dtype)
    views = [out] if rule.blocks is None else [out[i, ...] for i in range(len(out))]
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        for view, block_names in zip(views, names, strict=True):
            transform.forward([read(name) for name in block_names], view)
            if not all_finite(view):  # right after writing, while the values are in the cache
                origins, tensors = map(origin, block_names), [read(name) for name in block_names]
                raise ConversionError(
                    explain_non_finite(rule.target, out.dtype, list(origins), tensors)
                )
    return out


def invert_rule(rule: Rule, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """Return name -> source tensor of one target leaf: the inverse of `apply_rule`."""
    transform = TRANSFORMS[rule.transform]
    views = [leaf] if rule.blocks is None else [leaf[i, ...] for i in range(rule.blocks)]
    out: dict[str, np.ndarray] = {}
    for view, names in zip(views, rule.source_names(), strict=True):
        tensors = transform.backward(view, len(names))
        out.update(zip(names, (np.require(t, requirements="C") for t in tensors), strict=True))
    return out


def leaf_dtypes(
    rules: Iterable[Rule], dtypes: Mapping[str, np.dtype], dtype: Any = None
) -> dict[str, np.dtype]:
    """Return path -> dtype of every target leaf.

    Args:
        rules: the rule table.
        dtypes: name -> dtype of every source tensor.
        dtype: dtype of every leaf. None keeps the dtype of the sources; if the sources of one
            leaf differ, it is their common type by `jnp.promote_types`.
    """
    out: dict[str, np.dtype] = {}
    for rule in rules:
        sources = {np.dtype(dtypes[name]) for names in rule.source_names() for name in names}
        common = functools.reduce(lambda a, b: np.dtype(jnp.promote_types(a, b)), sources)
        out[rule.target] = common if dtype is None else np.dtype(dtype)
    return out


def build_tree(
    rules: Iterable[Rule],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str], np.ndarray],
) -> Tree:
    """Build the parameter tree of one model. Call `check_keys` first.

    Args:
        rules: the rule table.
        shapes: path -> shape of every leaf.
        dtypes: path -> dtype of every leaf.
        read: returns a source tensor by name.
    """
    targets = ((rule.target, rule) for rule in rules)
    leaves = {path: apply_rule(rule, read, shapes[path], dtypes[path]) for path, rule in targets}
    return unflatten(leaves)
