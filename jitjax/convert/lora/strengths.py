"""The strength of an update, alpha / rank, from every place where a file may state it.

    alpha tensors         X.alpha                                       kohya, OneTrainer, LyCORIS
    adapter_config.json   beside the file                               PEFT
    header                `lora_adapter_metadata`, a JSON object with or without `transformer.`
    header                plain fields such as `lora_alpha`, `transformer.lora_alpha`

Where none states an alpha, it is the rank. Where two disagree, the file is refused. kohya's header
field `ss_network_alpha` records the command of the training, and stays when a script scales the
matrices or LyCORIS changes the alpha; no program applies it, so it is only compared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from jitjax.validation import parse_json, read_json

from ..tables.engine import ConversionError
from .problems import Misfit

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODEL_PREFIXES = {
    "transformer": "transformer", "unet": "transformer", "text_encoder": "clip",
    "text_encoder_2": "t5",
}  # fmt: skip
"""Prefix of a header field -> model."""
PEFT_ALPHA = 8
"""PEFT's alpha where its file states none."""
ALPHA_NAMES, RANK_NAMES = ("lora_alpha", "alpha"), ("r", "rank", "lora_rank")
PEFT_TYPES = ("LORA", "LOKR", "LOHA")
# Settings of PEFT with which the weight is not W + alpha / rank * B A (or DoRA).
UNSUPPORTED = (
    "fan_in_fan_out", "use_qalora", "layer_replication", "alora_invocation_tokens", "use_bdlora",
    "monteclora_config", "arrow_config", "kasa_config",
)  # fmt: skip
# Initialisations that change the base model itself.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
SAME = 2**-8
"""Relative difference up to which two strengths are the same: alphas may be stored in bfloat16."""


