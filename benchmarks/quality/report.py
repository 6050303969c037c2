"""Writes the figures of the quality benchmark: docs/quality.* and the README's table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import (
    FULL_SIZE,
    PAPER_PLANS,
    REFERENCE,
    VARIANTS,
    dense_evaluations,
    parse_method,
    solver_words,
)
from benchmarks.quality.prompts import CATEGORIES
from benchmarks.quality.results import header_words
from jitjax.config import TransformerConfig
from jitjax.sampler.plan import DEFAULT_PLAN, PLANS

Figures = dict[str, Any]  # what `summary.figures` returns
AIMS = {
    "single": 0.90,
    "colour": 0.90,
    "two": 0.75,
    "counting": 0.60,
    "position": 0.60,
    "binding": 0.75,
}
"""Share of pictures by `REFERENCE` that the bundled checkpoint should get right. They were set
before it was used to compare samplers."""
README_ROWS = 10
README_COLUMNS = ("plan", "steps", "tokens of each stage", "fewer operations", "right", "PSNR")
README_HEADER = f"| {' | '.join(README_COLUMNS)} |"
MARK = "<!-- All below is written by python -m benchmarks.quality --docs -->"
TITLE = "# Samplers on the bundled checkpoint\n"


def percent(mean: Mapping[str, Any]) -> str:
    """Format a share and its interval: 85% (72 to 95)."""
    low, high = (round(100 * end) for end in mean["interval"])
    return f"{100 * mean['mean']:.0f}% ({low} to {high})"


def points(mean: Mapping[str, Any]) -> str:
    """Format a difference of shares and its interval in percentage points: +2 (-8 to +12)."""
    low, high = (round(100 * end) for end in mean["interval"])
    return f"{round(100 * mean['mean']):+d} ({low:+d} to {high:+d})"


def decibels(mean: Mapping[str, Any], sign: str = "") -> str:
    """Format a PSNR, or with the sign "+" a difference of two, and its interval."""
    low, high = mean["interval"]
    return f"{mean['mean']:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]]) + "\n"


def cell(summary: Mapping[str, Any], format_value: Any, *keys: str) -> str:
    """Format the value at `keys`; empty where there is none."""
    value: Any = summary
    for key in keys:
        value = value.get(key, {})
    return format_value(value) if value else ""


def method_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all methods, the cheapest last."""
    titles = ["method", "name", "evaluations", "FLOPs ÷", "time ÷", "right"]
    titles += ["more than 50 dense steps", "more than dense multistep of equal cost"]
    titles += ["PSNR dB", "the same in dB", "SSIM"]
    return table(
        titles,
        [
            [
                summary["label"],
                f"`{name}`",
                f"{summary['evaluations']:.3g}",
                f"{summary['fewer_flops']:.2f}",
                f"{summary['faster']:.1f}" if summary["faster"] else "",
                percent(summary["right"]),
                cell(summary, points, "against_reference"),
                cell(summary, points, "against_multistep", "right"),
                cell(summary, decibels, "psnr"),
                cell(summary, lambda m: decibels(m, "+"), "against_multistep", "psnr"),
                cell(summary, lambda m: f"{m['mean']:.3f}", "ssim"),
            ]
            for name, summary in summaries.items()
        ],
    )


def category_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of right pictures by kind of prompt, after a row of `AIMS`."""
    kinds = [kind for kind in CATEGORIES if kind in summaries[REFERENCE]["categories"]]
    rows = [["aim for 50 dense steps", *(f"{AIMS[kind]:.0%}" for kind in kinds)]]
    for summary in summaries.values():
        shares = (summary["categories"][kind]["mean"] for kind in kinds)
        rows.append([summary["label"], *(f"{share:.0%}" for share in shares)])
    return table(["right", *kinds], rows)


def ablation_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of the paper's plans with one choice changed."""
    titles = ["the plan with"]
    for plan in PAPER_PLANS:
        titles += [f"`{plan}` right", "more than the plan", "PSNR dB", "more than the plan"]
    rows = []
    endings = [("", "nothing changed"), *((f":{v}", words) for v, (words, _) in VARIANTS.items())]
    for ending, words in endings:
        if f"{PAPER_PLANS[0]}{ending}" not in summaries:
            continue
        cells = [words]
        for plan in PAPER_PLANS:
            summary = summaries[plan + ending]
            cells += [
                percent(summary["right"]),
                cell(summary, points, "against_plan", "right"),
                f"{summary['psnr']['mean']:.1f}",
                cell(summary, lambda m: decibels(m, "+"), "against_plan", "psnr"),
            ]
        rows.append(cells)
    return table(titles, rows)


