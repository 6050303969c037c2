"""Makes the update of one layer from its tensors in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .adapters import Change, Difference, Hadamard, Kronecker, LowRank, Magnitude, Update
from .names import Layer
from .problems import UNKNOWN, Misfit
from .strengths import Strengths
from .tensors import LoraTensors, check_shape

KINDS = {
    "LoRA": ("A", "B"),
    "LoRA of an embedding": ("embedding A", "embedding B"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "difference": ("difference",),
    "whole weight": ("weight",),
}
"""Kind of an update of a weight -> the kinds of its tensors."""
WHOLE = ("difference", "whole weight")
BIAS_KINDS = ("B bias", "bias difference", "bias")
"""Kinds of tensors that update a bias."""


class LayerUpdates:
    """The updates of one layer of a file.

    Args:
        model: name of the layer's model.
        name: name of the layer without prefix.
        key: name of the layer in the file.
        layer: the layer.
        keys: kind of a tensor -> its key.
        tensors: the tensors of the file.
        strengths: the strengths that the file states.
        scale: scale by the user.
    """

    def __init__(
        self,
        model: str,
        name: str,
        key: str,
        layer: Layer,
        keys: Mapping[str, str],
        tensors: LoraTensors,
        strengths: Strengths,
        scale: float,
    ):
        self._model, self._name, self._key, self._layer = model, name, key, layer
        self._keys, self._tensors, self._strengths = keys, tensors, strengths
        self._scale = scale

    def read(self) -> Iterator[tuple[str, str, Update]]:
        """Yield the updates of the weight and of the bias.

        Yields:
            ("weight" or "bias", key of one of the tensors, update of all rows).

        Raises:
            Misfit: a tensor is missing, superfluous or wrong.
        """
        keys = self._keys
        kinds = [k for k, tensors in KINDS.items() if any(tensor in keys for tensor in tensors)]
        biases = [kind for kind in BIAS_KINDS if kind in keys]
        if len(kinds) > 1 or len(biases) > 1:
            tensors = biases if len(kinds) < 2 else [k for kind in kinds for k in KINDS[kind]]
            both = " and ".join(keys[tensor] for tensor in tensors if tensor in keys)
            raise Misfit(f"is updated in two ways, by {both}", self._key)
        for kind in ("weight", "bias"):
            if kind in keys and not (
                self._is_norm or self._strengths.replaces(self._model, self._name, kind)
            ):
                raise Misfit(UNKNOWN, keys[kind])
        if not kinds and (not biases or "B bias" in keys or "magnitude" in keys):
            raise Misfit("has no A and no B", self._key)
        factor, magnitude = 1.0, None
        if kinds:
            change, rank = self._change(kinds[0])
            if kinds[0] not in WHOLE:
                alpha = self._tensors.number(keys["alpha"]) if "alpha" in keys else None
                factor = self._strengths.factor(self._model, self._name, self._key, rank, alpha)
            magnitude = self._magnitude(kinds[0])
            replaces = kinds[0] == "whole weight"
            key = next(keys[tensor] for tensor in KINDS[kinds[0]] if tensor in keys)
            update = Update(change, factor, self._scale, magnitude=magnitude, replaces=replaces)
            yield "weight", key, update
        for kind in biases:
            if kind == "B bias" and magnitude is not None:
                raise Misfit("is a bias of B, which DoRA cannot have", keys[kind])
            bias = self._bias(keys[kind])
            if bias is not None:
                factor = factor if kind == "B bias" else 1.0
                update = Update(bias, factor, self._scale, replaces=kind == "bias")
                yield "bias", keys[kind], update

    def _change(self, kind: str) -> tuple[Change, int | None]:
        """Return the change of the weight and its rank; no rank if it has whole matrices."""
        if kind in WHOLE:
            key = self._keys[KINDS[kind][0]]
            values = self._tensors.values(key)
            if kind == "difference" and values.ndim == 2:
                values = self._whole_width(values)
            check_shape(key, values.shape, self._layer.shape)
            return Difference(values), None
        if len(self._layer.shape) != 2:
            shape = list(self._layer.shape)
            raise Misfit(f"has a {kind}; expected a difference of shape {shape}", self._key)
        if kind == "LoKr":
            return self._kronecker()
        missing = [tensor for tensor in KINDS[kind] if tensor not in self._keys]
        if missing:
            raise Misfit(f"has no {' and no '.join(missing)}", self._key)
        matrices = [self._tensors.matrix(self._keys[tensor]) for tensor in KINDS[kind]]
        if kind == "LoHa":
            up1, down1, up2, down2 = matrices
            first, second = self._low_rank(down1, up1), self._low_rank(down2, up2)
            if len(down1) != len(down2):
                raise Misfit("has two pairs of matrices of different ranks", self._key)
            return Hadamard(first, second), len(down1)
        down, up = matrices if kind == "LoRA" else (matrices[1].T, matrices[0].T)
        return self._low_rank(down, up), len(down)

    def _low_rank(self, down: np.ndarray, up: np.ndarray) -> LowRank:
        """Check the shapes of A and B."""
        rows, columns = self._layer.shape
        rank = len(down)
        if not rank:
            raise Misfit("has rank 0; expected at least 1", self._key)
        down = self._whole_width(down)
        if up.shape != (rows, rank) or down.shape[1] != columns:
            raise Misfit(
                f"has A {list(down.shape)} and B {list(up.shape)}; expected "
                f"[rank, {columns}] and [{rows}, rank]",
                self._key,
            )
        return LowRank(up, down)

    @property
    def _is_norm(self) -> bool:
        """Whether the layer is a norm of queries or keys, which control LoRAs have whole.

        Reference: diffusers `FluxLoraLoaderMixin._load_norm_into_transformer`.
        """
        return self._model == "transformer" and len(self._layer.shape) == 1

    def _whole_width(self, matrix: np.ndarray) -> np.ndarray:
        """Return a matrix [rows, in] with columns of 0 in the place of those that it may leave out.

        Reference: diffusers `FluxLoraLoaderMixin._maybe_expand_lora_state_dict`.
        """
        narrow, missing = self._layer.narrow, self._layer.shape[-1] - matrix.shape[1]
        if matrix.shape[1] != narrow or not missing:
            return matrix
        if "magnitude" in self._keys:  # it was trained for the norms of the narrow weight
            raise Misfit(f"is DoRA for {narrow} of {self._layer.shape[-1]} channels", self._key)
        return np.pad(matrix, ((0, 0), (0, missing)))

    def _kronecker(self) -> tuple[Kronecker, int | None]:
        factors, ranks = [], []
        for factor in ("lokr_w1", "lokr_w2"):
            parts = [part for part in (f"{factor}_a", f"{factor}_b") if part in self._keys]
            if (factor in self._keys) == bool(parts) or len(parts) == 1:
                found = [part for part in (factor, *parts) if part in self._keys]
                raise Misfit(
                    f"has {' and '.join(found) or f'no {factor}'}; expected {factor}, or "
                    f"{factor}_a and {factor}_b",
                    self._key,
                )
            if not parts:
                factors.append(self._tensors.matrix(self._keys[factor]))
                continue
            left, right = (self._tensors.matrix(self._keys[part]) for part in parts)
            if left.shape[1] != len(right) or not len(right):
                raise Misfit(
                    f"has {factor}_a {list(left.shape)} and {factor}_b {list(right.shape)}; "
                    "expected [rows, rank] and [rank, columns], of rank 1 or more",
                    self._key,
                )
            with np.errstate(over="ignore", invalid="ignore"):  # looked for in the merged leaf
                factors.append(left @ right)
            ranks.append(len(right))
        outer, inner = factors
        shape = (len(outer) * len(inner), outer.shape[1] * inner.shape[1])
        check_shape(self._key, shape, self._layer.shape)
        if len(set(ranks)) > 1:
            raise Misfit(
                f"has factors of ranks {ranks[0]} and {ranks[1]}; expected one rank", self._key
            )
        return Kronecker(outer, inner), ranks[0] if ranks else None

    def _magnitude(self, kind: str) -> Magnitude | None:
        """Return DoRA's magnitudes: of rows [out] or [out, 1], or of columns [1, in]."""
        if "magnitude" not in self._keys:
            if kind == "LoRA" and self._strengths.expects_magnitude(self._model):
                raise Misfit("has no magnitudes, but its settings say use_dora", self._key)
            return None
        key = self._keys["magnitude"]
        if kind not in ("LoRA", "LoHa", "LoKr"):
            raise Misfit(f"is a magnitude of DoRA, beside a {kind}; expected A and B", key)
        values = self._tensors.values(key)
        shape: tuple[int, ...] = values.shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        rows, columns = self._layer.shape
        if shape not in ((rows,), (rows, 1), (1, columns)):
            raise Misfit(
                f"has shape {list(values.shape)}; expected [{rows}], [{rows}, 1] or [1, {columns}]",
                key,
            )
        of_rows = shape in ((rows,), (rows, 1))
        return Magnitude(np.asarray(values, np.float32).reshape(-1), of_rows, self._layer)

    def _bias(self, key: str) -> Difference | None:
        """Return the change of the bias; None for a change of 0 of a bias that is not there."""
        values = self._tensors.values(key)
        if not self._layer.biases:
            if not np.any(values):
                return None
            raise Misfit("updates the bias of a layer that has none", key)
        check_shape(key, values.shape, self._layer.shape[:1])
        return Difference(values)
