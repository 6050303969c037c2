"""The file of results of the quality benchmark: JSON lines, a header and a row per picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.prompts import Prompt

Task = tuple[int, Prompt, int]  # (index of the prompt, prompt, seed)
Rows = dict[tuple[int, int], dict]  # rows of one method by (prompt index, seed)


def read_rows(path: Path) -> tuple[dict, dict[str, Rows]]:
    """Read a file of results; an incomplete last line is ignored.

    Returns:
        The header, and the rows of each method.

    Raises:
        ValueError: the file has no complete line.
        OSError: it cannot be read.
    """
    text = path.read_text()
    complete_lines = text[: text.rfind("\n") + 1].splitlines()
    if not complete_lines:
        raise ValueError(f"{path} has no complete line; expected a file by benchmarks.quality")
    header, *row_lines = (json.loads(row) for row in complete_lines)
    results: dict[str, Rows] = defaultdict(dict)
    for row in row_lines:
        results[row["method"]][row["prompt"], row["seed"]] = row
    return header, dict(results)


def open_results(
    path: Path,
    settings: Mapping[str, object],
    plans: Mapping[str, str],
    provenance: Mapping[str, str],
) -> dict[str, Rows]:
    """Create a file of results, or prepare an existing one to be resumed.

    The first line of the file is a header with `settings`, `plans` and `provenance`. In an existing
    file an incomplete last line is removed; new plans and a new "command" are added to the
    header's.

    Args:
        path: the file.
        settings: what must be equal for all rows of a file.
        plans: what each name of a method stands for; a name must not change its meaning.
        provenance: "command" and other facts, recorded once.

    Returns:
        The rows of each method.

    Raises:
        ValueError: the file was made with other settings or plans, or has no complete line.
        OSError: it cannot be read or written.
    """
    if not path.exists():
        header = {**settings, "plans": dict(plans), **provenance}
        path.write_text(json.dumps(header) + "\n")
        return {}
    header, rows_by_method = read_rows(path)
    recorded = {name: header.get(name) for name in settings}
    if recorded != settings:
        raise ValueError(f"{path} was made with {recorded}; expected {dict(settings)}")
    for name, plan in plans.items():
        if header["plans"].setdefault(name, plan) != plan:
            raise ValueError(f"{path} has {name!r} as {header['plans'][name]}; expected {plan}")
    if provenance["command"] not in header["command"].split(" && "):
        header["command"] += " && " + provenance["command"]
    text = path.read_text()
    rows_text = text[text.index("\n") + 1 : text.rfind("\n") + 1]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(header) + "\n" + rows_text)
    temporary.replace(path)
    return rows_by_method


def unfinished(
    wanted: Mapping[str, list[Task]], rows: Mapping[str, Rows], batch: int
) -> list[tuple[list[str], list[Task]]]:
    """Return the work that is left: batches of tasks, each with the methods that they lack.

    All tasks of a batch lack the same methods, so that none is sampled twice.

    Args:
        wanted: the tasks of each method.
        rows: the rows that exist.
        batch: the largest number of tasks in a batch.
    """
    missing: dict[tuple[int, int], list[str]] = defaultdict(list)
    tasks: dict[tuple[int, int], Task] = {}
    for name, method_tasks in wanted.items():
        for task in method_tasks:
            key = task[0], task[2]
            tasks[key] = task
            if key not in rows.get(name, {}):
                missing[key].append(name)
    grouped: dict[tuple[str, ...], list[Task]] = defaultdict(list)
    for key, names in sorted(missing.items()):
        grouped[tuple(names)].append(tasks[key])
    return [
        (list(names), group[start : start + batch])
        for names, group in grouped.items()
        for start in range(0, len(group), batch)
    ]


def common_rows(rows: Mapping[str, Rows], names: list[str]) -> dict[str, Rows]:
    """Return the rows of some methods, only of the pictures that all of them have sampled.

    Raises:
        ValueError: there is no such picture.
    """
    tasks = set.intersection(*(set(rows.get(name, {})) for name in names))
    if not tasks:
        raise ValueError(f"no picture was sampled by all of {', '.join(names)}")
    return {name: {task: rows[name][task] for task in sorted(tasks)} for name in names}


def header_words(header: Mapping[str, Any]) -> str:
    """Describe in a paragraph how a file was made."""
    return (
        f"Made on {header['date']} on {header['device']} with jax {header['jax']} by\n"
        f"`{header['command']}`: {header['side']} px, guidance {header['guidance']}, the "
        f"{header['split']} split, checkpoint `{header['checkpoint']}` (transformer's weights "
        f"`{header['weights']}`)."
    )
