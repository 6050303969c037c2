"""Reports of finished steps, without a wait for each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

STEPS_AHEAD = 8
"""Most steps that are dispatched but not finished. More of them would delay the end by Ctrl-C."""


class StepReports:
    """Calls a function once for every step that the device has finished.

    Steps are dispatched ahead, so that the device works while Python traces the next stage.

    Args:
        progress: called with 1 for each finished step; None for no reports.
    """

    def __init__(self, progress: Callable[[int], Any] | None) -> None:
        self._progress = progress
        self._states: deque[Any] = deque()

    def add(self, state: Any) -> None:
        """Add the array after a step, and report the steps that are finished by now."""
        if self._progress is None:
            return
        self._states.append(state)
        while self._states and (len(self._states) > STEPS_AHEAD or _is_ready(self._states[0])):
            self._report(self._progress)

    def finish(self) -> None:
        """Wait for all steps, and report them."""
        while self._progress is not None and self._states:
            self._report(self._progress)

    def _report(self, progress: Callable[[int], Any]) -> None:
        self._states.popleft().block_until_ready()
        progress(1)


def _is_ready(array: Any) -> bool:
    # Arrays have this method, but JAX's interface of arrays does not promise it.
    is_ready = getattr(array, "is_ready", None)
    return is_ready is None or is_ready()
