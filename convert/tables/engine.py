"""The conversion engine: a table of rules, applied forwards and backwards.

A rule says which source tensors (PyTorch names) make one target leaf (a path in our parameter
tree), and how. Tables are data, in the modules beside it; this file knows no model.

    sources                                    transform       target
    blocks.{i}.attn.to_q.weight  [out, in]
    blocks.{i}.attn.to_k.weight  [out, in]  -- "fused" -->     double_blocks/attention/qkv/kernel
    blocks.{i}.attn.to_v.weight  [out, in]                     [blocks, in, 3, heads, width]

Every source must be used exactly once and every target leaf filled exactly once, with the exact
shape: all that does not fit is collected into one `ConversionError`.
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
from flax.traverse_util import flatten_dict, unflatten_dict

Array = Any
Shape = tuple[int, ...]
Tree = dict[str, Any]
"""Nested dictionaries with arrays at the leaves: the Flax `params` collection of one model."""


class ConversionError(ValueError):
    """The source tensors and the rule table do not fit; the message lists every misfit."""

    @classmethod
    def of(cls, what: str, problems: Sequence[str]) -> ConversionError:
        """The error that lists the problems of one model."""
        return cls(f"{what}: {len(problems)} key(s) do not fit\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class Rule:
    """One target leaf and where it comes from.

    Attributes:
        target: path of the leaf in the parameter tree, parts joined by "/".
        sources: names of the source tensors that make it (of one block, if stacked).
        transform: a key of `TRANSFORMS`.
        blocks: if not None, the leaf has a leading axis of this size, and `{i}` in `sources`
            runs over it.
    """

    target: str
    sources: tuple[str, ...]
    transform: str = "same"
    blocks: int | None = None

    def names(self) -> list[tuple[str, ...]]:
        """Source names per block (a single entry if the leaf is not stacked)."""
        if self.blocks is None:
            return [self.sources]
        return [tuple(s.replace("{i}", str(i)) for s in self.sources) for i in range(self.blocks)]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions between source tensors and one (unstacked) target leaf.

    Attributes:
        sources: the target's shape and the number of sources -> shapes of the source tensors.
        forward: writes the target, a row-major array that is given, from the source tensors.
        backward: target and the number of sources -> source tensors.
    """

    sources: Callable[[Shape, int], list[Shape]]
    forward: Callable[[Sequence[Array], np.ndarray], None]
    backward: Callable[[Array, int], list[Array]]


TILE, STRIP = 128, 1024  # rows and columns that are transposed at once
PADDING = 32  # columns: rows a power of two apart would all want the same few lines of a cache


def transpose(source: np.ndarray, out: np.ndarray) -> None:
    """Write `source.T` into `out` strip by strip: several times as fast as NumPy's own.

    Each strip is first copied, row by row, to where its rows do not drive each other out of the
    cache. Bits are moved as integers of their size, since NumPy knows no fast copy of bfloat16.
    """
    if source.dtype == out.dtype:
        bits = np.dtype(f"u{out.dtype.itemsize}")
        source, out = source.view(bits), out.view(bits)
    rows, columns = source.shape
    near = np.empty((TILE, min(STRIP, columns) + PADDING), source.dtype)
    for i in range(0, rows, TILE):
        for j in range(0, columns, STRIP):
            strip = source[i : i + TILE, j : j + STRIP]
            copy = near[: strip.shape[0], : strip.shape[1]]
            copy[...] = strip
            out[j : j + STRIP, i : i + TILE] = copy.T


def _fill_linear(xs: Sequence[Array], out: np.ndarray) -> None:
    transpose(xs[0], out.reshape(len(out), -1))


def _fill_fused(xs: Sequence[Array], out: np.ndarray) -> None:
    matrices = out.reshape(len(out), len(xs), -1)
    for j, x in enumerate(xs):
        transpose(x, matrices[:, j])


def _fill_each(xs: Sequence[Array], out: np.ndarray) -> None:
    for x, part in zip(xs, out, strict=True):
        part[...] = x.reshape(part.shape)


