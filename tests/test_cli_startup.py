"""The first moments of a command: what is loaded, what XLA may print, memory, devices."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jitjax import command, startup
from jitjax.convert import __main__ as convert
from jitjax.loading import BUNDLED

SMALL = 600 * 2**20


def run(*arguments: str, stand_in: str, folder: Path, **options) -> subprocess.CompletedProcess:
    """Run Python with a module that stands in for `jax`, so that it takes no second."""
    (folder / "jax.py").write_text(stand_in)
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths} | options.pop("environment", {})
    for name in [name for name, value in environment.items() if value is None]:
        del environment[name]
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, **options
    )


def test_signals_are_handled_before_anything_is_loaded():
    """Until then Ctrl-C gives a traceback; `signal` alone would double that time."""
    code = (
        "import os, sys; before = set(sys.modules)\n"
        f"sys.path.insert(0, {str(Path(startup.__file__).parent)!r}); import startup\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == "['startup']\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "before", "expected"),
    [
        (("-m", "jitjax", "x"), None, "3"),
        (("-m", "jitjax.convert", "x"), None, "3"),
        (("-m", "jitjax", "x"), "0", "0"),  # the user's choice
        (("-c", "import jitjax"), None, None),  # a library sets nothing
    ],
)
def test_xla_is_quiet_in_the_commands_alone(tmp_path, arguments, before, expected):
    name = "TF_CPP_MIN_LOG_LEVEL"
    stand_in = f"import os; print(os.environ.get({name!r}), flush=True); os._exit(0)"
    done = run(*arguments, stand_in=stand_in, folder=tmp_path, environment={name: before})
    assert done.stdout == f"{expected}\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-m", "jitjax", "x"), "False"),
        (("-m", "jitjax.convert", "x"), "False"),
        (("-c", "import jitjax"), "True"),  # a library changes nothing
    ],
)
def test_only_the_commands_put_off_the_search_for_garbage(tmp_path, arguments, expected):
    stand_in = "import gc, os; print(gc.isenabled(), flush=True); os._exit(0)"
    assert run(*arguments, stand_in=stand_in, folder=tmp_path).stdout == f"{expected}\n"


def test_garbage_is_searched_for_again(monkeypatch):
    monkeypatch.setattr(startup, "garbage_waits", True)
    gc.disable()
    try:
        startup.collect_garbage()
        assert gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("is_command", [False, True])
def test_no_search_for_garbage_when_a_command_ends(monkeypatch, is_command):
    monkeypatch.setattr(startup, "garbage_waits", is_command)
    gc.unfreeze()
    try:
        startup.before_exit()
        assert (gc.get_freeze_count() > 0) == is_command
    finally:
        gc.unfreeze()


def test_too_little_address_space_while_importing(tmp_path):
    """As with `ulimit -v 600000`."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (SMALL, SMALL))  # noqa: E731
    for error in ("ImportError('failed to map segment')", "MemoryError()"):
        done = run(
            "-m", "jitjax", "x", stand_in=f"raise {error}", folder=tmp_path, preexec_fn=limit
        )
        assert done.returncode == 2
        assert done.stderr == (
            "jitjax: error: the address space is limited to 0.63 GB (ulimit -v); expected 2 GB or "
            "more, which JAX needs to start\n"
        )


def test_too_little_address_space_for_a_device(monkeypatch):
    """JAX would abort or crash; enough, and no limit, are no problem."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (SMALL, -1))
    with pytest.raises(OSError, match=r"limited to 0\.63 GB \(ulimit -v\)"):
        command.check_device()
    for enough in (2**31, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=enough: (limit, -1))
        command.check_device()


def test_a_backend_that_fails_without_a_word(monkeypatch):
    """As jax 0.10 does with JAX_PLATFORMS=cuda and no plug-in for it."""

    def devices() -> None:
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    expected = r"no device \(JAX_PLATFORMS is 'cuda'\): it is not installed, or finds none"
    with pytest.raises(OSError, match=expected):
        command.check_device()


@pytest.mark.parametrize("mode", ["", "--to-diffusers", "--verify"])
def test_a_conversion_without_a_device_is_one_line(tmp_path, monkeypatch, capsys, mode):
    def no_device() -> None:
        raise RuntimeError("Unable to initialize backend 'nonsense'")

    monkeypatch.setattr(jax, "devices", no_device)
    source, out = str(BUNDLED / "tiny"), str(tmp_path / "out")
    arguments = {"--to-diffusers": [mode, "tiny", "--out", out], "--verify": [mode, source]}
    assert convert.main(arguments.get(mode, [source, "--out", out])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: JAX has no device")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
