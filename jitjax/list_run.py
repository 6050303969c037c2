"""Makes the pictures of a list of prompts, batch by batch, and goes on where it was stopped."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import jitjax
from jitjax import command, startup
from jitjax.checkpoint import FluxParams
from jitjax.list_folder import Wanted, is_made, locked, name_files, write
from jitjax.picture import Picture, seed_keys
from jitjax.text import tokenize

WRITE_FAILURES = 8
"""Files in a row that cannot be written, after which a run ends: its disk is full or gone."""
BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"

_running: list[_Run] = []


@dataclass
class _Run:
    """What has become of a list so far.

    Attributes:
        total: number of its pictures.
        done: number of those that are in the folder.
        failures: what has failed, by line.
    """

    total: int
    done: int
    failures: dict[int, list[str]] = field(default_factory=dict)

    def fail(self, line: int, text: str) -> None:
        self.failures.setdefault(line, []).append(text)

    def report_failures(self) -> None:
        for line, texts in sorted(self.failures.items()):
            for text in texts:
                command.note(f"jitjax: line {line}: {text}")


def run(
    pictures: Sequence[tuple[int, Picture]],
    problems: Mapping[int, str],
    *,
    folder: Path,
    batch: int,
    overwrite: bool,
    load: Callable[[], FluxParams],
) -> int:
    """Make the pictures that are not there yet.

    Args:
        pictures: each with the number of its line.
        problems: number of each line that is broken -> what is wrong with it.
        folder: where they are written; it is made if it does not exist.
        batch: most pictures to make at once.
        overwrite: replace files with the names of pictures that are other pictures.
        load: loads the parameters; called if there is something to make.

    Returns:
        The exit status: 1 if a line is broken or has failed.

    Raises:
        OSError: the folder cannot be used, another process works on it, or a file with the name of
            a picture is another one.
    """
    wanted = name_files(pictures, folder)
    with locked(folder):
        files = tqdm(wanted, "checking", unit="file", delay=2, leave=False, disable=_no_bar())
        missing = [item for item in files if not is_made(item, overwrite)]
        state = _Run(len(wanted), len(wanted) - len(missing))
        for line, text in problems.items():
            state.fail(line, text)
        if problems:
            numbers = ", ".join(map(str, sorted(problems)[:5])) + ", ..." * (len(problems) > 5)
            command.note(f"jitjax: broken lines, left out and explained at the end: {numbers}")
        command.note(
            f"jitjax: {state.total} picture{'s' * (state.total > 1)}, {state.done} of them in "
            f"{str(folder)!r} already"
        )
        if missing:
            params = load()
            _running.append(state)
            try:
                _make(params, missing, [item.picture for item in wanted], batch, overwrite, state)
            except BaseException:
                say_how_to_go_on()
                raise
            finally:
                _running.clear()
        state.report_failures()
    return 1 if state.failures else 0


def say_how_to_go_on(*, on_new_line: bool = False) -> None:
    """Say what a list that is stopped has come to, if one is running."""
    while _running:
        state = _running.pop()
        if on_new_line:
            command.note("")
        state.report_failures()
        command.note(
            f"jitjax: {state.done} of {state.total} pictures are made; the same command goes on "
            "with the others"
        )


def _make(
    params: FluxParams,
    missing: Sequence[Wanted],
    all_pictures: Sequence[Picture],
    batch: int,
    overwrite: bool,
    state: _Run,
) -> None:
    """Make pictures, those that share a program together."""
    in_list = _by_program(all_pictures, lambda picture: picture)
    with tqdm(total=len(missing), bar_format=BAR, disable=_no_bar(), dynamic_ncols=True) as bar:
        unwritten = 0
        for program, items in _by_program(missing, lambda item: item.picture).items():
            size = _batch_size(len(in_list[program]), len(items), batch)
            for start in range(0, len(items), size):
                began = time.perf_counter()
                accepted = []
                for item in items[start : start + size]:
                    if (problem := _refusal(params, item)) is None:
                        accepted.append(item)
                    else:
                        state.fail(item.line, problem)
                        bar.update(1)
                if not accepted:
                    continue
                made = _sample(params, [item.picture for item in accepted], size, bar)
                seconds = (time.perf_counter() - began) / len(accepted)
                with bar.external_write_mode():  # without the bar among the lines of a terminal
                    for item, image in zip(accepted, made, strict=True):
                        try:
                            write(item, image, overwrite)
                        except (OSError, ValueError) as error:
                            command.note_traceback(error)
                            state.fail(item.line, str(error))
                            unwritten = unwritten + 1 if isinstance(error, OSError) else 0
                            continue
                        unwritten = 0
                        state.done += 1
                        picture = item.picture
                        command.report(
                            f"{item.path}: line {item.line}, {picture.plan_name}, seed "
                            f"{picture.seed}, {seconds:.1f} s"
                        )
                if unwritten >= WRITE_FAILURES:
                    raise OSError(f"the last {unwritten} pictures could not be written")
                startup.collect_garbage()  # everything is traced


def _no_bar() -> bool:
    return sys.stderr is None


def _by_program(items: Sequence, picture_of: Callable[..., Picture]) -> dict[tuple, list]:
    """Group what one compiled program can make, in the order of the list."""
    groups: dict[tuple, list] = {}
    for item in items:
        picture = picture_of(item)
        is_guided = picture.negative is not None
        program = (picture.width, picture.height, picture.plan, is_guided)
        groups.setdefault(program, []).append(item)
    return groups


def _batch_size(in_list: int, missing: int, most: int) -> int:
    """Return the number of pictures per batch, for all batches of a size and plan.

    Each number is a program of its own to compile, so that the last batch is padded. Batches of
    equal length need the least padding. They follow from the whole list, so that a run that goes on
    finds its programs in the cache; unless most of what it computed would be padding.
    """
    batches = -(-in_list // most)
    size = -(-in_list // batches)
    return size if missing > size // 2 else missing


def _refusal(params: FluxParams, item: Wanted) -> str | None:
    """Say why a prompt cannot be encoded, None if it can; note what the encoders do not see."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tokenize(params.tokenizer, item.picture.prompt, params.config)
            if item.picture.negative is not None:
                tokenize(
                    params.tokenizer, item.picture.negative, params.config, name="negative_prompt"
                )
        except ValueError as error:
            return str(error)
    for warning in caught:
        name, _, text = str(warning.message).partition("[0]")
        name = name.replace("_", " ")
        command.note(f"jitjax: the {name} of line {item.line}{text}")
    return None


def _sample(
    params: FluxParams, pictures: Sequence[Picture], size: int, bar: tqdm
) -> list[np.ndarray]:
    """Make one batch of `size`, the last picture repeated if there are fewer."""
    padded = [*pictures, *[pictures[-1]] * (size - len(pictures))]
    first = pictures[0]
    share = len(pictures) / first.plan.steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*prompt\[\d+\] has more than")  # told by line already
        made = jitjax.sample(
            params,
            [picture.prompt for picture in padded],
            key=seed_keys([picture.seed for picture in padded]),
            height=first.height,
            width=first.width,
            plan=first.plan,
            guidance=first.guidance,
            negative_prompt=None if first.negative is None else [x.negative or "" for x in padded],
            true_guidance=first.true_guidance,
            # Sums of shares round; tqdm warns of more than all.
            progress=lambda steps: bar.update(min(share * steps, bar.total - bar.n)),
        )
    return list(np.asarray(made)[: len(pictures)])
