"""Helps of all commands, the page of the documentation, `--debug`, and shell completion."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jitjax
from jitjax import cli, info, startup
from jitjax.convert import __main__ as convert
from jitjax.memory import command as memory
from jitjax.prompt_list import read_list

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()
PARSERS = {
    "jitjax": cli.build_parser,
    "jitjax memory": lambda: memory.build_parser("jitjax memory"),
    "jitjax info": lambda: info.build_parser("jitjax info"),
    "jitjax convert": lambda: convert.build_parser("jitjax convert"),
    "python -m jitjax.convert": convert.build_parser,
}


def run(capsys, name: str, *arguments: str) -> tuple[int, str, str]:
    """Run a command by its name; return the exit status, and what it prints."""
    try:
        if name.startswith("jitjax"):
            cli.main([*name.split()[1:], *arguments])
            status = 0
        else:
            status = convert.main(arguments)
    except SystemExit as error:
        status = int(error.code or 0)
    return status, *capsys.readouterr()


def options(parser) -> set[str]:
    names = {name for action in parser._actions for name in action.option_strings}
    return {name for name in names if name.startswith("--")}


def named(text: str) -> set[str]:
    """Return the long options that a text names."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


@pytest.mark.parametrize("name", PARSERS)
def test_a_help_fits_a_screen(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    status, text, _ = run(capsys, name, "--help")
    assert status == 0
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith(f"usage: {name} ")
    assert "\nexamples:\n" in text
    assert "\nexit status: 0 done" in text


@pytest.mark.parametrize("name", PARSERS)
def test_all_options_are_in_the_longest_help(capsys, name):
    parser = PARSERS[name]()
    flag = "--help-all" if "--help-all" in options(parser) else "--help"
    status, text, _ = run(capsys, name, flag)
    assert status == 0
    assert options(parser) - named(text) == set()


def test_the_page_has_all_options_and_no_others():
    all_options = set.union(*(options(build()) for build in PARSERS.values()))
    assert all_options - named(PAGE) == set()
    assert named(PAGE) - all_options == {"--local-dir"}  # of `hf download`


def commands(text: str) -> list[list[str]]:
    """Return the arguments of each line of a text that calls `jitjax`; a comment ends a line."""
    lines = re.findall(r"^(?:\$|  ) ?(jitjax .*)$", text.replace("\\\n", ""), re.MULTILINE)
    lines = [re.sub(r" < \S+| {2,}.*", "", line) if "#" not in line else line for line in lines]
    return [shlex.split(line.split(" < ")[0], comments=True)[1:] for line in lines]


@pytest.mark.parametrize("text", [PAGE, *(build().epilog for build in PARSERS.values())][:-1])
def test_examples_are_accepted(text):
    found = commands(text)
    assert len(found) >= 3
    for arguments in found:
        name = f"jitjax {arguments[0]}"
        if name in PARSERS:
            PARSERS[name]().parse_args(arguments[1:])
        elif arguments[0] != "--print-completion":
            cli._parse(arguments)


def test_the_example_of_a_list_can_be_read(capsys, tmp_path):
    text = run(capsys, "jitjax", "--help-all")[1]
    line = next(line.strip() for line in text.splitlines() if line.startswith('  {"prompt"'))
    assert line in PAGE
    (tmp_path / "list.jsonl").write_text(line)
    lines, problems = read_list(str(tmp_path / "list.jsonl"))
    assert problems == {}
    (read,) = lines
    assert (read.prompt, read.seed, read.size) == ("a red star", 7, (512, 384))
    assert (read.plan, read.negative) == ("dense", "blue")


@pytest.mark.parametrize("name", PARSERS)
def test_debug_prints_the_traceback_above_the_line(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "jitjax": ("x", "--plan", "9x"),
        "jitjax memory": ("nowhere",),
        "jitjax info": ("nowhere",),
    }.get(name, ("nowhere", "--out", "x"))
    status, _, plain = run(capsys, name, *arguments)
    assert (status, plain.count("\n")) == (2, 1)
    status, _, text = run(capsys, name, *arguments, "--debug")
    assert status == 2
    assert text.startswith("Traceback (most recent call last):\n")
    assert text.endswith(plain)
    assert run(capsys, name, *arguments)[2] == plain  # it is over with the command


def test_debug_prints_the_traceback_of_an_import(tmp_path, monkeypatch):
    (tmp_path / "jaxtyping.py").write_text("raise ImportError('it is gone')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(startup.__file__).parents[1]}")
    done = subprocess.run(
        [sys.executable, "-m", "jitjax", "x", "--debug"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("\njitjax: error: it is gone\n")


@pytest.mark.slow
def test_convert_is_a_subcommand(capsys, small, tmp_path):
    folder = tmp_path / "checkpoint"
    jitjax.save(small, folder)
    outputs = []
    for name in ("jitjax convert", "python -m jitjax.convert"):
        out = tmp_path / name.replace(" ", "-")
        status, text, _ = run(capsys, name, str(folder), "--to-diffusers", "--out", str(out))
        assert (status, text) == (0, f"{out}\n")
        outputs.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert outputs[0] == outputs[1]
    assert any(path.suffix == ".safetensors" for path in outputs[0])


@pytest.mark.parametrize(
    ("name", "prefix"), [("jitjax convert", "jitjax convert: "), ("python -m jitjax.convert", "")]
)
def test_each_form_of_convert_has_its_name_and_errors(capsys, tmp_path, name, prefix):
    (tmp_path / "jitjax.json").write_text("{}")
    status, _, error = run(capsys, name, "--verify", str(tmp_path))
    assert status == 1
    assert re.search(f"^{prefix}error: ", error, re.MULTILINE)
    status, _, error = run(capsys, name, "--nothing")
    assert status == 2
    assert error == f"{prefix}error: unrecognized arguments: --nothing; see {name} --help\n"


def test_python_m_jitjax_convert_does_not_import_the_command_line():
    code = (
        "import sys; from jitjax.convert import __main__\n"
        "late = ('jitjax.cli', 'jitjax.viz', 'PIL', 'flax', 'diffrax', 'orbax', 'shtab')\n"
        "print([name for name in late if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_completion_of_options_plans_and_files(capsys, tmp_path):
    pytest.importorskip("shtab")
    status, script, _ = run(capsys, "jitjax", "--print-completion", "bash")
    assert status == 0
    (tmp_path / "script").write_text(script)
    (tmp_path / "cat.png").touch()
    subprocess.run(["bash", "-n", "script"], check=True, cwd=tmp_path)
    ask = """source ./script
    try() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMPREPLY=()
            _shtab_jitjax jitjax "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[*]}"; }
    try jitjax --pl; try jitjax x --plan m; try jitjax x --image c; try jitjax inf"""
    done = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["--plan", "multistep-12 multistep-7", "cat.png", "info"]
    assert "--plan" in run(capsys, "jitjax", "--print-completion", "zsh")[1]


def test_completion_without_shtab_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, error = run(capsys, "jitjax", "--print-completion", "bash")
    assert (status, out) == (2, "")
    assert 'pip install "jitjax[completion]"' in error
