"""Checks of data from outside: JSON files, and the fields of configurations.

The expected type is an annotation. `check` compares a value with it and returns the value in its
normal form: a NumPy or JAX integer as `int`, an integer for a number as `float`, a list for a tuple
as a tuple.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

MAX_JSON_BYTES = 64 * 2**20
"""Size of the largest JSON file that is read; the index of FLUX.1's shards has 0.1 MB."""
MAX_LINES = 20
"""Largest number of problems that an error lists."""


@dataclass(frozen=True)
class Range:
    """Limits of a number, both included: `Annotated[int, Range(1, 8)]`. NaN is never in it."""

    low: int | float
    high: int | float


def check(value: Any, expected: Any, name: str) -> Any:
    """Return `value` in the normal form of the type `expected`.

    Args:
        value: any value, for example one from a JSON file.
        expected: `bool`, `int`, `float`, `str`, `list[T]`, `tuple[T, ...]`, `dict[str, T]`, a
            dataclass (an instance, or a mapping with exactly its fields), `T | None`, `Any`, or
            `Annotated[int | float, Range(low, high)]`. A boolean is neither a number nor the
            other way round.
        name: name of the value in the error message.

    Raises:
        ValueError: the value has another type, or is out of range.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        kinds = [kind for kind in arguments if kind is not type(None)]
        return None if value is None else check(value, kinds[0], name)
    if dataclasses.is_dataclass(expected):
        if isinstance(value, Mapping):
            return _from_mapping(expected, value, name)
        if isinstance(value, expected):  # type: ignore[arg-type]
            return value
    elif origin in (list, tuple):
        if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1:
            return origin(check(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: check(v, arguments[1], f"{name}[{key!r}]") for key, v in value.items()}
    else:
        kind, *limits = arguments if origin is Annotated else (expected,)
        scalar = _scalar(value, kind)
        if scalar is not None and all(r.low <= scalar <= r.high for r in limits):
            return scalar
    raise ValueError(f"{name} is {shown(value)}; expected {_describe(expected)}")


def _scalar(value: Any, kind: type) -> Any:
    """Return `value` as a `kind`, or None if it is not one."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of NumPy or JAX
    if kind in (bool, str) or isinstance(value, bool):
        return value if type(value) is kind or (kind is str and isinstance(value, str)) else None
    try:
        if kind is float and isinstance(value, Real):
            return float(value)
        return kind(operator.index(value))
    except (TypeError, OverflowError):  # 10**400 is not a float
        return None


def _from_mapping(cls: Any, raw: Mapping[str, Any], name: str) -> Any:
    hints = type_hints(cls)
    missing, unknown = hints.keys() - raw.keys(), raw.keys() - hints.keys()
    if missing or unknown:
        word, keys = ("no", missing) if missing else ("the unknown", unknown)
        raise ValueError(
            f"{name} has {word} {shown(min(map(str, keys)))}; expected the keys {', '.join(hints)}"
        )
    return cls(**{key: check(raw[key], hint, f"{name}.{key}") for key, hint in hints.items()})


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        return _describe(arguments[0])
    if origin is Annotated:
        low, high = (f"{limit:.15g}" for limit in (arguments[1].low, arguments[1].high))
        return f"{_describe(arguments[0])} from {low} to {high}"
    if origin in (list, tuple):
        return f"a list, each item {_describe(arguments[0])}"
    if dataclasses.is_dataclass(expected):
        return f"a {expected.__name__}"  # type: ignore[union-attr]
    names = {
        bool: "true or false", int: "an integer", float: "a number", str: "a string",
        dict: f"an object, each value {_describe(arguments[1])}" if origin is dict else "",
    }  # fmt: skip
    return names.get(origin or expected, "a value")


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Return the annotation of every field of a dataclass by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_fields(config: Any) -> None:
    """Check and normalise all fields of a frozen dataclass; for its `__post_init__`.

    Raises:
        ValueError: a value does not have the type or the range of its field's annotation.
    """
    for name, hint in type_hints(type(config)).items():
        value = check(getattr(config, name), hint, f"{type(config).__name__}.{name}")
        object.__setattr__(config, name, value)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: the file does not contain a JSON object, or gives two values to one key.
        OSError: the file cannot be read.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected a JSON file of at most 64 MiB")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, label: object) -> dict[str, Any]:
    """Return the JSON object in `content`, which messages call `label`.

    Raises:
        ValueError: it is no JSON object, or gives two values to one key.
    """
    twice: list[str] = []
    try:
        text = content.decode("utf-8-sig")  # editors on Windows write a BOM
        raw = json.loads(text, object_pairs_hook=functools.partial(_make_object, twice))
    except ValueError as error:
        raise ValueError(f"{label} is not complete JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{label} is nested too deeply; expected a JSON object") from None
    if twice:
        raise ValueError(f"{label} gives the key {shown(twice[0])} two values; expected one")
    if not isinstance(raw, dict):
        raise ValueError(f"{label} contains a {type(raw).__name__}; expected a JSON object")
    return raw


def _make_object(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object; add keys that have two values to `twice`."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made and made[key] != value:
            twice.append(key)
        made[key] = value
    return made


def shown(value: Any) -> str:
    """Return a short `repr` on one line, for error messages."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} that is too long to print"


def listed(problems: Iterable[str]) -> str:
    """Return the problems as indented lines: at most `MAX_LINES`, and the number of the others."""
    lines = list(problems)
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "".join(f"\n  {line}" for line in [*lines[:MAX_LINES], *more])
