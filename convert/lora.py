"""Low-rank updates (LoRA) merged into the weights: `W + scale * alpha / rank * B A`.

Three families of names are read, and nothing is passed over in silence:

    diffusers, PEFT   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight
    original names    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight (or lora_down)
    kohya's trainers  lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight

An update of a fused layer (`qkv`, `linear1`) is split by the table that splits the layer itself.
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
from .sources.tensors import Weights, scan
from .tables.engine import TRANSFORMS, ConversionError, Rule
from .tables.original import Rows, autoencoder_parts, transformer_parts

ORIGINAL = {"transformer": transformer_parts, "autoencoder": autoencoder_parts}
PREFIXES = (
    ("transformer", ("transformer.", "diffusion_model.", "model.diffusion_model.", "unet.", "",
                     "lora_unet_", "lora_transformer_")),
    ("clip", ("text_encoder.", "lora_te1_", "lora_te_")),
    ("t5", ("text_encoder_2.", "lora_te2_", "lora_te3_")),
)  # fmt: skip
"""Model -> what may stand before a layer's name."""
ENDINGS = {
    ".lora_A.weight": "A", ".lora_A.default.weight": "A", ".lora_down.weight": "A",
    ".lora_B.weight": "B", ".lora_B.default.weight": "B", ".lora_up.weight": "B",
    ".alpha": "alpha",
}  # fmt: skip


@dataclass(frozen=True)
class Update:
    """`factor * B A`, or some of its rows."""

    up: np.ndarray  # B [out, rank]
    down: np.ndarray  # A [rank, in]
    factor: float
    rows: Rows | None = None

    def matrix(self) -> np.ndarray:
        """The update, float32 [out, in]."""
        up = self.up
        if self.rows is not None:
            up = np.concatenate([up[start:stop] for start, stop in self.rows])
        return np.float32(self.factor) * (up @ self.down)


class Updates:
    """The updates of some files, by model and by the diffusers name of the weight they change."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[Update]]] = {}

    def add(self, model: str, name: str, update: Update) -> None:
        """One more update of one weight."""
        self._found.setdefault(model, defaultdict(list))[name].append(update)

    def models(self) -> list[str]:
        """Names of the models that are changed."""
        return list(self._found)

    def add_to(self, model: str, rule: Rule, piece: np.ndarray, start: int = 0) -> None:
        """Add to one leaf, in place, and in float32 before it is rounded to its dtype again.

        Args:
            model, rule: the leaf's.
            piece: the leaf, or blocks of a stacked one.
            start: number of the first of them.
        """
        updates = self._found.get(model, {})
        transform = TRANSFORMS[rule.transform]
        views = [piece] if rule.blocks is None else list(piece)
        for view, names in zip(views, rule.names()[start : start + len(views)], strict=True):
            if not any(name in updates for name in names):
                continue
            matrices = []
            for name, shape in zip(names, transform.sources(view.shape, len(names)), strict=True):
                summed = np.zeros(shape, np.float32)
                for update in updates.get(name, ()):
                    summed += update.matrix().reshape(shape)
                matrices.append(summed)
            change = np.empty(view.shape, np.float32)
            transform.forward(matrices, change)
            view[...] = view.astype(np.float32) + change

    def touches(self, model: str, rule: Rule) -> bool:
        """Whether any update changes a leaf."""
        updates = self._found.get(model, {})
        return any(name in updates for names in rule.names() for name in names)


def merge_loras(
    params: FluxParams,
    loras: Sequence[tuple[str | os.PathLike[str], float]],
) -> FluxParams:
    """Parameters with low-rank updates added.

    Args:
        params: what `jitjax.load` returns; not changed.
        loras: (safetensors file, scale) of each; 1 is the strength it was trained at.

    Returns:
        parameters; what has changed is of the same dtype and on the same devices.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: keys or shapes that do not fit the models in `params`; the message lists
            all of a file's.
        ValueError: a scale is not finite.
    """
    held = [component.name for component in COMPONENTS if getattr(params, component.name)]
    updates = read_loras(loras, params.config, held)
    changed = {}
    for model in updates.models():
        flat: dict[str, Any] = flatten_dict(params.part(model), sep="/")
        for rule in component_of(model).rules(getattr(params.config, model)):
            if updates.touches(model, rule):
                old = flat[rule.target]
                leaf = np.array(old)
                updates.add_to(model, rule, leaf)
                held_by_jax = isinstance(old, jax.Array)
                flat[rule.target] = jax.device_put(leaf, old.sharding) if held_by_jax else leaf
        changed[model] = unflatten_dict(flat, sep="/")
    return FluxParams(
        **{c.name: changed.get(c.name, getattr(params, c.name)) for c in COMPONENTS},
        config=params.config,
        tokenizer=params.tokenizer,
    )


def read_loras(
    loras: Sequence[tuple[str | os.PathLike[str], float]], config: FluxConfig, held: Sequence[str]
) -> Updates:
    """The updates in some files, for the models `held` of a pipeline. Raises as `merge_loras`."""
    updates = Updates()
    known = {m: _layers(m, config) if m in held else {} for m, _ in PREFIXES}
    for file, scale in loras:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; expected a safetensors file")
        if not math.isfinite(scale):
            raise ValueError(f"{path}: scale is {scale}; expected a finite number")
        _read(path, scale, known, updates)
    return updates


@dataclass(frozen=True)
class _Layer:
    """A layer that an update may name: its weight's shape, and which diffusers weights it is."""

    shape: tuple[int, int]
    targets: tuple[tuple[str, Rows | None], ...]