def _fill_conv(xs: Sequence[Array], out: np.ndarray) -> None:
    out[...] = xs[0].transpose(2, 3, 1, 0)


def _fill_flat(xs: Sequence[Array], out: np.ndarray) -> None:
    out[...] = xs[0].reshape(out.shape)


def _linear_shape(shape: Shape, n: int) -> list[Shape]:
    return [(math.prod(shape[1:]), shape[0])]


def _fused_shape(shape: Shape, n: int) -> list[Shape]:
    return [(math.prod(shape[2:]), shape[0])] * n


TRANSFORMS: dict[str, Transform] = {
    # the tensor as it is
    "same": Transform(lambda shape, n: [shape], _fill_flat, lambda y, n: [y]),
    # a vector to a bias of several axes (heads, width)
    "flat": Transform(
        lambda shape, n: [(math.prod(shape),)],
        _fill_flat,
        lambda y, n: [y.reshape(-1)],
    ),
    # torch Linear [out, in] to a Dense(General) kernel [in, *out]
    "linear": Transform(
        _linear_shape,
        _fill_linear,
        lambda y, n: [y.reshape(y.shape[0], -1).T],
    ),
    # n Linears [out, in] to one DenseGeneral kernel [in, n, *out]
    "fused": Transform(
        _fused_shape,
        _fill_fused,
        lambda y, n: [y[:, j].reshape(y.shape[0], -1).T for j in range(n)],
    ),
    # n biases [out] to one bias [n, *out]
    "fused_bias": Transform(
        lambda shape, n: [(math.prod(shape[1:]),)] * n,
        _fill_each,
        lambda y, n: [y[j].reshape(-1) for j in range(n)],
    ),
    # torch Conv2d [out, in, h, w] to a Conv kernel [h, w, in, out]
    "conv": Transform(
        lambda shape, n: [(shape[3], shape[2], shape[0], shape[1])],
        _fill_conv,
        lambda y, n: [y.transpose(3, 2, 0, 1)],
    ),
}


