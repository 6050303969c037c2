"""Turns the lines of `benchmarks.quality` into figures: a JSON file, a Markdown table, a plot.

    python -m benchmarks.report quality.jsonl
    python -m benchmarks.report a.jsonl b.jsonl --json q.json --markdown q.md --plot q.png

Intervals are 95 % bootstrap intervals over prompts (all seeds of a prompt are drawn together);
"against dense" is the paired difference to the 50-step dense solve of the same prompts and noise.
The second table has the paired differences of JiT's plans to what costs about the same.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.methods import REFERENCE
from benchmarks.quality.prompts import CATEGORIES
from benchmarks.quality.scores import interval

METRICS = ("psnr", "ssim", "features")
ABOUT = 0.15  # of equal operations: the greatest difference, in natural logarithms
Lines = dict[tuple[int, int], dict]  # of one method, by (prompt, seed)


def read(path: Path) -> tuple[dict, dict[str, Lines]]:
    """Settings, and per method its lines by (prompt, seed); a line cut short is left out.

    Raises:
        ValueError: there is not one whole line.
    """
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    if not whole:
        raise ValueError(f"{path} has no whole line; expected what benchmarks.quality writes")
    head, *rest = (json.loads(line) for line in whole)
    found: dict[str, Lines] = defaultdict(dict)
    for line in rest:
        found[line["method"]][line["prompt"], line["seed"]] = line
    return head, found


def merged(files: Sequence[Path]) -> tuple[dict, dict[str, Lines]]:
    """As `read`, of several files: settings are those of the first.

    Only pictures that every method has drawn are kept, so that all are compared on the same.

    Raises:
        ValueError: a file has no whole line, or was made by other weights, or in another way; or
            no picture was drawn by all methods.
    """
    (settings, lines), *others = (read(path) for path in files)
    for path, (head, more) in zip(files[1:], others, strict=True):
        for name in ("split", "side", "guidance", "weights"):
            if head.get(name) != settings.get(name):
                raise ValueError(
                    f"{path} has {name} {head.get(name)!r}; expected {settings.get(name)!r}"
                )
        for method, own in more.items():
            lines[method] |= own
    common = set.intersection(*(set(own) for own in lines.values()))
    if REFERENCE not in lines or not common:
        raise ValueError(f"no picture was drawn by all of {', '.join(lines)} and {REFERENCE}")
    return settings, {
        method: {task: line for task, line in own.items() if task in common}
        for method, own in lines.items()
    }


def per_prompt(values: dict[tuple[int, int], float]) -> np.ndarray:
    """Means over the seeds of each prompt, prompts in order."""
    grouped = defaultdict(list)
    for (number, _), value in sorted(values.items()):
        grouped[number].append(value)
    return np.array([np.mean(group) for group in grouped.values()])


def correct(own: Lines) -> dict[tuple[int, int], float]:
    """1 or 0 per picture."""
    return {task: float(line["verdict"]["right"]) for task, line in own.items()}


def paired(own: Lines, other: Lines) -> tuple[float, tuple[float, float]]:
    """Mean difference in `right` to another method on the same pictures, and its interval."""
    base = correct(other)
    values = per_prompt({task: value - base[task] for task, value in correct(own).items()})
    return float(values.mean()), interval(values)


def summary(lines: dict[str, Lines]) -> dict[str, dict]:
    """Figures per method; "wrong" is in how many of the pictures that fail each attribute is."""
    found = {}
    cost = next(iter(lines[REFERENCE].values()))["tflops"]
    for name, own in lines.items():
        verdicts = correct(own)
        row = {"pictures": len(own), "right": float(per_prompt(verdicts).mean())}
        row["interval"] = interval(per_prompt(verdicts))
        row["against_dense"], row["against_dense_interval"] = paired(own, lines[REFERENCE])
        failed = [line["verdict"] for line in own.values() if not line["verdict"]["right"]]
        wrong = (name for verdict in failed for name, good in verdict.items() if not good)
        row["wrong"] = Counter(name for name in wrong if name != "right")
        row["categories"] = {}
        for category in CATEGORIES:
            part = {t: v for t, v in verdicts.items() if own[t]["category"] == category}
            if part:
                values = per_prompt(part)
                row["categories"][category] = {
                    "right": float(values.mean()),
                    "interval": interval(values),
                }
        for metric in METRICS if name != REFERENCE else ():
            values = per_prompt({task: line[metric] for task, line in own.items()})
            row[metric] = {"mean": float(values.mean()), "interval": interval(values)}
        tflops = float(np.mean([line["tflops"] for line in own.values()]))
        timed = [line for line in own.values() if "seconds" in line]
        row |= {
            "evaluations": float(np.mean([line["evaluations"] for line in own.values()])),
            "tflops": tflops,
            "fewer_flops": cost / tflops,
            "faster": float(np.median([line["dense"] / line["seconds"] for line in timed]))
            if timed
            else None,
        }
        found[name] = row
    return found


def is_plan(name: str) -> bool:
    """Whether a method is one of JiT's named plans, with nothing of it changed."""
    return ":" not in name and (name[:1].isdigit() or name.startswith("tuned"))


