"""Fills the README's tables of the quality benchmark from docs/quality.json and docs/dense.json.

    python -m benchmarks.readme

Each table is known by its header line, which stays as it is, and so does all other text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.methods import REFERENCE
from benchmarks.quality.prompts import CATEGORIES

Figures = dict[str, dict]
"""What `benchmarks.report --json` wrote: "methods" by its `summary`, "matched" by its `matched`."""
AIMS = {
    "single": 0.90,
    "colour": 0.90,
    "two": 0.75,
    "counting": 0.60,
    "position": 0.60,
    "binding": 0.75,
}
"""How often 50 dense steps of the bundled checkpoint should be right, so that it can be a judge."""
JIT = ("4x", "tuned-4x", "7x", "tuned-7x")
PLANS = {"`dense`": REFERENCE} | {f"`{name}`": name for name in JIT}
METHODS = {
    "`dense-50`": REFERENCE,
    "`dense-28`": "dense-28",
    "`dense-18`": "dense-18",
    "`dense-12`": "dense-12",
    "`dense-11`, FLUX's sigmas": "dense-11",
    "`dense-11-beta`, the plan's sigmas": "dense-11-beta",
    "`teacache-11`, 28 steps": "teacache-11",
    "`taylor-11`, 28 steps": "taylor-11",
    "**`4x`**": "4x",
    "**`tuned-4x`**": "tuned-4x",
    "`dense-7`": "dense-7",
    "`dense-7-beta`": "dense-7-beta",
    "**`tuned-7x`**": "tuned-7x",
    "**`7x`**": "7x",
    "`dense-6`": "dense-6",
    "`dense-6-beta`": "dense-6-beta",
    "`teacache-6`, 28 steps": "teacache-6",
    "`taylor-6`, 28 steps": "taylor-6",
}
VARIANTS = {
    "the plan itself": "",
    "random later anchors": ":random",
    "fixed grid": ":grid",
    "no lift": ":no-lift",
    "linear lift": ":linear",
    "no micro-flow": ":no-microflow",
    "blend, initial noise": ":blend-initial",
    "hit, fresh noise": ":hit-fresh",
    "hit, initial noise": ":hit-initial",
}

RIVALS = {  # methods that cost about as much as "4x", and as "7x"
    "dense steps on the plan's sigmas": ("dense-11-beta", "dense-7-beta"),
    "dense steps on FLUX's sigmas": ("dense-11", "dense-7"),
    "TeaCache's rule": ("teacache-11", "teacache-6"),
    "the Taylor forecast": ("taylor-11", "taylor-6"),
    "the paper's plan": ("4x", "7x"),
} | {label: (f"4x{suffix}", f"7x{suffix}") for label, suffix in VARIANTS.items() if suffix}


def share(value: float) -> str:
    """A share in whole per cent."""
    return f"{100 * value:.0f}%"


def around(interval: list[float], sign: str = "") -> str:
    """An interval of shares in whole per cent, without the sign for per cent."""
    low, high = (round(100 * end) for end in interval)
    return f"{low:{sign}d} to {high:{sign}d}"


def scored(row: dict) -> str:
    """How often a method is right, and the interval."""
    return f"{share(row['right'])} ({around(row['interval'])})"


def points(difference: float, interval: list[float]) -> str:
    """A paired difference and its interval, in points."""
    return f"{round(100 * difference):+d} ({around(interval, '+')})"


def plans(figures: Figures) -> list[list[str]]:
    """Per plan how often it is right, by category."""
    rows = figures["methods"]
    return [
        [
            label,
            share(rows[name]["right"]),
            around(rows[name]["interval"]),
            *(share(rows[name]["categories"][category]["right"]) for category in CATEGORIES),
        ]
        for label, name in PLANS.items()
    ]


def methods(figures: Figures) -> list[list[str]]:
    """Methods with their operations and their distance to 50 dense steps."""
    rows, found = figures["methods"], []
    for label, name in METHODS.items():
        row = rows[name]
        cells = [label, f"{row['fewer_flops']:.2g}", scored(row), "", "", ""]
        if name != REFERENCE:
            cells[3:] = [
                points(row["against_dense"], row["against_dense_interval"]),
                f"{row['psnr']['mean']:.0f} dB",
                f"{row['features']['mean']:.2f}",
            ]
        found.append(cells)
    return found


def variants(figures: Figures) -> list[list[str]]:
    """What each choice of a plan is worth."""
    rows, found = figures["methods"], []
    for label, suffix in VARIANTS.items():
        cells = [label]
        for plan in ("4x", "7x"):
            row = rows[plan + suffix]
            cells += [scored(row), f"{row['psnr']['mean']:.1f} dB"]
        found.append(cells)
    return found


def rivals(figures: Figures) -> list[list[str]]:
    """What each plan has more in `right` than its rivals; ablations are of the plan itself."""
    found = []
    for label, (about_4x, about_7x) in RIVALS.items():
        cells = [label]
        for plan in JIT:
            name = about_7x if plan.endswith("7x") else about_4x
            own = ":" not in name or name.startswith(plan)
            against = figures["matched"][plan].get(name) if own else None
            cells.append(points(against["difference"], against["interval"]) if against else "")
        found.append(cells)
    return found


def aims(figures: Figures) -> list[list[str]]:
    """How often 50 dense steps are right, by category."""
    found = figures["methods"][REFERENCE]["categories"]
    return [
        [name, share(aim), share(found[name]["right"]), around(found[name]["interval"])]
        for name, aim in AIMS.items()
    ]


TABLES: dict[str, Callable[[Figures], list[list[str]]]] = {
    f"| plan | right | 95 % interval | {' | '.join(CATEGORIES)} |": plans,
    f"| method | FLOPs ÷ | right | paired difference to `{REFERENCE}` | PSNR to it | features |": (
        methods
    ),
    "| variant | `4x` right | PSNR | `7x` right | PSNR |": variants,
    f"| the plan has more than | {' | '.join(f'`{name}`' for name in JIT)} |": rivals,
}
DENSE = "| kind | aim | right | 95 % interval |"


def filled(text: str, figures: Figures, dense: Figures) -> str:
    """The README with its tables made anew.

    Args:
        text: the README.
        figures: those of all methods that its tables name.
        dense: those of many pictures by 50 dense steps.

    Raises:
        ValueError: a table's header is not there, once; or a method has no figures.
    """
    wanted = {*METHODS.values()} | {p + v for p in ("4x", "7x") for v in VARIANTS.values()}
    if missing := sorted(wanted - set(figures["methods"])):
        raise ValueError(f"no figures of {', '.join(missing)}; expected all that README names")
    lines = text.split("\n")
    tables = {header: make(figures) for header, make in TABLES.items()} | {DENSE: aims(dense)}
    for header, rows in tables.items():
        if lines.count(header) != 1:
            raise ValueError(f"README has {lines.count(header)} lines {header!r}; expected one")
        start = lines.index(header) + 2  # past the rule
        end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        lines[start:end] = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the tables in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("docs/quality.json"))
    parser.add_argument("--dense", type=Path, default=Path("docs/dense.json"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    figures, dense = (json.loads(path.read_text()) for path in (args.json, args.dense))
    args.readme.write_text(filled(args.readme.read_text(), figures, dense))


if __name__ == "__main__":
    main()
