"""Draws the loss curve from the log of `training.flow`.

    python -m training.curve                # training/flow.log to training/loss.png

Minutes count only while a training ran. Each colour is one kind of step (`flow.Kind`); a grey
line begins a new phase. Losses of different kinds, and from before and after a change of shift,
guidance or weights, do not compare.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
LINE = re.compile(r"(\d\d:\d\d:\d\d)  step +\d+ .* left +([\d.]+) min  lr x[\d.]+  (.*)")


def read(text: str) -> tuple[dict[str, tuple[list[float], list[float]]], list[float]]:
    """Per kind the minutes and the losses; and the minutes at which phases begin."""
    curves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    minutes, phases = 0.0, []
    before, remaining = None, 0.0
    for clock, left, kinds in LINE.findall(text):
        now = time.strptime(clock, "%H:%M:%S")
        seconds = now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec
        if before is None or float(left) > remaining:
            phases.append(minutes)
        elif 0 < (seconds - before) % 86_400 < 300:  # longer: the machine was stopped
            minutes += (seconds - before) % 86_400 / 60
        before, remaining = seconds, float(left)
        for kind, loss in re.findall(r"([\d/]+@\d+) ([\d.]+)", kinds):
            curves[kind][0].append(minutes)
            curves[kind][1].append(float(loss))
    return curves, phases


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, default=HERE / "flow.log")
    parser.add_argument("--out", type=Path, default=HERE / "loss.png")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, phases = read(args.log.read_text())
    if not curves:
        parser.error(f"{args.log} has no line of training.flow")
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for begin in phases:
        axes.axvline(begin, color="0.8", lw=0.8)
    for kind, (minutes, losses) in sorted(curves.items()):
        picture, _, stride = kind.partition("@")
        side, _, window = picture.partition("/")
        seen = f"windows of {window} tokens" if window else f"stride {stride}"
        axes.plot(minutes, losses, ".", ms=3, label=f"{side} px, {seen}")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("loss (moving mean)")
    axes.set_ylim(0.03, 0.6)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
