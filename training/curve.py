"""Plots the loss curve from the log of `training.flow`.

    python -m training.curve                # training/flow.log to training/loss.png

Time without training is left out. Each colour is one kind of step (`steps.StepKind`); a grey line
marks the start of a phase. Losses are not comparable between kinds, nor across changes of the
shift, the guidance or the loss weights.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
LINE = re.compile(r"(\d\d:\d\d:\d\d)  step +\d+ .* left +([\d.]+) min  lr x[\d.]+  (.*)")


def read_log(text: str) -> tuple[dict[str, tuple[list[float], list[float]]], list[float]]:
    """Parse a log.

    Args:
        text: the text of the log.

    Returns:
        Minutes and losses of each kind of step, and the minutes at which phases start.
    """
    curves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    minutes, phase_starts = 0.0, []
    previous, previous_left = None, 0.0
    for clock_time, left, kinds in LINE.findall(text):
        clock = time.strptime(clock_time, "%H:%M:%S")
        seconds = clock.tm_hour * 3600 + clock.tm_min * 60 + clock.tm_sec
        if previous is None or float(left) > previous_left:
            phase_starts.append(minutes)
        elif 0 < (seconds - previous) % 86_400 < 300:  # longer gaps are pauses
            minutes += (seconds - previous) % 86_400 / 60
        previous, previous_left = seconds, float(left)
        for kind, loss in re.findall(r"([\d/]+@\d+) ([\d.]+)", kinds):
            curves[kind][0].append(minutes)
            curves[kind][1].append(float(loss))
    return curves, phase_starts


def main() -> None:
    """Write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, default=HERE / "flow.log")
    parser.add_argument("--out", type=Path, default=HERE / "loss.png")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, phase_starts = read_log(args.log.read_text())
    if not curves:
        parser.error(f"{args.log} has no matching line; expected a log of training.flow")
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for start in phase_starts:
        axes.axvline(start, color="0.8", lw=0.8)
    for kind, (minutes, losses) in sorted(curves.items()):
        image, _, stride = kind.partition("@")
        side, _, window = image.partition("/")
        view = f"windows of {window} tokens" if window else f"stride {stride}"
        axes.plot(minutes, losses, ".", ms=3, label=f"{side} px, {view}")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("loss (moving mean)")
    axes.set_ylim(0.03, 0.6)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
