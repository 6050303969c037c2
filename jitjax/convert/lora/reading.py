"""Reads LoRA files into updates, and checks everything in them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jitjax.config import FluxConfig

from ..tables.engine import ConversionError
from .adapters import Update
from .layer_updates import LayerUpdates
from .names import (
    OTHER_KINDS,
    OTHER_MODELS,
    PREFIXES,
    WRAPPERS,
    Layer,
    layers_by_name,
    match_layer,
    parse_key,
)
from .paths import Loras, find_files
from .problems import UNKNOWN, Misfit, Problems
from .strengths import Strengths
from .tensors import LoraTensors
from .updates import Updates
from .widening import widened_config


def read_loras(loras: Loras, config: FluxConfig, models: Sequence[str]) -> Updates:
    """Read the updates in some LoRA files.

    Matrices of low rank are held in memory; whole differences stay in their files until they are
    applied.

    Args:
        loras: (safetensors file, or folder of PEFT; scale) of each.
        config: the pipeline's configuration.
        models: names of the models that may be updated. Updates of other models are passed over
            with a warning.

    Raises:
        FileNotFoundError, ConversionError, ValueError: as `merge_loras` does.
    """
    files = [_LoraFile(path, scale) for path, scale in find_files(loras)]
    if "transformer" in models:
        config = widened_config(((file.path, file.tensors) for file in files), config)
    updates = Updates(config)
    layers = {m: layers_by_name(m, config) for m, _ in PREFIXES if m in models} if files else {}
    for file in files:
        file.add_to(updates, layers)
    return updates


class _LoraFile:
    """One LoRA file.

    Args:
        path: the safetensors file.
        scale: scale by the user.
    """

    def __init__(self, path: Path, scale: float):
        self.path, self._scale = path, scale
        self.tensors, self._strengths = LoraTensors(path), Strengths(path)
        self._layers: Mapping[str, Mapping[str, Layer]] = {}
        self._problems = Problems(path)
        self._updated: dict[tuple[str, str], str] = {}  # (model, weight) -> key of its update
        self._updates: list[Update] = []

    def add_to(self, updates: Updates, layers: Mapping[str, Mapping[str, Layer]]) -> None:
        """Add all updates of the file, and the file.

        Args:
            updates: where to add them.
            layers: model -> layer name -> layer, of the loaded models.
        """
        updates.files.append(self.path)
        self._layers = layers
        passed_over: Counter[str] = Counter()
        groups = self._keys_by_layer()
        for key, keys in groups.items():
            match = match_layer(key, self._layers)
            if match is None:
                if not self._is_zero_difference(keys):
                    self._add_unknown(keys.values())
            elif match[2] is None:
                passed_over[match[0]] += 1
            else:
                self._add_layer(match[0], match[1], key, match[2], keys, updates)
        self._problems.check()
        loaded = ", ".join(self._layers) or "none that a LoRA can update"
        skipped = ", ".join(f"{model} ({count} layers)" for model, count in passed_over.items())
        if not self._updated and not skipped:
            raise ConversionError(f"{self.path} updates nothing; the loaded models are: {loaded}")
        if skipped:
            nothing = "" if self._updated else "; nothing of it is merged"
            warnings.warn(
                f"{self.path}: passed over what is not loaded or not used here: {skipped}; "
                f"the loaded models are: {loaded}{nothing}",
                stacklevel=2,
            )
        # Scale 0 is the user's wish.
        if self._scale and self._updated and all(update.is_zero for update in self._updates):
            reason = "B or A" if any(update.factor for update in self._updates) else "alpha"
            warnings.warn(
                f"{self.path}: changes nothing, because {reason} is 0 in all of its updates",
                stacklevel=2,
            )
        if remark := self._strengths.kohya_remark(self._alphas(groups.values())):
            warnings.warn(f"{self.path}: {remark}", stacklevel=2)

    def _keys_by_layer(self) -> dict[str, dict[str, str]]:
        """Return name of a layer -> kind of a tensor -> its key; checks what the file is."""
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        adapters: dict[str, None] = {}  # an ordered set of names
        for key in self.tensors.keys:
            if ".original_module." in key:  # PEFT with bias="all": the untrained value
                continue
            other = next((kind for regex, kind in OTHER_KINDS if re.search(regex, key)), None)
            if other:
                self._problems.add(f"is of {other}; expected LoRA, DoRA, LoHa or LoKr", key)
                continue
            parsed = parse_key(key)
            if parsed is None:
                self._add_unknown([key])
                continue
            kinds = groups[WRAPPERS.sub("", parsed.layer)]
            if parsed.adapter:
                adapters[parsed.adapter] = None
            if parsed.kind in kinds:
                if ".modules_to_save." in key:  # PEFT with bias="all" writes the bias twice
                    continue
                other = kinds[parsed.kind]
                self._problems.add(f"stands for the same as {other}; expected one of them", key)
            kinds[parsed.kind] = key
        if len(adapters) > 1:
            names = ", ".join(list(adapters)[:5])
            raise ConversionError(
                f"{self.path} has {len(adapters)} PEFT adapters: {names}; expected one"
            )
        keys = [key for kinds in groups.values() for key in kinds.values()]
        if (
            keys
            and all(kinds.keys() <= {"weight", "bias"} for kinds in groups.values())
            # "lora_a.weight" and such are low-rank matrices under names that are not known.
            and not any(re.search(r"lora|\.[ab]\.", key, re.IGNORECASE) for key in keys)
        ):
            raise ConversionError(
                f"{self.path} has whole weights (such as {keys[0]}); expected a LoRA, not a model"
            )
        return groups

    def _is_zero_difference(self, keys: Mapping[str, str]) -> bool:
        """Whether a layer's tensors are differences of 0, which FLUX's layers need not have."""
        kinds = keys.keys() - {"alpha"}
        return kinds <= {"difference", "bias difference"} and all(
            self.tensors.is_zero(keys[kind]) for kind in kinds
        )

    def _add_unknown(self, keys: Iterable[str]) -> None:
        """Note unknown keys. Raises `ConversionError` if one is of another model than FLUX.1."""
        for key in keys:
            for pattern, model in OTHER_MODELS:
                if re.search(pattern, key):
                    raise ConversionError(
                        f"{self.path} is a LoRA of {model} (it has {key}); expected FLUX.1"
                    )
            self._problems.add(UNKNOWN, key)

    def _add_layer(
        self,
        model: str,
        name: str,
        key: str,
        layer: Layer,
        keys: Mapping[str, str],
        updates: Updates,
    ) -> None:
        """Add the updates of one layer, unless something is wrong with them."""
        reader = LayerUpdates(
            model, name, key, layer, keys, self.tensors, self._strengths, self._scale
        )
        try:
            for kind, tensor, update in reader.read():
                self._updates.append(update)
                for target, rows in layer.weights if kind == "weight" else layer.biases:
                    other = self._updated.setdefault((model, target), tensor)
                    if other != tensor:
                        raise Misfit(f"updates the same {kind} as {other}", tensor)
                    updates.add(model, target, dataclasses.replace(update, rows=rows))
        except Misfit as misfit:
            self._problems.add(misfit.message, misfit.key)

    def _alphas(self, groups: Iterable[Mapping[str, str]]) -> set[float]:
        """Return the values of the alpha tensors of matrices of low rank."""
        alphas = [keys["alpha"] for keys in groups if "alpha" in keys and "A" in keys]
        return {self.tensors.number(key) for key in alphas}
