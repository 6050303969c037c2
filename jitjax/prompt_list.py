"""Prompts of the command line: one, or a list of them in a file.

A list is UTF-8 text with a prompt per line. If its name ends in .jsonl or its first prompt begins
with {, every line is a JSON object instead, with "prompt" and, if wanted, "seed", "size", "plan"
and "negative". Blank lines, lines that begin with #, a byte order mark and the kind of line ends do
not matter.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitjax.picture import consecutive_seeds, parse_size
from jitjax.sampler.plan import get_plan
from jitjax.validation import check, parse_json, shown

LONGEST_PROMPT = 2**20
"""Bytes of a prompt; anything longer is taken for a mistake."""
LONGEST_LIST = 2**28
"""Bytes of a list of prompts; anything longer is taken for a mistake."""
KEYS = ("prompt", "seed", "size", "plan", "negative")
"""Keys of a line in JSON."""


@dataclass(frozen=True)
class Line:
    """A line of a list; what it does not say is None.

    Attributes:
        number: its number, from 1.
        prompt: the prompt.
        seed: the seed.
        size: width and height in pixels.
        plan: name of the plan.
        negative: the negative prompt.
    """

    number: int
    prompt: str
    seed: int | None = None
    size: tuple[int, int] | None = None
    plan: str | None = None
    negative: str | None = None


def read_prompt(text: str) -> str:
    """Return the prompt, from standard input if it is "-"."""
    if text == "-":
        data = _read_input(LONGEST_PROMPT, "the prompt").removeprefix(codecs.BOM_UTF8).strip()
        if not data:
            raise ValueError("standard input is empty; expected the prompt, which - reads")
        return _decode(data, "standard input")
    return read_argument(text, "the prompt")


def read_argument(text: str, source: str) -> str:
    """Return a text of the command line; `source` says what it is, for messages."""
    data = text.encode(errors="surrogatepass")
    if "\\ud" in ascii(text):  # how Python passes bytes that are not of the locale's encoding
        with contextlib.suppress(UnicodeEncodeError):
            data = os.fsencode(text)
    return _decode(data, source)


def read_list(source: str) -> tuple[list[Line], dict[int, str]]:
    """Read a list of prompts.

    Args:
        source: a file, or "-" for standard input.

    Returns:
        The lines that have a prompt; and for each broken line its number and what is wrong with it.

    Raises:
        ValueError: there are no prompts at all, or it is no list of prompts.
        OSError: the file cannot be read.
    """
    label = "standard input" if source == "-" else repr(source)
    data = _read_input(LONGEST_LIST, "the prompts") if source == "-" else _read_file(source)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"--prompts: {label} is UTF-16 text; expected UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = {number: line.strip() for number, line in enumerate(data.split(b"\n"), start=1)}
    lines = {n: line for n, line in lines.items() if line and not line.startswith(b"#")}
    if not lines:
        raise ValueError(
            f"--prompts: {label} has no prompts; expected one per line (blank lines and lines that "
            "begin with # do not count)"
        )
    is_json = source.lower().endswith(".jsonl") or next(iter(lines.values())).startswith(b"{")
    parse: Callable[[int, str], Line] = _parse_object if is_json else _parse_text
    parsed, problems = [], {}
    for number, line in lines.items():
        try:
            if len(line) > LONGEST_PROMPT:
                raise ValueError(f"it has {len(line)} bytes; expected up to {LONGEST_PROMPT}")
            parsed.append(parse(number, _decode(line, "it")))
        except ValueError as error:
            problems[number] = str(error)
    return parsed, problems


def _parse_text(number: int, text: str) -> Line:
    if text.startswith("{"):
        raise ValueError(
            "it begins with {; expected a prompt, because the first prompt of the list is no JSON "
            '(in a list of JSON objects it can be given as {"prompt": "{..."})'
        )
    return Line(number, text)


def _parse_object(number: int, text: str) -> Line:
    try:
        raw = parse_json(text.encode(), "it")
    except ValueError as error:
        # Each line is JSON of its own, so that its parser always speaks of line 1.
        raise ValueError(str(error).replace(": line 1 column", ": column")) from None
    unknown = [key for key in raw if key not in KEYS]
    if unknown or "prompt" not in raw:
        what = f"the unknown key {shown(unknown[0])}" if unknown else "no prompt"
        raise ValueError(f"it has {what}; expected the keys {', '.join(KEYS)}")
    prompt = _parse_prompt(raw["prompt"], "prompt")
    seed = size = plan = negative = None
    if raw.get("seed") is not None:
        seed = check(raw["seed"], int, "seed")
        consecutive_seeds(seed, 1, name="seed")
    if raw.get("size") is not None:
        size = _parse_size(raw["size"])
    if raw.get("plan") is not None:
        plan = check(raw["plan"], str, "plan")
        get_plan(plan)
    if raw.get("negative") is not None:
        negative = _parse_prompt(raw["negative"], "negative")
    return Line(number, prompt, seed, size, plan, negative)


def _parse_prompt(value: Any, name: str) -> str:
    prompt = check(value, str, name)
    try:
        return _check_text(prompt.encode().decode(), name)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character at position {error.start}; expected Unicode text"
        ) from None


def _parse_size(value: Any) -> tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, str):
        raise ValueError(
            f'size is {shown(value)}; expected a number of pixels, or "WIDTHxHEIGHT", such as '
            '"512x384"'
        )
    return parse_size(value, name="size")


def _decode(data: bytes, source: str) -> str:
    try:
        return _check_text(data.decode(), source)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} has bytes that are not UTF-8 ({data[error.start : error.end]!r} at "
            f"position {error.start}); expected UTF-8 text"
        ) from None


def _check_text(text: str, source: str) -> str:
    if "\0" in text:  # as in UTF-16; PNG files cannot store it
        raise ValueError(
            f"{source} has a zero byte at position {text.index(chr(0))}; expected UTF-8 text"
        )
    return text


def _read_input(limit: int, what: str) -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError(f"standard input is closed; expected {what}, which - reads")
    stream = getattr(sys.stdin, "buffer", None)
    data = stream.read(limit + 1) if stream else sys.stdin.read().encode()
    if len(data) > limit:
        raise ValueError(f"standard input has more than {limit} bytes; expected less")
    return data


def _read_file(name: str) -> bytes:
    path = Path(name)
    if not name or path.is_dir():
        what = f"the folder {name!r}" if name else "empty"
        raise IsADirectoryError(f"--prompts is {what}; expected a file with a prompt per line")
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_LIST + 1)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--prompts: there is no file {name!r}; expected a file with a prompt per line"
        ) from None
    if len(data) > LONGEST_LIST:
        raise ValueError(f"--prompts: {name!r} has more than {LONGEST_LIST} bytes; expected less")
    return data
