"""What both training programs share: atomic checkpoints, averaged weights, a progress line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
RUNS = Path(os.environ.get("JITJAX_TRAIN", "/var/tmp/jitjax-train"))


def save_atomically(state: dict, path: Path) -> None:
    """Writes beside the target and renames, so a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_if_there(path: Path) -> dict | None:
    """The saved state, or None where there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Average:
    """Exponential moving average of named float tensors; short-sighted in the first steps."""

    def __init__(self, named: dict[str, torch.Tensor], decay: float):
        self.decay = decay
        self.values = {name: value.detach().clone().float() for name, value in named.items()}

    @torch.no_grad()
    def update(self, named: dict[str, torch.Tensor], step: int) -> None:
        """Moves towards `named`; `step` counts from 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [named[name].detach() for name in self.values], 1 - keep
        )


class Clock:
    """Prints `step, loss, rate, time left` every so often, to the screen and to a log file."""

    def __init__(self, log: Path, every: float = 20.0):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.every = log, every
        self.start = self.last = time.monotonic()
        self.losses: list[float] = []
        self.units = 0

    def tick(self, step: int, loss: float, units: int, left: float, extra: str = "") -> None:
        """Counts one step; `units` are samples or tokens, `left` the seconds that remain."""
        self.losses.append(loss)
        self.units += units
        now = time.monotonic()
        if now - self.last < self.every:
            return
        line = (
            f"step {step:6d}  loss {sum(self.losses) / len(self.losses):.4f}  "
            f"{self.units / (now - self.last):8.0f}/s  left {left / 60:5.1f} min  {extra}"
        )
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S', time.gmtime())}  {line}\n")
        self.last, self.losses, self.units = now, [], 0


def autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies it; elsewhere float32, four times as fast there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16)
