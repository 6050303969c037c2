"""Applies LoRA files to loaded parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jitjax.checkpoint import FluxParams
from jitjax.models.quantised import Quantised, float_dtype
from jitjax.nested import flatten, unflatten

from ..components import COMPONENTS, component_of
from ..tables.engine import TRANSFORMS, ConversionError, Rule
from .paths import Loras
from .reading import read_loras


def merge_loras(params: FluxParams, loras: Loras) -> FluxParams:
    """Apply low-rank updates (LoRA, DoRA, LoHa, LoKr) to parameters.

    Args:
        params: result of `jitjax.load`; not changed.
        loras: (file, scale) of each update: a safetensors file or a folder of PEFT, and a finite
            number. Scale 1 is the strength of the training, scale 0 changes nothing. They are
            applied in this order.

    Returns:
        The merged parameters. Changed leaves keep their dtype and sharding. A control LoRA adds
        input channels to the transformer, in the parameters and in `config`. Beside quantised
        weights a LoRA is kept as two matrices, and the values and scales are shared with `params`:
        most of it would vanish if the sum were rounded again.

    Raises:
        FileNotFoundError: a file does not exist.
        ConversionError: a file is not a LoRA of FLUX.1, its keys, shapes, dtypes or values are
            not right, two places in it state different strengths, a merged leaf is not finite, or
            the update of a quantised leaf is of another kind than LoRA.
        ValueError: `loras` is not a list of (file, scale) pairs, or a scale is not finite.

    Warns:
        UserWarning: a file also has updates of models that are not in `params`, or all of its
            updates are 0.

    Source: Hu et al., 2021 (arXiv 2106.09685), section 4.1; `adapters.py` has the others.
    """
    available = [component.name for component in COMPONENTS if getattr(params, component.name)]
    updates = read_loras(loras, params.config, available)
    config = updates.config
    merged = {}
    for model in updates.models():
        rules = component_of(model).rules(getattr(config, model))
        flat: dict[str, Any] = flatten(params.part(model))
        shapes = flatten(component_of(model).abstract_params(getattr(config, model)))
        dtype = float_dtype(params.part(model))
        changed = dict(flat)
        read = _Reader(rules, flat)
        for rule in rules:
            if updates.affects(model, rule):
                old = flat[rule.target]
                if isinstance(old, Quantised):
                    shape = shapes[rule.target].shape
                    factors = updates.factors(model, rule, shape)
                    changed[rule.target] = _beside(old, factors, dtype, f"{model}/{rule.target}")
                    continue
                leaf = np.array(old)
                if leaf.shape != (shape := shapes[rule.target].shape):  # more input channels
                    ends = np.subtract(shape, leaf.shape)
                    leaf = np.pad(leaf, [(0, end) for end in ends])
                updates.add_to(model, rule, leaf, 0, read)
                on_device = isinstance(old, jax.Array)
                changed[rule.target] = jax.device_put(leaf, old.sharding) if on_device else leaf
        merged[model] = unflatten(changed)
    return FluxParams(
        **{c.name: merged.get(c.name, getattr(params, c.name)) for c in COMPONENTS},
        config=config,
        tokenizer=params.tokenizer,
    )


def _beside(
    kernel: Quantised, factors: tuple[np.ndarray, np.ndarray], dtype: Any, path: str
) -> Quantised:
    """Add a low-rank update to those beside a quantised kernel, in `dtype`."""
    down, up = factors
    if kernel.down is not None:
        down = np.concatenate([np.asarray(kernel.down, np.float32), down], axis=2)
        up = np.concatenate([np.asarray(kernel.up, np.float32), up], axis=1)
    with np.errstate(over="ignore"):
        down, up = down.astype(dtype), up.astype(dtype)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise ConversionError(f"{path}: the LoRA has values that are not finite in {dtype}")
    sharding = kernel.values.sharding if isinstance(kernel.values, jax.Array) else None
    if isinstance(sharding, jax.sharding.NamedSharding):  # the rank may not be divisible
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put((down, up), sharding)
    return dataclasses.replace(kernel, down=placed[0], up=placed[1])


class _Reader:
    """Returns the weights of parameters by diffusers name.

    Args:
        rules: rule table of the model.
        leaves: path -> leaf.
    """

    def __init__(self, rules: Sequence[Rule], leaves: Mapping[str, Any]):
        self._leaves = leaves
        self._places = {
            name: (rule, block, i)
            for rule in rules
            for block, names in enumerate(rule.source_names())
            for i, name in enumerate(names)
        }

    def __call__(self, name: str) -> np.ndarray:
        rule, block, i = self._places[name]
        leaf = self._leaves[rule.target]
        value = np.asarray(leaf if rule.blocks is None else leaf[block])
        return TRANSFORMS[rule.transform].backward(value, len(rule.sources))[i]