def matched(lines: dict[str, Lines], rows: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """JiT's plans against what costs about the same.

    Args:
        lines: per method its lines.
        rows: what `summary` makes of them.

    Returns:
        per plan and other method of operations within `ABOUT`, "difference" (what the plan has
        more in `right`, -1 to 1) and its "interval".
    """
    found: dict[str, dict[str, dict]] = {}
    for plan in filter(is_plan, lines):
        found[plan] = {}
        for other in sorted(set(lines) - {plan}):
            if abs(np.log(rows[other]["tflops"] / rows[plan]["tflops"])) < ABOUT:
                mean, around = paired(lines[plan], lines[other])
                found[plan][other] = {"difference": mean, "interval": around}
    return found


def cell(difference: float, around: tuple[float, float]) -> str:
    """A difference and its interval, in per cent."""
    return f"{difference:+.1%} ({around[0]:+.0%} to {around[1]:+.0%})"


def markdown(rows: dict[str, dict], settings: dict) -> str:
    """What was run, and the table, cheapest methods last."""
    categories = [c for c in CATEGORIES if c in rows[REFERENCE]["categories"]]
    titles = ["method", "evaluations", "FLOPs ÷", "time ÷", "right", "against dense", *categories]
    titles += ["PSNR dB", "SSIM", "features"]
    out = [f"{name}: `{value}`  " for name, value in settings.items()] + [""]
    out += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["tflops"]):
        cells = [
            f"`{name}`",
            f"{row['evaluations']:.3g}",
            f"{row['fewer_flops']:.2f}",
            f"{row['faster']:.2f}" if row["faster"] else "",
            f"{row['right']:.1%} ({row['interval'][0]:.0%} to {row['interval'][1]:.0%})",
            "" if name == REFERENCE else cell(row["against_dense"], row["against_dense_interval"]),
            *(f"{row['categories'][c]['right']:.0%}" for c in categories),
        ]
        for metric, digits in zip(METRICS, (1, 3, 4), strict=True):
            cells.append(f"{row[metric]['mean']:.{digits}f}" if metric in row else "")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def markdown_matched(found: dict[str, dict[str, dict]]) -> str:
    """A column per JiT plan, a row per method that costs about as much as one of them."""
    out = [
        "| what the plan has more in `right` than | " + " | ".join(f"`{p}`" for p in found) + " |"
    ]
    out += ["|---" * (len(found) + 1) + "|"]
    for rival in dict.fromkeys(name for rivals in found.values() for name in rivals):
        cells = [f"`{rival}`"]
        for rivals in found.values():
            one = rivals.get(rival)
            cells.append(cell(one["difference"], one["interval"]) if one else "")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


FAMILIES = {  # in the plot: which methods, by name, and their marker
    "dense, FLUX's sigmas": (lambda n: n.startswith("dense") and not n.endswith("beta"), "o-"),
    "dense, Beta sigmas": (lambda n: n.startswith("dense") and n.endswith("beta"), "s-"),
    "JiT": (is_plan, "D"),
    "TeaCache": (lambda n: n.startswith("teacache"), "^"),
    "Taylor": (lambda n: n.startswith("taylor"), "v"),
}


def spread(rows: Sequence[dict], value: str, around: str) -> np.ndarray:
    """How far each row's interval reaches below and above its value: [2, rows]."""
    return np.array(
        [[r[value] - r[around][0] for r in rows], [r[around][1] - r[value] for r in rows]]
    )


def plot(rows: dict[str, dict], path: Path) -> None:
    """Share of right pictures against operations; and every method's paired difference to dense."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = sorted((n for n in rows if n != REFERENCE), key=lambda n: (rows[n]["tflops"], n))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 2 + 0.16 * len(others)), width_ratios=(3, 2), layout="constrained"
    )
    for number, (label, (belongs, style)) in enumerate(FAMILIES.items()):
        names = [n for n in (*others, REFERENCE) if belongs(n)]
        own = [rows[n] for n in names]
        # A few per cent aside, so that the bars of matched methods do not hide each other.
        x = [row["tflops"] * 1.02 ** (number - 2) for row in own]
        y, bars = [row["right"] for row in own], spread(own, "right", "interval")
        if own:
            left.errorbar(x, y, yerr=bars, label=label, fmt=style, capsize=2, alpha=0.8)
        if label == "JiT":
            for at in zip(names, x, y, strict=True):
                left.annotate(at[0], at[1:], xytext=(-4, 4), textcoords="offset points", ha="right")
    left.set_xscale("log")
    left.set_xlabel("TFLOP per picture (network)")
    left.set_ylabel("share of pictures that show what was asked for")
    left.legend(loc="upper center", ncols=2, fontsize=8)
    left.margins(y=0.2)
    own = [rows[n] for n in others]
    bars = spread(own, "against_dense", "against_dense_interval")
    difference = [row["against_dense"] for row in own]
    right.errorbar(difference, range(len(own)), xerr=bars, fmt="k.", capsize=2)
    right.axvline(0, color="grey", lw=0.8)
    right.set_yticks(range(len(own)), others, fontsize=7)
    right.set_xlabel(f"paired difference to {REFERENCE}")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the table; write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path, nargs="+", help="what benchmarks.quality wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    args = parser.parse_args()
    try:
        settings, lines = merged(args.lines)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = summary(lines)
    equal = matched(lines, rows)
    settings["pictures"] = rows[REFERENCE]["pictures"]
    table = markdown(rows, settings)
    if any(equal.values()):
        table += "\n" + markdown_matched(equal)
    print(table)
    if args.json:
        text = json.dumps({"settings": settings, "methods": rows, "matched": equal}, indent=1)
        args.json.write_text(text + "\n")
    if args.markdown:
        args.markdown.write_text(table)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
