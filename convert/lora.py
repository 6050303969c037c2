"""Merges low-rank updates (LoRA) into the weights: `W + scale * alpha / rank * B A`.

Three families of names are supported; unknown keys are an error:

    diffusers, PEFT   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight
    original names    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight (or lora_down)
    kohya's trainers  lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight

An update of a fused layer (`qkv`, `linear1`) is split by the table that splits the layer.
Source: Hu et al., 2021 (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig

from .components import COMPONENTS, component_of
from .original import Rows, autoencoder_parts, transformer_parts
from .sources.tensors import Weights, scan
from .tables.engine import TRANSFORMS, ConversionError, Rule

ORIGINAL = {"transformer": transformer_parts, "autoencoder": autoencoder_parts}
PREFIXES = (
    ("transformer", ("transformer.", "diffusion_model.", "model.diffusion_model.", "unet.", "",
                     "lora_unet_", "lora_transformer_")),
    ("clip", ("text_encoder.", "lora_te1_", "lora_te_")),
    ("t5", ("text_encoder_2.", "lora_te2_", "lora_te3_")),
)  # fmt: skip
"""(model, possible prefixes of a layer's name)."""
SUFFIXES = {
    ".lora_A.weight": "A", ".lora_A.default.weight": "A", ".lora_down.weight": "A",
    ".lora_B.weight": "B", ".lora_B.default.weight": "B", ".lora_up.weight": "B",
    ".alpha": "alpha",
}  # fmt: skip
"""Suffix after a layer's name -> the matrix A or B, or alpha."""


@dataclass(frozen=True)
class Update:
    """The low-rank update `factor * B A` of one weight, or some of its rows.

    Attributes:
        up: B [out, rank].
        down: A [rank, in].
        factor: factor of the product.
        rows: (start, stop) ranges of the rows of B, concatenated in this order; None for all rows.
    """

    up: np.ndarray
    down: np.ndarray
    factor: float
    rows: Rows | None = None

    def matrix(self) -> np.ndarray:
        """Return the update, float32 [out, in]."""
        up = self.up
        if self.rows is not None:
            up = np.concatenate([up[start:stop] for start, stop in self.rows])
        return np.float32(self.factor) * (up @ self.down)


class Updates:
    """Updates by model and by the diffusers name of the weight that they change."""

    def __init__(self) -> None:
        self._updates: dict[str, dict[str, list[Update]]] = {}

    def add(self, model: str, name: str, update: Update) -> None:
        """Add an update of one weight."""
        self._updates.setdefault(model, defaultdict(list))[name].append(update)

    def models(self) -> list[str]:
        """Return the names of the models that have updates."""
        return list(self._updates)

    def add_to(self, model: str, rule: Rule, piece: np.ndarray, start: int = 0) -> None:
        """Add the updates to one leaf in place; the sum is computed in float32.

        Args:
            model: name of the leaf's model.
            rule: rule of the leaf.
            piece: the leaf, or consecutive blocks of a stacked leaf.
            start: number of the first of these blocks.
        """
        updates = self._updates.get(model, {})
        transform = TRANSFORMS[rule.transform]
        views = [piece] if rule.blocks is None else list(piece)
        for view, names in zip(views, rule.source_names()[start : start + len(views)], strict=True):
            if not any(name in updates for name in names):
                continue
            matrices = []
            for name, shape in zip(
                names, transform.source_shapes(view.shape, len(names)), strict=True
            ):
                total = np.zeros(shape, np.float32)
                for update in updates.get(name, ()):
                    total += update.matrix().reshape(shape)
                matrices.append(total)
            change = np.empty(view.shape, np.float32)
            transform.forward(matrices, change)
            view[...] = view.astype(np.float32) + change

    def affects(self, model: str, rule: Rule) -> bool:
        """Whether any update changes the rule's leaf."""
        updates = self._updates.get(model, {})
        return any(name in updates for names in rule.source_names() for name in names)


def merge_loras(
    params: FluxParams,
    loras: Sequence[tuple[str | os.PathLike[str], float]],
) -> FluxParams:
    """Add low-rank updates to parameters.

    Args:
        params: result of `jitjax.load`; not changed.
        loras: (safetensors file, scale) of each update; scale 1 is the strength of the training.

    Returns:
        The merged parameters. Changed leaves keep their dtype and sharding.

    Raises:
        FileNotFoundError: a file does not exist.
        ConversionError: keys or shapes of a file do not match the models in `params`; the message
            lists all of them.
        ValueError: a scale is not finite.

    Source: Hu et al., 2021 (arXiv 2106.09685), section 4.1.
    """
    available = [component.name for component in COMPONENTS if getattr(params, component.name)]
    updates = read_loras(loras, params.config, available)
    merged = {}
    for model in updates.models():
        flat: dict[str, Any] = flatten_dict(params.part(model), sep="/")
        for rule in component_of(model).rules(getattr(params.config, model)):
            if updates.affects(model, rule):
                old = flat[rule.target]
                leaf = np.array(old)
                updates.add_to(model, rule, leaf)
                on_device = isinstance(old, jax.Array)
                flat[rule.target] = jax.device_put(leaf, old.sharding) if on_device else leaf
        merged[model] = unflatten_dict(flat, sep="/")
    return FluxParams(
        **{c.name: merged.get(c.name, getattr(params, c.name)) for c in COMPONENTS},
        config=params.config,
        tokenizer=params.tokenizer,
    )


def read_loras(
    loras: Sequence[tuple[str | os.PathLike[str], float]], config: FluxConfig, models: Sequence[str]
) -> Updates:
    """Read the low-rank updates in some files.

    Args:
        loras: (safetensors file, scale) of each.
        config: the pipeline's configuration.
        models: names of the models that may be updated.

    Raises:
        FileNotFoundError, ConversionError, ValueError: as `merge_loras` does.
    """
    updates = Updates()
    layers = {m: _layers_by_name(m, config) if m in models else {} for m, _ in PREFIXES}
    for file, scale in loras:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; expected a safetensors file")
        if not math.isfinite(scale):
            raise ValueError(f"{path}: scale is {scale}; expected a finite number")
        _read_lora(path, scale, layers, updates)
    return updates


@dataclass(frozen=True)
class _Layer:
    """A layer that an update may name.

    Attributes:
        shape: shape of its weight, [out, in].
        targets: (diffusers name, rows of the layer's weight) of each diffusers weight in it.
    """

    shape: tuple[int, int]
    targets: tuple[tuple[str, Rows | None], ...]


def _layers_by_name(model: str, config: FluxConfig) -> dict[str, _Layer]:
    """Return all layers of a model under diffusers and original names, with dots or underscores."""
    model_config = getattr(config, model)
    shapes = component_of(model).source_shapes(model_config)
    weights = {n: s for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    by_weight = {name: _Layer(shape, ((name, None),)) for name, shape in weights.items()}
    originals: dict[str, list[tuple[str, Rows | None]]] = defaultdict(list)
    for name, part in (ORIGINAL[model](model_config) if model in ORIGINAL else {}).items():
        if name in weights:
            originals[part.source].append((name, part.rows))
    for source, targets in originals.items():
        rows = sum(weights[name][0] for name, _ in targets)
        by_weight[source] = _Layer((rows, weights[targets[0][0]][1]), tuple(targets))
    layers = {name.removesuffix(".weight"): layer for name, layer in by_weight.items()}
    return layers | {name.replace(".", "_"): layer for name, layer in layers.items()}


def _read_lora(
    path: Path, scale: float, layers: Mapping[str, Mapping[str, _Layer]], updates: Updates
) -> None:
    """Add the updates in one file to `updates`; `layers` is model -> layer name -> layer."""
    tensors = scan(path)
    weights = Weights(tensors)
    metadata = _adapter_metadata(path)
    problems: list[str] = []
    keys_by_layer: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for key in tensors:
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        base = key.removesuffix(suffix or "").removeprefix("base_model.model.")
        match = _match_layer(base, layers) if suffix else None
        if suffix is None or match is None:
            problems.append(f"unknown key: {key}")
        else:
            keys_by_layer[(*match, base)][SUFFIXES[suffix]] = key
    for (model, name, base), keys in keys_by_layer.items():
        layer = layers[model][name]
        missing = [matrix for matrix in "AB" if matrix not in keys]
        if missing:
            problems.append(f"missing matrix: {base} has no {' and no '.join(missing)}")
            continue
        down, up = (_as_matrix(weights.read(keys[matrix])) for matrix in "AB")
        rank = down.shape[0]
        if up.shape != (layer.shape[0], rank) or down.shape[1] != layer.shape[1]:
            problems.append(
                f"wrong shape: {base} has A {list(down.shape)} and B {list(up.shape)}; expected "
                f"[rank, {layer.shape[1]}] and [{layer.shape[0]}, rank]"
            )
            continue
        if "alpha" in keys:
            factor = np.asarray(weights.read(keys["alpha"])).item() / rank
        else:
            factor = _peft_factor(metadata, base, rank)
        for target, rows in layer.targets:
            updates.add(model, target, Update(up, down, scale * factor, rows))
    if problems:
        models = ", ".join(model for model in layers if layers[model])
        raise ConversionError.from_problems(f"{path}, for {models}", problems)


def _match_layer(base: str, layers: Mapping[str, Mapping[str, _Layer]]) -> tuple[str, str] | None:
    """Return model and layer name of a key without its suffix, or None for an unknown layer."""
    for model, prefixes in PREFIXES:
        for prefix in prefixes:
            if base.startswith(prefix) and (name := base.removeprefix(prefix)) in layers[model]:
                return model, name
    return None


def _as_matrix(tensor: np.ndarray) -> np.ndarray:
    """Return float32 [rows, columns]; also for 1 x 1 convolutions."""
    return np.asarray(tensor, np.float32).reshape(tensor.shape[:2])


def _adapter_metadata(path: Path) -> dict[str, Any]:
    """Return PEFT's configuration, which diffusers saves in the file's metadata."""
    with safe_open(path, "numpy") as file:
        raw = (file.metadata() or {}).get("lora_adapter_metadata")
    return json.loads(raw) if raw else {}


def _peft_factor(metadata: Mapping[str, Any], base: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA; alpha defaults to the rank."""
    model, _, layer = base.partition(".")
    alpha = metadata.get(f"{model}.lora_alpha", rank)
    for pattern, value in metadata.get(f"{model}.alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    return alpha / (math.sqrt(rank) if metadata.get(f"{model}.use_rslora") else rank)
