"""Statistics of the quality benchmark's results.

Intervals are 95 % bootstrap intervals over prompts; the seeds of a prompt are resampled together.
Differences are paired: both methods sampled the same prompts from the same noise.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.methods import (
    PAPER_PLANS,
    REFERENCE,
    equal_cost,
    label,
    parse_method,
)
from benchmarks.quality.prompts import CATEGORIES
from benchmarks.quality.results import Rows, common_rows
from benchmarks.quality.scores import interval

Values = dict[tuple[int, int], float]  # a value per picture, by (prompt index, seed)
Mean = dict[str, Any]  # "mean", and "interval": its lower and upper end


def prompt_means(values: Mapping[tuple[int, int], float]) -> np.ndarray:
    """Average values by (prompt index, seed) over the seeds; [prompts], in order of the index."""
    grouped = defaultdict(list)
    for (number, _), value in sorted(values.items()):
        grouped[number].append(value)
    return np.array([np.mean(group) for group in grouped.values()])


def mean(values: Values) -> Mean:
    """Return the mean over prompts, and its interval."""
    means = prompt_means(values)
    return {"mean": float(means.mean()), "interval": interval(means)}


def right(method_rows: Rows) -> Values:
    """Return 1.0 for each picture that is right and 0.0 for each that is not."""
    return {task: float(row["verdict"]["right"]) for task, row in method_rows.items()}


def psnr(method_rows: Rows) -> Values:
    """Return the PSNR of each picture to that of `REFERENCE`."""
    return {task: row["psnr"] for task, row in method_rows.items()}


def difference(values: Values, others: Values) -> Mean:
    """Return the mean paired difference of two methods, and its interval."""
    return mean({task: value - others[task] for task, value in values.items()})


def summarise(name: str, method_rows: Rows, reference_rows: Rows) -> dict[str, Any]:
    """Summarise the rows of a method.

    Args:
        name: name of the method.
        method_rows: its rows.
        reference_rows: rows of `REFERENCE` for the same pictures.

    Returns:
        "right" and its difference to `REFERENCE`, "categories", costs and their ratios to
        `REFERENCE`, PSNR and SSIM; and "wrong", the number of times each attribute is wrong in
        pictures that are not right.
    """
    verdicts = right(method_rows)
    failed = [row["verdict"] for row in method_rows.values() if not row["verdict"]["right"]]
    wrong = (name for verdict in failed for name, correct in verdict.items() if not correct)
    tflops, dense_tflops = (
        float(np.mean([row["tflops"] for row in rows.values()]))
        for rows in (method_rows, reference_rows)
    )
    timed = [row for row in method_rows.values() if "seconds" in row]
    categories = {
        category: {t: v for t, v in verdicts.items() if method_rows[t]["category"] == category}
        for category in CATEGORIES
    }
    summary: dict[str, Any] = {
        "label": label(name),
        "evaluations": float(np.mean([row["evaluations"] for row in method_rows.values()])),
        "tflops": tflops,
        "fewer_flops": dense_tflops / tflops,
        "faster": float(np.median([row["dense"] / row["seconds"] for row in timed]))
        if timed
        else None,
        "right": mean(verdicts),
        "categories": {category: mean(values) for category, values in categories.items() if values},
        "wrong": Counter(name for name in wrong if name != "right"),
    }
    if name != REFERENCE:
        summary["against_reference"] = difference(verdicts, right(reference_rows))
        summary["psnr"] = mean(psnr(method_rows))
        summary["ssim"] = mean({task: row["ssim"] for task, row in method_rows.items()})
    return summary


def compare(rows: Mapping[str, Rows], name: str, other: str) -> dict[str, Any]:
    """Return what a method has more than another: "right" and "psnr", both paired."""
    return {
        "method": other,
        "right": difference(right(rows[name]), right(rows[other])),
        "psnr": difference(psnr(rows[name]), psnr(rows[other])),
    }


def multistep_rival(name: str, summaries: Mapping[str, dict]) -> str | None:
    """Return the dense steps by multistep whose cost is nearest, if there are any of equal cost.

    Args:
        name: name of a method.
        summaries: "tflops" of all methods.
    """
    tflops = summaries[name]["tflops"]
    rivals = [
        (abs(np.log(summary["tflops"] / tflops)), other)
        for other, summary in summaries.items()
        if other != name
        and parse_method(other).is_dense_multistep
        and equal_cost(summary["tflops"], tflops)
    ]
    return min(rivals)[1] if rivals else None


def figures(
    header: Mapping[str, Any],
    rows: Mapping[str, Rows],
    names: Sequence[str],
    ablations: Sequence[str],
) -> dict[str, Any]:
    """Return all figures of docs/quality.json.

    Args:
        header: header of the file of results.
        rows: rows of each method.
        names: names of the methods to compare, `REFERENCE` among them.
        ablations: names of the paper's plans and their ablations; those that have no rows are left
            out.

    Returns:
        "settings", "pictures" (the number per method), and "methods", the cheapest last: what
        `summarise` returns, and "against_multistep" (see `compare` and `multistep_rival`).
        "ablations" likewise has "pictures" and "methods", with "against_plan".

    Raises:
        ValueError: no picture was sampled by all methods.
    """
    common = common_rows(rows, list(names))
    summaries = {name: summarise(name, common[name], common[REFERENCE]) for name in names}
    summaries = dict(sorted(summaries.items(), key=lambda item: -item[1]["tflops"]))
    for name, summary in summaries.items():
        if name == REFERENCE:
            continue
        if rival := multistep_rival(name, summaries):
            summary["against_multistep"] = compare(common, name, rival)
    result = {
        "settings": dict(header),
        "pictures": len(common[REFERENCE]),
        "methods": summaries,
    }
    ablations = [name for name in ablations if name in rows]
    if set(ablations) - set(names) - set(PAPER_PLANS):
        common = common_rows(rows, [REFERENCE, *ablations])
        changed = {name: summarise(name, common[name], common[REFERENCE]) for name in ablations}
        for name, summary in changed.items():
            plan = name.partition(":")[0]
            if name != plan:
                summary["against_plan"] = compare(common, name, plan)
        result["ablations"] = {"pictures": len(common[REFERENCE]), "methods": changed}
    return result