def _layers(model: str, config: FluxConfig) -> dict[str, _Layer]:
    """All layers of a model by every name they may have, dots also as underscores."""
    own = getattr(config, model)
    shapes = component_of(model).source_shapes(own)
    weights = {n: s for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    found = {name: _Layer(shape, ((name, None),)) for name, shape in weights.items()}
    fused: dict[str, list[tuple[str, Rows | None]]] = defaultdict(list)
    for name, part in (ORIGINAL[model](own) if model in ORIGINAL else {}).items():
        if name in weights:
            fused[part.source].append((name, part.rows))
    for source, targets in fused.items():
        rows = sum(weights[name][0] for name, _ in targets)
        found[source] = _Layer((rows, weights[targets[0][0]][1]), tuple(targets))
    layers = {name.removesuffix(".weight"): layer for name, layer in found.items()}
    return layers | {name.replace(".", "_"): layer for name, layer in layers.items()}


def _read(
    path: Path, scale: float, known: Mapping[str, Mapping[str, _Layer]], updates: Updates
) -> None:
    tensors = scan(path)
    weights = Weights(tensors)
    told = _metadata(path)
    problems: list[str] = []
    layers: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for key in tensors:
        ending = next((e for e in ENDINGS if key.endswith(e)), None)
        base = key.removesuffix(ending or "").removeprefix("base_model.model.")
        place = _place(base, known) if ending else None
        if ending is None or place is None:
            problems.append(f"unknown key: {key}")
        else:
            layers[(*place, base)][ENDINGS[ending]] = key
    for (model, name, base), keys in layers.items():
        layer = known[model][name]
        missing = [part for part in "AB" if part not in keys]
        if missing:
            problems.append(f"{base} has no {' and no '.join(missing)}")
            continue
        down, up = (_matrix(weights.read(keys[part])) for part in "AB")
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
            factor = _factor(told, base, rank)
        for target, rows in layer.targets:
            updates.add(model, target, Update(up, down, scale * factor, rows))
    if problems:
        raise ConversionError.of(f"{path}, for {', '.join(m for m in known if known[m])}", problems)


def _place(base: str, known: Mapping[str, Mapping[str, _Layer]]) -> tuple[str, str] | None:
    for model, prefixes in PREFIXES:
        for prefix in prefixes:
            if base.startswith(prefix) and (name := base.removeprefix(prefix)) in known[model]:
                return model, name
    return None


def _matrix(tensor: np.ndarray) -> np.ndarray:
    """float32; convolutions of 1 x 1 are matrices."""
    return np.asarray(tensor, np.float32).reshape(tensor.shape[:2])


def _metadata(path: Path) -> dict[str, Any]:
    """What diffusers keeps of PEFT's configuration beside the weights."""
    with safe_open(path, "numpy") as file:
        raw = (file.metadata() or {}).get("lora_adapter_metadata")
    return json.loads(raw) if raw else {}


def _factor(told: Mapping[str, Any], base: str, rank: int) -> float:
    """alpha / rank by PEFT's configuration; 1 where nothing is told."""
    model, _, layer = base.partition(".")
    alpha = told.get(f"{model}.lora_alpha", rank)
    for pattern, value in told.get(f"{model}.alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    return alpha / (math.sqrt(rank) if told.get(f"{model}.use_rslora") else rank)
