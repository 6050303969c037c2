"""Shared parts of the training programs: atomic checkpoints, averaged weights, progress log."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
RUNS = Path(os.environ.get("JITJAX_TRAIN", "/var/tmp/jitjax-train"))


def save_atomically(state: dict, path: Path) -> None:
    """Save a checkpoint to a temporary file and rename it, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_or_none(path: Path) -> dict | None:
    """Load a checkpoint to the CPU, or return None if the file does not exist."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class WeightAverage:
    """Exponential moving average of named tensors, in float32.

    Args:
        parameters: the tensors by name; their values start the average.
        decay: decay per step. The first steps use (1 + step) / (10 + step) while it is smaller.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float):
        self.decay = decay
        self.values = {name: value.detach().clone().float() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.Tensor], step: int) -> None:
        """Update the average with the current values; `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()),
            [parameters[name].detach() for name in self.values],
            1 - decay,
        )


class ProgressLog:
    """Prints step, mean loss, speed and time left at intervals, and appends them to a log file.

    Args:
        log: the log file.
        interval: seconds between lines.
    """

    def __init__(self, log: Path, interval: float = 20.0):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.interval = log, interval
        self.start = self.last = time.monotonic()
        self.losses: list[float] = []
        self.units = 0

    def tick(
        self, step: int, loss: float, units: int, seconds_left: float, extra: str = ""
    ) -> None:
        """Record a step, and print a line if the interval has passed.

        Args:
            step: number of finished steps.
            loss: loss of the step.
            units: samples or tokens of the step, for the speed.
            seconds_left: rest of the time budget.
            extra: text to append to the line.
        """
        self.losses.append(loss)
        self.units += units
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        line = (
            f"step {step:6d}  loss {sum(self.losses) / len(self.losses):.4f}  "
            f"{self.units / (now - self.last):8.0f}/s  left {seconds_left / 60:5.1f} min  {extra}"
        )
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S', time.gmtime())}  {line}\n")
        self.last, self.losses, self.units = now, [], 0


def autocast() -> torch.autocast:
    """Return an autocast context: bfloat16 on processors with instructions for it, else float32.

    Without such instructions float32 is four times as fast as bfloat16.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16)
