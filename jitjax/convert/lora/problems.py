"""What is wrong with a LoRA file: one misfit, or the list of all."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ..tables.engine import ConversionError

UNKNOWN = "unknown key"
MOST_LINES = 20
"""Lines of a message; what is beyond them is counted."""


class Misfit(ValueError):
    """A tensor or layer that cannot be used.

    Attributes:
        message: what is wrong with it, continuing a sentence that begins with its name.
        key: name of the tensor or layer.
    """

    def __init__(self, message: str, key: str):
        super().__init__(f"{key} {message}")
        self.message, self.key = message, key


class Problems:
    """Everything that is wrong with a file: a line for each kind of fault and each unknown name.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: dict[str, list[str]] = defaultdict(list)  # message -> names

    def add(self, message: str, key: str) -> None:
        """Add a fault of a tensor or layer."""
        self._keys[message].append(key)

    def check(self) -> None:
        """Raise one `ConversionError` if there are any faults."""
        lines = []
        for message, keys in self._keys.items():
            if message == UNKNOWN:
                lines += [f"{UNKNOWN}: {key}" for key in keys]
            else:
                more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
                lines.append(f"{keys[0]}{more} {message}")
        if len(lines) == 1:
            raise ConversionError(f"{self._path}: {lines[0]}")
        if lines:
            count = sum(len(keys) for keys in self._keys.values())
            if len(lines) > MOST_LINES:
                lines[MOST_LINES - 1 :] = [f"and {len(lines) - MOST_LINES + 1} more"]
            text = "\n  ".join(lines)
            raise ConversionError(f"{self._path}: {count} mismatched key(s)\n  {text}")