def as_number(value: Any) -> float | None:
    """Return an int or float that is finite as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_value, value.values()))


def _is_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_number(value: Any) -> bool:
    return as_number(value) is not None


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(ALPHA_NAMES, (_is_number, "a finite number")),
    **dict.fromkeys(RANK_NAMES, (_is_rank, "a positive integer")),
    "alpha_pattern": (_is_pattern(_is_number), "an object of finite numbers"),
    "rank_pattern": (_is_pattern(_is_rank), "an object of positive integers"),
    **dict.fromkeys(
        ("use_rslora", "use_dora"), (lambda v: v is None or isinstance(v, bool), "true or false")
    ),
    "bias": (lambda v: v in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "modules_to_save": (_is_names, "a list of names"),
    "peft_type": (lambda v: v in PEFT_TYPES, f"one of {', '.join(PEFT_TYPES)}"),
    "init_lora_weights": (
        lambda v: not (isinstance(v, str) and CHANGES_BASE.match(v)),
        "an initialisation that leaves the base model unchanged; save the adapter with "
        "PEFT's path_initial_model_for_weight_conversion",
    ),
    **dict.fromkeys(UNSUPPORTED, (lambda v: not v, "it unset; it is not implemented")),
}
"""Field -> (whether a value is right, what is expected)."""


@dataclass(frozen=True)
class Settings:
    """The settings that one place states.

    Attributes:
        label: the place, for messages.
        fields: model, or "" for all models -> field -> value.
        default_alpha: alpha if the place states none; None if it then says nothing.
    """

    label: str
    fields: Mapping[str, Mapping[str, Any]]
    default_alpha: float | None = None

    def get(self, model: str, names: str | tuple[str, ...]) -> Any:
        """Return the value of the first field that is stated for a model; None for none."""
        for fields in (self.fields.get(model, {}), self.fields.get("", {})):
            for name in (names,) if isinstance(names, str) else names:
                if name in fields:
                    return fields[name]
        return None

    def of_layer(self, model: str, layer: str, field: tuple[str, ...], patterns: str) -> Any:
        """Return the value for a layer: of the first pattern that matches it, or of the field."""
        for pattern, value in (self.get(model, patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        return self.get(model, field)


def _settings(label: str, raw: Mapping[str, Any], default_alpha: float | None = None) -> Settings:
    """Check the fields that stand in one place, with or without the prefix of a model."""
    fields: dict[str, dict[str, Any]] = {}
    for key, value in raw.items():
        prefix, _, name = key.rpartition(".")
        if name not in FIELDS or (prefix and prefix not in MODEL_PREFIXES):
            continue
        is_right, expected = FIELDS[name]
        if not is_right(value):
            text = json.dumps(value)
            text = text if len(text) <= 60 else f"{text[:57]}..."
            raise ConversionError(f"{label}: {key} is {text}; expected {expected}")
        if name.endswith("_pattern"):
            for pattern in value:
                try:
                    re.compile(rf"(.*\.)?({pattern})$")
                except re.error as error:
                    raise ConversionError(
                        f"{label}: {key} has {pattern!r}; expected a regular expression ({error})"
                    ) from None
        fields.setdefault(MODEL_PREFIXES[prefix] if prefix else "", {})[name] = value
    return Settings(label, fields, default_alpha)


class Strengths:
    """The strengths of the updates in one file.

    Args:
        path: the safetensors file.

    Raises:
        ConversionError: a setting has a wrong type or is not implemented.
    """

    def __init__(self, path: Path):
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
        self.header = header
        self._settings: list[Settings] = []
        if "lora_adapter_metadata" in header:
            label = f"lora_adapter_metadata in the header of {path}"
            try:
                raw = parse_json(header["lora_adapter_metadata"].encode(), label)
            except ValueError as error:
                raise ConversionError(str(error)) from None
            self._settings.append(_settings(label, raw))
        plain = {key: _parse(value) for key, value in header.items()}
        self._settings.append(_settings(f"header of {path}", plain))
        config = path.with_name(CONFIG_FILE)
        # In a folder with other files it is the configuration of PEFT's own file.
        if config.is_file() and (
            path.name == WEIGHTS_FILE or not path.with_name(WEIGHTS_FILE).exists()
        ):
            settings = _settings(str(config), read_json(config), PEFT_ALPHA)
            if settings.fields:
                self._settings.append(settings)

    def factor(
        self, model: str, layer: str, key: str, rank: int | None, alpha: float | None
    ) -> float:
        """Return the factor of a layer's update.

        Args:
            model: name of the model.
            layer: name of the layer without prefix.
            key: name of the layer in the file, for messages.
            rank: rank of the matrices; None for a LoKr of whole matrices.
            alpha: value of the file's alpha tensor; None if there is none.

        Raises:
            Misfit: two places disagree, or a stated rank is not that of the matrices.
        """
        stated: list[tuple[float, str]] = []
        # LyCORIS does not scale whole matrices, whatever alpha they have.
        if alpha is not None and rank is not None:
            stated.append((alpha / rank, f"{alpha:g} / {rank} by its .alpha"))
        for settings in self._settings:
            declared = settings.of_layer(model, layer, RANK_NAMES, "rank_pattern")
            if None not in (rank, declared) and declared != rank:
                raise Misfit(
                    f"has rank {rank}, but {settings.label} says rank {declared}",
                    key,
                )
            value = settings.of_layer(model, layer, ALPHA_NAMES, "alpha_pattern")
            divisor = rank or declared
            if value is None and settings.get(model, "use_rslora"):
                value = divisor if settings.default_alpha is None else settings.default_alpha
            value = settings.default_alpha if value is None else value
            if value is None or divisor is None:
                continue
            if settings.get(model, "use_rslora"):
                text = f"{value:g} / sqrt({divisor}) by {settings.label}"
                stated.append((value / math.sqrt(divisor), text))
            else:
                stated.append((value / divisor, f"{value:g} / {divisor} by {settings.label}"))
        for factor, text in stated[1:]:
            if not math.isclose(factor, stated[0][0], rel_tol=SAME):
                raise Misfit(f"has strength {stated[0][1]}, but {text}; expected one", key)
        return stated[0][0] if stated else 1.0

    def expects_magnitude(self, model: str) -> bool:
        """Whether a setting says that the updates are DoRA."""
        return any(settings.get(model, "use_dora") for settings in self._settings)

    def replaces(self, model: str, layer: str, kind: str) -> bool:
        """Whether a whole weight or bias in the file replaces the model's (PEFT's settings)."""
        for settings in self._settings:
            if kind == "bias" and settings.get(model, "bias") not in (None, "none"):
                return True
            modules = settings.get(model, "modules_to_save") or ()
            if any(f".{module}." in f".{layer}." for module in modules):
                return True
        return False

    def kohya_remark(self, alphas: set[float]) -> str | None:
        """Return what to say if kohya's header has another alpha than the tensors; None if not."""
        stated, rank = (_parse(self.header.get(f"ss_network_{x}", "")) for x in ("alpha", "dim"))
        stated = as_number(stated)
        if stated is None:
            return None
        if alphas and not any(math.isclose(stated, a, rel_tol=SAME) for a in alphas):
            return (
                f"ss_network_alpha in its header is {stated:g}, but its .alpha tensors are "
                f"{', '.join(f'{a:g}' for a in sorted(alphas)[:3])}; the tensors count"
            )
        if not alphas and stated != rank:
            return (
                f"ss_network_alpha in its header is {stated:g}, but it has no .alpha tensors; "
                "taken as already multiplied into the matrices"
            )
        return None


def _parse(text: str) -> Any:
    """Return the JSON value of a header field, which is always a string; or the string."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text
