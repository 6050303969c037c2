"""Summarises results of `benchmarks.quality` as a JSON file, Markdown tables and a plot.

    python -m benchmarks.report quality.jsonl
    python -m benchmarks.report a.jsonl b.jsonl --json q.json --markdown q.md --plot q.png

Intervals are 95 % bootstrap intervals over prompts; the seeds of a prompt are resampled together.
"against dense" is the paired difference in right images to the 50-step dense solve of the same
prompts and noise. The second table has the paired differences between JiT's plans and methods of
about the same cost.
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
COST_TOLERANCE = 0.15  # methods match in cost if the logarithms of their FLOPs differ by less
Rows = dict[tuple[int, int], dict]  # rows of one method by (prompt index, seed)


def read_rows(path: Path) -> tuple[dict, dict[str, Rows]]:
    """Read a file that `benchmarks.quality` wrote; an incomplete last line is ignored.

    Returns:
        The header, and the rows of each method.

    Raises:
        ValueError: the file has no complete line.
    """
    text = path.read_text()
    complete_lines = text[: text.rfind("\n") + 1].splitlines()
    if not complete_lines:
        raise ValueError(f"{path} has no complete line; expected a file by benchmarks.quality")
    header, *row_lines = (json.loads(row) for row in complete_lines)
    results: dict[str, Rows] = defaultdict(dict)
    for row in row_lines:
        results[row["method"]][row["prompt"], row["seed"]] = row
    return header, results


def merge(files: Sequence[Path]) -> tuple[dict, dict[str, Rows]]:
    """Read several files as one. Only images that every method has sampled are kept.

    Args:
        files: the files, made with the same weights and settings.

    Returns:
        The header of the first file, and the rows of each method.

    Raises:
        ValueError: a file has no complete line or differs in weights or settings; or there is no
            image that all methods, `REFERENCE` among them, have sampled.
    """
    (settings, rows), *others = (read_rows(path) for path in files)
    for path, (header, more_rows) in zip(files[1:], others, strict=True):
        for name in ("split", "side", "guidance", "weights"):
            if header.get(name) != settings.get(name):
                raise ValueError(
                    f"{path} has {name} {header.get(name)!r}; expected {settings.get(name)!r}"
                )
        for method, method_rows in more_rows.items():
            rows[method] |= method_rows
    common = set.intersection(*(set(method_rows) for method_rows in rows.values()))
    if REFERENCE not in rows or not common:
        raise ValueError(f"no image was sampled by all of {', '.join(rows)} and {REFERENCE}")
    return settings, {
        method: {task: row for task, row in method_rows.items() if task in common}
        for method, method_rows in rows.items()
    }


def prompt_means(values: dict[tuple[int, int], float]) -> np.ndarray:
    """Average values by (prompt index, seed) over the seeds; [prompts], in order of the index."""
    grouped = defaultdict(list)
    for (number, _), value in sorted(values.items()):
        grouped[number].append(value)
    return np.array([np.mean(group) for group in grouped.values()])


def correctness(method_rows: Rows) -> dict[tuple[int, int], float]:
    """Return 1.0 for each image that is right and 0.0 for each that is not."""
    return {task: float(row["verdict"]["right"]) for task, row in method_rows.items()}


def paired_difference(method_rows: Rows, other: Rows) -> tuple[float, tuple[float, float]]:
    """Return the mean difference in right images to another method, and its interval."""
    base = correctness(other)
    values = prompt_means(
        {task: value - base[task] for task, value in correctness(method_rows).items()}
    )
    return float(values.mean()), interval(values)


def summarise(rows: dict[str, Rows]) -> dict[str, dict]:
    """Summarise the rows of each method.

    Args:
        rows: rows of each method, `REFERENCE` among them.

    Returns:
        By name of the method: shares of right images overall and by category, mean metrics, each
        with its interval; costs, and their ratios to `REFERENCE`; and "wrong", the number of times
        each attribute is wrong in images that are not right.
    """
    results = {}
    dense_tflops = next(iter(rows[REFERENCE].values()))["tflops"]
    for name, method_rows in rows.items():
        verdicts = correctness(method_rows)
        summary = {"pictures": len(method_rows), "right": float(prompt_means(verdicts).mean())}
        summary["interval"] = interval(prompt_means(verdicts))
        summary["against_dense"], summary["against_dense_interval"] = paired_difference(
            method_rows, rows[REFERENCE]
        )
        failed = [row["verdict"] for row in method_rows.values() if not row["verdict"]["right"]]
        wrong = (name for verdict in failed for name, correct in verdict.items() if not correct)
        summary["wrong"] = Counter(name for name in wrong if name != "right")
        summary["categories"] = {}
        for category in CATEGORIES:
            category_verdicts = {
                t: v for t, v in verdicts.items() if method_rows[t]["category"] == category
            }
            if category_verdicts:
                values = prompt_means(category_verdicts)
                summary["categories"][category] = {
                    "right": float(values.mean()),
                    "interval": interval(values),
                }
        for metric in METRICS if name != REFERENCE else ():
            values = prompt_means({task: row[metric] for task, row in method_rows.items()})
            summary[metric] = {"mean": float(values.mean()), "interval": interval(values)}
        tflops = float(np.mean([row["tflops"] for row in method_rows.values()]))
        timed = [row for row in method_rows.values() if "seconds" in row]
        summary |= {
            "evaluations": float(np.mean([row["evaluations"] for row in method_rows.values()])),
            "tflops": tflops,
            "fewer_flops": dense_tflops / tflops,
            "faster": float(np.median([row["dense"] / row["seconds"] for row in timed]))
            if timed
            else None,
        }
        results[name] = summary
    return results


def is_named_plan(name: str) -> bool:
    """Whether a method is one of JiT's named plans, without changes."""
    return ":" not in name and (name[:1].isdigit() or name.startswith("tuned"))