def expected_sources(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of the source tensors that `rules` need to fill leaves of `shapes`."""
    expected: dict[str, Shape] = {}
    for rule in rules:
        shape = shapes[rule.target]
        inner = shape if rule.blocks is None else shape[1:]
        for names in rule.names():
            per_source = TRANSFORMS[rule.transform].sources(inner, len(names))
            expected.update(zip(names, per_source, strict=True))
    return expected


def leaves(tree: Tree) -> dict[str, Any]:
    """Path, parts joined by "/" -> leaf."""
    return dict(flatten_dict(tree, sep="/"))


def leaf_shapes(tree: Tree) -> dict[str, Shape]:
    """Path -> shape of every leaf; leaves are arrays or `jax.ShapeDtypeStruct`s."""
    return {path: tuple(leaf.shape) for path, leaf in leaves(tree).items()}


def check(
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    sources: Mapping[str, Shape],
    *,
    what: str,
    ignored: Iterable[str] = (),
) -> None:
    """Raise one `ConversionError` that lists every misfit between table, tree and sources.

    Args:
        rules: the table.
        shapes: path -> shape of every leaf of the parameter tree.
        sources: name -> shape of every source tensor.
        what: name of the model, for the message.
        ignored: names of source tensors that carry nothing (buffers such as position ids), if
            they are there.
    """
    problems: list[str] = []
    targets = Counter(rule.target for rule in rules)
    problems += [f"leaf filled twice: {t}" for t, n in targets.items() if n > 1]
    problems += [f"leaf without a rule: {t}" for t in shapes if t not in targets]
    problems += [f"rule for a leaf that does not exist: {t}" for t in targets if t not in shapes]
    used = Counter(n for rule in rules for names in rule.names() for n in names)
    problems += [f"key used twice: {k}" for k, n in used.items() if n > 1]
    fitting: list[Rule] = []
    for rule in rules:
        shape = shapes.get(rule.target)
        if shape is not None and rule.blocks is not None and shape[:1] != (rule.blocks,):
            problems.append(f"leaf {rule.target} is {list(shape)}, its rule has {rule.blocks}")
        elif shape is not None:
            fitting.append(rule)
    problems += misfits(expected_sources(fitting, shapes), sources, used.keys() | set(ignored))
    if problems:
        raise ConversionError.of(what, problems)


def misfits(
    expected: Mapping[str, Shape], sources: Mapping[str, Shape], known: Container[str]
) -> list[str]:
    """A line for each source that is not known, not there, or not of the expected shape."""
    problems = [f"unmatched key: {k}" for k in sources if k not in known]
    for name, shape in expected.items():
        if name not in sources:
            problems.append(f"missing key: {name} {list(shape)}")
        elif tuple(sources[name]) != tuple(shape):
            problems.append(f"wrong shape: {name} is {list(sources[name])}, expected {list(shape)}")
    return problems


def apply(
    rule: Rule,
    read: Callable[[str], np.ndarray],
    shape: Shape,
    dtype: Any,
    blocks: slice = slice(None),
    empty: Callable[[Shape, Any], np.ndarray] = np.empty,
) -> np.ndarray:
    """One target leaf of `shape`, or those blocks of a stacked one.

    Beside the result, no more than one block's sources are in memory.

    Args:
        rule: the leaf's rule.
        read: returns a source tensor by name.
        shape, dtype: of the whole leaf.
        blocks: which, if it is stacked; the result keeps the leading axis.
        empty: makes the array, from its shape and dtype.
    """
    transform, names = TRANSFORMS[rule.transform], rule.names()[blocks]
    out = empty(shape if rule.blocks is None else (len(names), *shape[1:]), dtype)
    views = [out] if rule.blocks is None else [out[i, ...] for i in range(len(out))]
    with np.errstate(over="ignore"):  # found and told below
        for view, own in zip(views, names, strict=True):
            transform.forward([read(n) for n in own], view)
    if out.dtype == np.float16 and not np.isfinite(out).all():
        raise ConversionError(f"{rule.target} does not fit into float16: take bfloat16")
    return out


def invert(rule: Rule, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """Source tensors, by name, from one target leaf: the way back of `apply`."""
    transform = TRANSFORMS[rule.transform]
    views = [leaf] if rule.blocks is None else [leaf[i, ...] for i in range(rule.blocks)]
    out: dict[str, np.ndarray] = {}
    for one, names in zip(views, rule.names(), strict=True):
        parts = transform.backward(one, len(names))
        out.update(zip(names, (np.require(p, requirements="C") for p in parts), strict=True))
    return out


def leaf_types(
    rules: Iterable[Rule], types: Mapping[str, np.dtype], dtype: Any = None
) -> dict[str, np.dtype]:
    """Path -> dtype of every leaf.

    Args:
        rules: the table.
        types: name -> dtype of every source tensor.
        dtype: of every leaf. None keeps the sources' own; where the sources of one leaf differ,
            the narrowest type that holds them all.
    """
    out: dict[str, np.dtype] = {}
    for rule in rules:
        own = {np.dtype(types[n]) for names in rule.names() for n in names}
        wide = functools.reduce(lambda a, b: np.dtype(jnp.promote_types(a, b)), own)
        out[rule.target] = wide if dtype is None else np.dtype(dtype)
    return out


def fill(
    rules: Iterable[Rule],
    shapes: Mapping[str, Shape],
    types: Mapping[str, np.dtype],
    read: Callable[[str], np.ndarray],
) -> Tree:
    """The whole parameter tree of one model, leaf by leaf. `check` first.

    Args:
        rules: the table.
        shapes: path -> shape of every leaf.
        types: path -> dtype of every leaf.
        read: returns a source tensor by name.
    """
    targets = ((rule.target, rule) for rule in rules)
    filled = {path: apply(rule, read, shapes[path], types[path]) for path, rule in targets}
    return unflatten_dict(filled, sep="/")
