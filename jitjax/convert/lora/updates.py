"""Updates by weight, and their application to the leaves of the parameter trees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jitjax.config import FluxConfig

from ..tables.engine import TRANSFORMS, ConversionError, Rule, Shape
from .adapters import LowRank, Magnitude, Update, select

Read = Callable[[str], np.ndarray]
"""Returns a weight of the base model by its diffusers name."""


class Updates:
    """Updates by model and by the diffusers name of the weight that they change.

    Attributes:
        config: configuration of the pipeline that has the updates. A control LoRA adds input
            channels to the transformer.
        files: the files that they came from.
    """

    def __init__(self, config: FluxConfig) -> None:
        self.config = config
        self.files: list[Path] = []
        self._updates: dict[str, dict[str, list[Update]]] = {}
        self._column_norms: dict[Magnitude, np.ndarray] = {}

    def add(self, model: str, name: str, update: Update) -> None:
        """Add an update of one weight, to be applied after those added before."""
        self._updates.setdefault(model, defaultdict(list))[name].append(update)

    def models(self) -> list[str]:
        """Return the names of the models that have updates."""
        return list(self._updates)

    def affects(self, model: str, rule: Rule) -> bool:
        """Whether any update changes the rule's leaf."""
        updates = self._updates.get(model, {})
        return any(name in updates for names in rule.source_names() for name in names)

    def add_to(self, model: str, rule: Rule, piece: np.ndarray, start: int, read: Read) -> None:
        """Apply the updates to one leaf in place; computed in float32.

        Args:
            model: name of the leaf's model.
            rule: rule of the leaf.
            piece: the leaf, or consecutive blocks of a stacked leaf.
            start: number of the first of these blocks.
            read: returns a weight of the base model; called only for DoRA with magnitudes of
                columns, on a layer whose weights are in several leaves.

        Raises:
            ConversionError: the result has values that are not finite.
        """
        updates = self._updates.get(model, {})
        transform = TRANSFORMS[rule.transform]
        views = [piece] if rule.blocks is None else list(piece)
        dtype = np.promote_types(np.float32, piece.dtype) if piece.dtype.kind == "f" else np.float32
        for view, names in zip(views, rule.source_names()[start : start + len(views)], strict=True):
            if not any(name in updates for name in names):
                continue
            shapes = transform.source_shapes(view.shape, len(names))
            is_sum = all(update.is_sum for name in names for update in updates.get(name, ()))
            # The sum of the updates needs no transposition of the leaf.
            if is_sum:
                weights = [np.zeros(shape, dtype) for shape in shapes]
            else:
                weights = [np.array(w, dtype) for w in transform.backward(view, len(names))]
            with np.errstate(over="ignore", invalid="ignore"):  # overflow is looked for below
                for i, name in enumerate(names):
                    for update in updates.get(name, ()):
                        if is_sum:
                            weights[i] += update.added(shapes[i])
                        else:
                            norms = self._norms(model, update, read, piece.dtype)
                            weights[i] = update.apply(weights[i], norms)
                result = np.empty(view.shape, dtype)
                transform.forward(weights, result)
                view[...] = view.astype(dtype) + result if is_sum else result
            if not np.isfinite(view).all():
                raise ConversionError(
                    f"{model}/{rule.target} has values that are not finite in {piece.dtype} after "
                    "the LoRA is added; use a smaller scale, or bfloat16"
                )

    def factors(self, model: str, rule: Rule, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of a stacked leaf's updates as a product of two matrices per block.

        Args:
            model: name of the leaf's model.
            rule: rule of the leaf, a kernel.
            shape: shape of the leaf, [blocks, inputs, *outputs].

        Returns:
            down, up: [blocks, inputs, rank] and [blocks, rank, *outputs], float32; blocks of a
                lower rank are filled with zeros.

        Raises:
            ConversionError: an update is not of low rank (DoRA, LoHa, LoKr, a difference).
        """
        updates = self._updates.get(model, {})
        blocks, inputs, *outputs = shape
        pairs: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for names in rule.source_names():
            pairs.append([])
            for i, name in enumerate(names):
                for update in updates.get(name, ()):
                    if not (update.is_sum and isinstance(update.change, LowRank)):
                        raise ConversionError(
                            f"{model}/{rule.target} is quantised and {name} has an update that is "
                            "no plain LoRA; merge it before the weights are quantised, with "
                            "`jitjax convert SOURCE --lora FILE --quantise KIND`"
                        )
                    rows = select(update.change.up, update.rows)
                    up = np.zeros((rows.shape[1], len(names), rows.shape[0]), np.float32)
                    up[:, i] = np.float32(update.scale * update.factor) * rows.T
                    pairs[-1].append((update.change.down.T, up.reshape(-1, *outputs)))
        rank = max(sum(len(up) for _, up in block) for block in pairs)
        downs = np.zeros((blocks, inputs, rank), np.float32)
        ups = np.zeros((blocks, rank, *outputs), np.float32)
        for block, its_pairs in enumerate(pairs):
            start = 0
            for down, up in its_pairs:
                downs[block, :, start : start + len(up)] = down
                ups[block, start : start + len(up)] = up
                start += len(up)
        return downs, ups

    def _norms(self, model: str, update: Update, read: Read, dtype: np.dtype) -> np.ndarray | None:
        """Return the norms of columns over all weights of the update's layer, if it has several."""
        magnitude = update.magnitude
        if magnitude is None or magnitude.of_rows or len(magnitude.layer.weights) == 1:
            return None
        if magnitude not in self._column_norms:
            total = np.zeros(magnitude.layer.shape[1], np.float64)
            for name, _ in magnitude.layer.weights:
                weight = np.asarray(read(name)).astype(dtype).astype(np.float32)
                for other in self._updates[model][name]:
                    if other.magnitude is magnitude:
                        total += np.square(other.direction(weight), dtype=np.float64).sum(0)
                        break
                    norms = self._norms(model, other, read, dtype)
                    weight = other.apply(weight, norms)
            self._column_norms[magnitude] = np.sqrt(total).astype(np.float32)
        return self._column_norms[magnitude]