def markdown(figures: Figures) -> str:
    """Return the part of docs/quality.md that is made of figures."""
    summaries = figures["methods"]
    parts = [
        header_words(figures["settings"]),
        f'{figures["pictures"]} pictures per method, the same prompts and noise for all. "Right" '
        "is the share that shows all that\nthe prompt asks for. PSNR and SSIM compare with the "
        f'picture of `{REFERENCE}`. FLOPs and time are divided into its.\n"More" is a paired '
        "difference, in points where no unit is given. Intervals are 95 % bootstrap intervals\n"
        'over prompts. "Dense multistep" are the dense steps of second order in this table whose '
        "cost is nearest.",
        method_table(summaries).strip(),
        "Right pictures by kind of prompt:",
        category_table(summaries).strip(),
    ]
    if "ablations" in figures:
        parts += [
            f"The paper's plans with one choice changed, {figures['ablations']['pictures']} "
            "pictures each:",
            ablation_table(figures["ablations"]["methods"]).strip(),
        ]
    return "\n\n".join(parts) + "\n"


def readme_methods(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Choose the methods of the README's table, the cheapest last.

    `REFERENCE`, `PLANS`, the dense multistep of equal cost, then any others; `README_ROWS` of them.
    """
    plans = [name for name in summaries if name in PLANS]
    rivals = [
        summaries[n]["against_multistep"]["method"]
        for n in plans
        if "against_multistep" in summaries[n]
    ]
    chosen = list(dict.fromkeys([REFERENCE, *plans, *rivals, *summaries]))[:README_ROWS]
    return [name for name in summaries if name in chosen]


def readme_words(name: str) -> list[str]:
    """Return the first cells of a method's row: its plan, steps, tokens, and operations.

    Operations are those of FLUX.1-dev at 1024 px, beside those of `REFERENCE`.
    """
    method, cost = parse_method(name), dense_evaluations
    plan, reference = method.plan, parse_method(REFERENCE).plan
    alike = [other for other in PLANS if PLANS[other].densities == plan.densities]
    same = [other for other in alike if PLANS[other].replace(steps=plan.steps) == plan]
    if name == DEFAULT_PLAN:
        words = f"**`{name}`**, the default"
    elif same and not method.peer:
        words = f"`{same[-1]}`" + f" with {plan.steps} steps" * (plan not in PLANS.values())
    else:
        words = f"`{name}`"
    evaluations = method.evaluations or cost(TransformerConfig(), plan, *FULL_SIZE)
    fewer = cost(TransformerConfig(), reference, *FULL_SIZE) / evaluations
    return [
        words,
        f"{plan.steps}, {'second order' if plan.solver == 'multistep' else 'Euler'}",
        ", ".join("all" if share == 1 else f"{100 * share:.0f} %" for share in plan.densities),
        f"{fewer:.1f}",
    ]


def fill_readme(text: str, figures: Figures) -> str:
    """Replace the rows of the README's table.

    Args:
        text: the README.
        figures: the figures.

    Returns:
        The new README.

    Raises:
        ValueError: the line `README_HEADER` does not occur exactly once.
    """
    check_readme(text)
    summaries = figures["methods"]
    rows = [
        [
            *readme_words(name),
            percent(summaries[name]["right"]),
            cell(summaries[name], lambda m: f"{m['mean']:.0f} dB", "psnr"),
        ]
        for name in readme_methods(summaries)
    ]
    lines = text.split("\n")
    start = lines.index(README_HEADER)
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    lines[start:end] = table(README_COLUMNS, rows).strip().split("\n")
    return "\n".join(lines)


def check_readme(text: str) -> None:
    """Raise a ValueError unless the line `README_HEADER` occurs exactly once in `text`."""
    if (count := text.split("\n").count(README_HEADER)) != 1:
        raise ValueError(f"the README has {count} lines {README_HEADER!r}; expected one")


def fill_page(text: str, figures: Figures) -> str:
    """Return docs/quality.md: its text up to `MARK`, which is kept, and the figures.

    Args:
        text: the present page; without `MARK` only `TITLE` stands above the figures.
        figures: the figures.
    """
    above = text.partition(MARK)[0] if MARK in text else TITLE + "\n"
    picture = "![Right pictures and PSNR against operations](quality.png)"
    return f"{above}{MARK}\n\n{picture}\n\n{markdown(figures)}"


def plot(summaries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot the difference to `REFERENCE` in right pictures, and the PSNR to it, over FLOPs.

    Args:
        summaries: what `summarise` returns, by name of the method.
        path: a PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families: dict[str, list[str]] = {}
    for name in summaries:
        if name != REFERENCE:
            families.setdefault(family(name), []).append(name)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    quantities = (
        ("against_reference", 100, f"right, points more than {REFERENCE}"),
        ("psnr", 1, f"PSNR to {REFERENCE}, dB"),
    )
    for axis, (key, scale, words) in zip(axes, quantities, strict=True):
        for number, (words_of_family, names) in enumerate(sorted(families.items())):
            # Shift each family by a few per cent, so that bars of equal cost do not overlap.
            x = [summaries[n]["fewer_flops"] * 1.015 ** (number - 2) for n in names]
            means = [summaries[n][key]["mean"] * scale for n in names]
            ends = [[end * scale for end in summaries[n][key]["interval"]] for n in names]
            bars = [
                [m - low for m, (low, _) in zip(means, ends, strict=True)],
                [high - m for m, (_, high) in zip(means, ends, strict=True)],
            ]
            line = "-" if words_of_family.startswith("all tokens") else ""
            axis.errorbar(
                x, means, yerr=bars, fmt="osD^vP*X"[number % 8] + line, capsize=2, alpha=0.8,
                label=words_of_family,
            )  # fmt: skip
            # Names above the lines and below the other points, so that equal ones can be read.
            offset = (4, 6) if line else (5, -12)
            for name, *place in zip(names, x, means, strict=True):
                if name in PLANS:
                    axis.annotate(name, place, xytext=offset, textcoords="offset points")
        axis.set_xscale("log")
        axis.margins(0.15, 0.1)
        shown = (summary for name, summary in summaries.items() if name != REFERENCE)
        ticks = sorted({round(summary["fewer_flops"], 1) for summary in shown})
        ticks = [tick for i, tick in enumerate(ticks) if i == 0 or tick / ticks[i - 1] > 1.12]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(f"times fewer operations than {REFERENCE}")
        axis.set_ylabel(words)
    axes[0].axhline(0, color="grey", lw=0.8)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def family(name: str) -> str:
    """Return the group of a method in the plot."""
    method = parse_method(name)
    if method.peer:
        return {"teacache": "TeaCache", "taylor": "Taylor"}[method.peer]
    tokens = "all tokens" if method.is_dense else "sparse stages"
    return f"{tokens}, {solver_words(method.plan)}"


def write_docs(figures: Figures, docs: Path, readme: Path) -> None:
    """Write quality.json, quality.md and quality.png, and fill the README's table.

    Args:
        figures: the figures.
        docs: the folder of the first three.
        readme: the README.
    """
    (docs / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")
    page = docs / "quality.md"
    page.write_text(fill_page(page.read_text() if page.exists() else "", figures))
    readme.write_text(fill_readme(readme.read_text(), figures))
    plot(figures["methods"], docs / "quality.png")
