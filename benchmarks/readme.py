"""Fills the README's tables of the quality benchmark from docs/quality.json and docs/dense.json.

    python -m benchmarks.readme

A table is found by its header line. Only the rows below the header change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.methods import REFERENCE
from benchmarks.quality.prompts import CATEGORIES

Figures = dict[str, dict]
"""What `benchmarks.report --json` writes: "methods" from `summarise`, "matched" from
`match_methods`."""
AIMS = {
    "single": 0.90,
    "colour": 0.90,
    "two": 0.75,
    "counting": 0.60,
    "position": 0.60,
    "binding": 0.75,
}
"""Share of images by 50 dense steps that the bundled checkpoint should get right, by category."""
JIT_PLANS = ("4x", "tuned-4x", "7x", "tuned-7x")
PLAN_LABELS = {"`dense`": REFERENCE} | {f"`{name}`": name for name in JIT_PLANS}
METHOD_LABELS = {
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
VARIANT_LABELS = {
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

RIVALS = {  # label: (method that costs about as much as "4x", the same for "7x")
    "dense steps on the plan's sigmas": ("dense-11-beta", "dense-7-beta"),
    "dense steps on FLUX's sigmas": ("dense-11", "dense-7"),
    "TeaCache's rule": ("teacache-11", "teacache-6"),
    "the Taylor forecast": ("taylor-11", "taylor-6"),
    "the paper's plan": ("4x", "7x"),
} | {label: (f"4x{suffix}", f"7x{suffix}") for label, suffix in VARIANT_LABELS.items() if suffix}


def percent(value: float) -> str:
    """Format a share in whole per cent."""
    return f"{100 * value:.0f}%"


def format_interval(interval: list[float], sign: str = "") -> str:
    """Format an interval of shares in whole per cent, without the per cent sign."""
    low, high = (round(100 * end) for end in interval)
    return f"{low:{sign}d} to {high:{sign}d}"


def format_right(row: dict) -> str:
    """Format a method's share of right images and its interval."""
    return f"{percent(row['right'])} ({format_interval(row['interval'])})"


def format_difference(difference: float, interval: list[float]) -> str:
    """Format a paired difference and its interval in percentage points."""
    return f"{round(100 * difference):+d} ({format_interval(interval, '+')})"


def plan_rows(figures: Figures) -> list[list[str]]:
    """Return a row per plan: share of right images, its interval, and the share by category."""
    rows = figures["methods"]
    return [
        [
            label,
            percent(rows[name]["right"]),
            format_interval(rows[name]["interval"]),
            *(percent(rows[name]["categories"][category]["right"]) for category in CATEGORIES),
        ]
        for label, name in PLAN_LABELS.items()
    ]


def method_rows(figures: Figures) -> list[list[str]]:
    """Return a row per method: operations, share of right images, comparison with `REFERENCE`."""
    rows, result = figures["methods"], []
    for label, name in METHOD_LABELS.items():
        row = rows[name]
        cells = [label, f"{row['fewer_flops']:.2g}", format_right(row), "", "", ""]
        if name != REFERENCE:
            cells[3:] = [
                format_difference(row["against_dense"], row["against_dense_interval"]),
                f"{row['psnr']['mean']:.0f} dB",
                f"{row['features']['mean']:.2f}",
            ]
        result.append(cells)
    return result


def variant_rows(figures: Figures) -> list[list[str]]:
    """Return a row per ablation: share of right images and PSNR, for "4x" and "7x"."""
    rows, result = figures["methods"], []
    for label, suffix in VARIANT_LABELS.items():
        cells = [label]
        for plan in ("4x", "7x"):
            row = rows[plan + suffix]
            cells += [format_right(row), f"{row['psnr']['mean']:.1f} dB"]
        result.append(cells)
    return result


def rival_rows(figures: Figures) -> list[list[str]]:
    """Return a row per rival: the paired difference in right images, for each of `JIT_PLANS`.

    A plan is compared with its own ablations only.
    """
    result = []
    for label, (rival_of_4x, rival_of_7x) in RIVALS.items():
        cells = [label]
        for plan in JIT_PLANS:
            name = rival_of_7x if plan.endswith("7x") else rival_of_4x
            applies = ":" not in name or name.startswith(plan)
            entry = figures["matched"][plan].get(name) if applies else None
            cells.append(format_difference(entry["difference"], entry["interval"]) if entry else "")
        result.append(cells)
    return result


def aim_rows(figures: Figures) -> list[list[str]]:
    """Return a row per category: the aim, and the share of right images by `REFERENCE`."""
    rows = figures["methods"][REFERENCE]["categories"]
    return [
        [name, percent(aim), percent(rows[name]["right"]), format_interval(rows[name]["interval"])]
        for name, aim in AIMS.items()
    ]


TABLE_ROWS: dict[str, Callable[[Figures], list[list[str]]]] = {
    f"| plan | right | 95 % interval | {' | '.join(CATEGORIES)} |": plan_rows,
    f"| method | FLOPs ÷ | right | paired difference to `{REFERENCE}` | PSNR to it | features |": (
        method_rows
    ),
    "| variant | `4x` right | PSNR | `7x` right | PSNR |": variant_rows,
    f"| the plan has more than | {' | '.join(f'`{name}`' for name in JIT_PLANS)} |": rival_rows,
}
DENSE_HEADER = "| kind | aim | right | 95 % interval |"


def fill_tables(text: str, figures: Figures, dense: Figures) -> str:
    """Replace the rows of all tables.

    Args:
        text: the README.
        figures: results of all methods that the tables name.
        dense: results of `REFERENCE` on more images, for the table of aims.

    Returns:
        The new README.

    Raises:
        ValueError: a table's header does not occur exactly once, or a method has no results.
    """
    required = {*METHOD_LABELS.values()} | {
        p + v for p in ("4x", "7x") for v in VARIANT_LABELS.values()
    }
    if missing := sorted(required - set(figures["methods"])):
        raise ValueError(f"no results for {', '.join(missing)}; expected all methods of the README")
    lines = text.split("\n")
    tables = {header: make_rows(figures) for header, make_rows in TABLE_ROWS.items()} | {
        DENSE_HEADER: aim_rows(dense)
    }
    for header, rows in tables.items():
        if lines.count(header) != 1:
            raise ValueError(f"README has {lines.count(header)} lines {header!r}; expected one")
        start = lines.index(header) + 2  # skip the header and the rule below it
        end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        lines[start:end] = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the README in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("docs/quality.json"))
    parser.add_argument("--dense", type=Path, default=Path("docs/dense.json"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    figures, dense = (json.loads(path.read_text()) for path in (args.json, args.dense))
    args.readme.write_text(fill_tables(args.readme.read_text(), figures, dense))


if __name__ == "__main__":
    main()