def match_methods(rows: dict[str, Rows], summaries: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Compare each of JiT's plans with the methods of about the same cost.

    Args:
        rows: rows of each method.
        summaries: what `summarise` returns for them.

    Returns:
        By plan and other method: "difference", the share of right images of the plan minus that of
        the other method (-1 to 1), and its "interval".
    """
    results: dict[str, dict[str, dict]] = {}
    for plan in filter(is_named_plan, rows):
        results[plan] = {}
        for other in sorted(set(rows) - {plan}):
            if abs(np.log(summaries[other]["tflops"] / summaries[plan]["tflops"])) < COST_TOLERANCE:
                mean, bounds = paired_difference(rows[plan], rows[other])
                results[plan][other] = {"difference": mean, "interval": bounds}
    return results


def format_difference(difference: float, bounds: tuple[float, float]) -> str:
    """Format a difference and its interval in per cent."""
    return f"{difference:+.1%} ({bounds[0]:+.0%} to {bounds[1]:+.0%})"


def markdown(summaries: dict[str, dict], settings: dict) -> str:
    """Format the settings and a table of all methods, the cheapest last."""
    categories = [c for c in CATEGORIES if c in summaries[REFERENCE]["categories"]]
    titles = ["method", "evaluations", "FLOPs ÷", "time ÷", "right", "against dense", *categories]
    titles += ["PSNR dB", "SSIM", "features"]
    out = [f"{name}: `{value}`  " for name, value in settings.items()] + [""]
    out += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, summary in sorted(summaries.items(), key=lambda item: -item[1]["tflops"]):
        cells = [
            f"`{name}`",
            f"{summary['evaluations']:.3g}",
            f"{summary['fewer_flops']:.2f}",
            f"{summary['faster']:.2f}" if summary["faster"] else "",
            f"{summary['right']:.1%} "
            f"({summary['interval'][0]:.0%} to {summary['interval'][1]:.0%})",
            ""
            if name == REFERENCE
            else format_difference(summary["against_dense"], summary["against_dense_interval"]),
            *(f"{summary['categories'][c]['right']:.0%}" for c in categories),
        ]
        for metric, digits in zip(METRICS, (1, 3, 4), strict=True):
            cells.append(f"{summary[metric]['mean']:.{digits}f}" if metric in summary else "")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def markdown_matched(results: dict[str, dict[str, dict]]) -> str:
    """Format what `match_methods` returns: a column per plan, a row per other method."""
    out = [
        "| what the plan has more in `right` than | " + " | ".join(f"`{p}`" for p in results) + " |"
    ]
    out += ["|---" * (len(results) + 1) + "|"]
    for rival in dict.fromkeys(name for rivals in results.values() for name in rivals):
        cells = [f"`{rival}`"]
        for rivals in results.values():
            entry = rivals.get(rival)
            cells.append(format_difference(entry["difference"], entry["interval"]) if entry else "")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


FAMILIES = {  # label in the plot: (whether a method belongs to it, format of its markers)
    "dense, FLUX's sigmas": (lambda n: n.startswith("dense") and not n.endswith("beta"), "o-"),
    "dense, Beta sigmas": (lambda n: n.startswith("dense") and n.endswith("beta"), "s-"),
    "JiT": (is_named_plan, "D"),
    "TeaCache": (lambda n: n.startswith("teacache"), "^"),
    "Taylor": (lambda n: n.startswith("taylor"), "v"),
}


def error_bars(summaries: Sequence[dict], value: str, bounds: str) -> np.ndarray:
    """Return the distances from the values to the ends of their intervals: [2, summaries].

    `value` and `bounds` are the keys of the value and of its interval.
    """
    return np.array(
        [[r[value] - r[bounds][0] for r in summaries], [r[bounds][1] - r[value] for r in summaries]]
    )


def plot(summaries: dict[str, dict], path: Path) -> None:
    """Plot right images over FLOPs, and the paired differences to `REFERENCE`; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = sorted(
        (n for n in summaries if n != REFERENCE), key=lambda n: (summaries[n]["tflops"], n)
    )
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 2 + 0.16 * len(others)), width_ratios=(3, 2), layout="constrained"
    )
    for number, (label, (is_member, style)) in enumerate(FAMILIES.items()):
        names = [n for n in (*others, REFERENCE) if is_member(n)]
        family_rows = [summaries[n] for n in names]
        # Shift each family by a few per cent, so that bars of equal cost do not overlap.
        x = [summary["tflops"] * 1.02 ** (number - 2) for summary in family_rows]
        y, bars = (
            [summary["right"] for summary in family_rows],
            error_bars(family_rows, "right", "interval"),
        )
        if family_rows:
            left.errorbar(x, y, yerr=bars, label=label, fmt=style, capsize=2, alpha=0.8)
        if label == "JiT":
            for point in zip(names, x, y, strict=True):
                left.annotate(
                    point[0], point[1:], xytext=(-4, 4), textcoords="offset points", ha="right"
                )
    left.set_xscale("log")
    left.set_xlabel("TFLOP per picture (network)")
    left.set_ylabel("share of pictures that show what was asked for")
    left.legend(loc="upper center", ncols=2, fontsize=8)
    left.margins(y=0.2)
    family_rows = [summaries[n] for n in others]
    bars = error_bars(family_rows, "against_dense", "against_dense_interval")
    difference = [summary["against_dense"] for summary in family_rows]
    right.errorbar(difference, range(len(family_rows)), xerr=bars, fmt="k.", capsize=2)
    right.axvline(0, color="grey", lw=0.8)
    right.set_yticks(range(len(family_rows)), others, fontsize=7)
    right.set_xlabel(f"paired difference to {REFERENCE}")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the tables; write the requested files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path, nargs="+", help="files by benchmarks.quality")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    args = parser.parse_args()
    try:
        settings, rows = merge(args.lines)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    summaries = summarise(rows)
    matches = match_methods(rows, summaries)
    settings["pictures"] = summaries[REFERENCE]["pictures"]
    table = markdown(summaries, settings)
    if any(matches.values()):
        table += "\n" + markdown_matched(matches)
    print(table)
    if args.json:
        text = json.dumps(
            {"settings": settings, "methods": summaries, "matched": matches}, indent=1
        )
        args.json.write_text(text + "\n")
    if args.markdown:
        args.markdown.write_text(table)
    if args.plot:
        plot(summaries, args.plot)


if __name__ == "__main__":
    main()
