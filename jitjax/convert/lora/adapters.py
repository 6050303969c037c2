"""The kinds of updates of one weight, and how they change it.

    LoRA        alpha / rank * B A                     Hu et al., 2021 (arXiv 2106.09685), 4.1
    LoHa        alpha / rank * (B1 A1) * (B2 A2)       Hyeon-Woo et al., 2021 (arXiv 2108.06098)
    LoKr        alpha / rank * kron(W1, W2)            Yeh et al., 2023 (arXiv 2309.14859)
    difference  a whole matrix or vector (ComfyUI's `diff` and `diff_b`)

Each gives the rows of its update on demand, so that only the small factors stay in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..original import Rows
from .names import Layer


def select(values: np.ndarray, rows: Rows | None) -> np.ndarray:
    """Return ranges of rows concatenated; all rows if `rows` is None."""
    if rows is None:
        return values
    return np.concatenate([values[start:stop] for start, stop in rows])


class Change(Protocol):
    """The change of a layer's weight, before its factor."""

    def rows(self, rows: Rows | None) -> np.ndarray:
        """Return some rows of the change, float32."""
        ...

    def is_zero(self) -> bool:
        """Whether it is 0 because one of its matrices is; looks at no more than it has to."""
        ...


@dataclass(frozen=True)
class LowRank:
    """The product B A.

    Attributes:
        up: B [out, rank].
        down: A [rank, in].
    """

    up: np.ndarray
    down: np.ndarray

    def rows(self, rows: Rows | None) -> np.ndarray:
        return select(self.up, rows) @ self.down

    def is_zero(self) -> bool:
        return not (np.any(self.up) and np.any(self.down))


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two products of low rank."""

    first: LowRank
    second: LowRank

    def rows(self, rows: Rows | None) -> np.ndarray:
        return self.first.rows(rows) * self.second.rows(rows)

    def is_zero(self) -> bool:
        return self.first.is_zero() or self.second.is_zero()


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices.

    Attributes:
        outer: [a, b].
        inner: [c, d]; the weight is [a * c, b * d].
    """

    outer: np.ndarray
    inner: np.ndarray

    def rows(self, rows: Rows | None) -> np.ndarray:
        height = len(self.inner)
        index = select(np.arange(len(self.outer) * height), rows)
        outer, inner = self.outer[index // height], self.inner[index % height]
        return (outer[:, :, None] * inner[:, None, :]).reshape(len(index), -1)

    def is_zero(self) -> bool:
        return not (np.any(self.outer) and np.any(self.inner))


@dataclass(frozen=True)
class Difference:
    """A whole matrix or vector, kept as it is stored (memory-mapped)."""

    values: np.ndarray

    def rows(self, rows: Rows | None) -> np.ndarray:
        return np.asarray(select(self.values, rows), np.float32)

    def is_zero(self) -> bool:
        return not np.any(self.values)


@dataclass(frozen=True, eq=False)
class Magnitude:
    """The magnitudes of DoRA (Liu et al., 2024, arXiv 2402.09353, section 4.1).

    PEFT and newer LyCORIS have one for each row of the weight [out, in]; OneTrainer and older
    LyCORIS have one for each column, of the whole layer that the file names.

    Attributes:
        values: [out] or [in].
        of_rows: whether they belong to rows.
        layer: the layer that the file names.
    """

    values: np.ndarray
    of_rows: bool
    layer: Layer


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one diffusers weight or bias.

    Without magnitude `W + scale * factor * change`. With magnitude m and the norms of
    `V = W + factor * change`, `W + scale * (m / |V| * V - W)`. As replacement
    `W + scale * (change - W)`. So scale 0 is the base model, and scale 1 what was trained.

    Attributes:
        change: the change of the layer.
        factor: alpha / rank.
        scale: scale by the user.
        rows: the rows of the layer that this weight consists of; None for all.
        magnitude: magnitudes of DoRA, or None.
        replaces: whether `change` has the new values rather than differences.
    """

    change: Change
    factor: float
    scale: float
    rows: Rows | None = None
    magnitude: Magnitude | None = None
    replaces: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether the update is added, whatever the weight is."""
        return self.magnitude is None and not self.replaces

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing at any scale, as far as its matrices and alpha show."""
        return self.is_sum and (self.factor == 0 or self.change.is_zero())

    def added(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return what is added to the weight, float32; only if `is_sum`."""
        return (np.float32(self.scale * self.factor) * self.change.rows(self.rows)).reshape(shape)

    def direction(self, weight: np.ndarray) -> np.ndarray:
        """Return `W + factor * change`, the direction of DoRA."""
        return weight + np.float32(self.factor) * self.change.rows(self.rows)

    def apply(self, weight: np.ndarray, column_norms: np.ndarray | None = None) -> np.ndarray:
        """Return the updated weight.

        Args:
            weight: [out, in] or [out].
            column_norms: [in] norms of the columns of the whole layer's direction; only for
                magnitudes of columns of a layer that consists of several weights.
        """
        scale = weight.dtype.type(self.scale)
        if self.replaces:
            return weight + scale * (self.change.rows(self.rows).reshape(weight.shape) - weight)
        if self.magnitude is None:
            return weight + self.added(weight.shape)
        direction = self.direction(weight)
        if self.magnitude.of_rows:
            norms = np.linalg.norm(direction, axis=1)[:, None]
            magnitude = select(self.magnitude.values, self.rows)[:, None]
        else:
            norms = np.linalg.norm(direction, axis=0) if column_norms is None else column_norms
            magnitude = self.magnitude.values
        # A norm of 0 means that the whole row or column of the direction is 0.
        return weight + scale * (direction * (magnitude / np.where(norms == 0, 1, norms)) - weight)
