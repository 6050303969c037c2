"""Reading lists of prompts: text and JSON lines, and what is wrong with a line."""

from __future__ import annotations

import codecs
import io
import os
import sys
import threading

import pytest

from jitjax.prompt_list import Line, read_list


def read(folder, data: str | bytes, name: str = "list.txt"):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_list(str(path))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_text(tmp_path, end, mark):
    """Numbers are those of an editor; only line ends end lines, not all that Unicode calls so."""
    lines = ["# shapes", "", "a red circle", "  ein grüner Kreis\t", "a\u2028b\x0bc", "'#' last"]
    got, problems = read(tmp_path, mark + end.join(lines).encode())
    expected = [(3, "a red circle"), (4, "ein grüner Kreis"), (5, "a\u2028b\x0bc"), (6, "'#' last")]
    assert got == [Line(number, prompt) for number, prompt in expected]
    assert problems == {}


def test_json_lines(tmp_path):
    data = """\
# seeds
{"prompt": "a star", "seed": 18446744073709551615, "size": "64x32", "plan": "dense"}

{"prompt": "#{a}", "size": 48, "seed": null}
{"prompt": ""}
"""
    expected = [
        Line(2, "a star", 2**64 - 1, (64, 32), "dense"),
        Line(4, "#{a}", None, (48, 48), None),
        Line(5, ""),
    ]
    assert read(tmp_path, data) == (expected, {})
    assert read(tmp_path, data, "list.jsonl") == (expected, {})


BROKEN = [
    ('{"prompt": "a"', "is not complete JSON: Expecting ',' delimiter: column 15"),
    ('["a"]', "contains a list; expected a JSON object"),
    ("a star", "is not complete JSON"),
    ('{"seed": 3}', "has no prompt; expected the keys prompt, seed, size, plan"),
    ('{"prompt": "a", "seeds": 3}', "has the unknown key 'seeds'; expected the keys prompt"),
    ('{"prompt": "a", "prompt": "b"}', "gives the key 'prompt' two values"),
    ('{"prompt": null}', "prompt is None; expected a string"),
    ('{"prompt": ["a"]}', "prompt is ['a']; expected a string"),
    ('{"prompt": "\\ud800"}', "prompt has half a character at position 0"),
    ('{"prompt": "a\\u0000"}', "prompt has a zero byte at position 1"),
    ('{"prompt": "a", "seed": "3"}', "seed is '3'; expected an integer"),
    ('{"prompt": "a", "seed": true}', "seed is True; expected an integer"),
    ('{"prompt": "a", "seed": 3.5}', "seed is 3.5; expected an integer"),
    ('{"prompt": "a", "seed": -1}', "seed is -1; expected 0 to 2**64 - 1"),
    ('{"prompt": "a", "seed": 18446744073709551616}', "expected 0 to 2**64 - 1"),
    ('{"prompt": "a", "size": "wide"}', "size is 'wide'; expected one side or WIDTHxHEIGHT"),
    ('{"prompt": "a", "size": [64, 32]}', "size is [64, 32]; expected a number of pixels"),
    ('{"prompt": "a", "size": true}', "size is True; expected a number of pixels"),
    ('{"prompt": "a", "plan": "9x"}', "unknown plan '9x'"),
    ('{"prompt": "a", "plan": 4}', "plan is 4; expected a string"),
    ('{"prompt": ' + "[" * 100_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_of_json_and_the_others(tmp_path, line, message):
    got, problems = read(tmp_path, f'{{"prompt": "first"}}\n{line}\n{{"prompt": "last"}}\n')
    assert got == [Line(1, "first"), Line(3, "last")]
    assert list(problems) == [2]
    assert message in problems[2]


def test_a_broken_line_of_text_and_the_others(tmp_path):
    data = b'first\ncaf\xe9\n{"prompt": "x"}\na\0b\n' + b"x" * (2**20 + 1) + b"\nlast"
    got, problems = read(tmp_path, data)
    assert got == [Line(1, "first"), Line(6, "last")]
    assert "not UTF-8 (b'\\xe9' at position 3)" in problems[2]
    assert "begins with {" in problems[3]
    assert "zero byte at position 1" in problems[4]
    assert "has 1048577 bytes; expected up to 1048576" in problems[5]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no prompts; expected one per line"),
        (codecs.BOM_UTF8, "has no prompts"),
        (b"\n \r\n# a\n", "has no prompts"),
        ("a star".encode("utf-16"), "is UTF-16 text; expected UTF-8"),
    ],
)
def test_no_list_of_prompts(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"^--prompts: '.*list\.txt' {message}"):
        read(tmp_path, data)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"--prompts is the folder '.*'; expected a file"):
        read_list(str(tmp_path))
    with pytest.raises(IsADirectoryError, match=r"--prompts is empty; expected a file"):
        read_list("")
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none\.txt'"):
        read_list(str(tmp_path / "none.txt"))


def test_standard_input_and_pipes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a star\na ring")))
    assert read_list("-") == ([Line(1, "a star"), Line(2, "a ring")], {})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="standard input has no prompts"):
        read_list("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed; expected the prompts"):
        read_list("-")
    pipe = tmp_path / "pipe"  # as in `--prompts <(grep star all.txt)`
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("a star\n"))
    writer.start()
    assert read_list(str(pipe)) == ([Line(1, "a star")], {})
    writer.join()
