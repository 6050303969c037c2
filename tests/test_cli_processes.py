"""The commands as processes: signals, streams, and errors that the machine causes.

Where the picture does not matter, it is a flat one of `flat_program.py`.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitjax.loading import BUNDLED

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

QUICK = ("a circle", "--size", "32", "--plan", "dense", "--steps", "1")
COMMAND = [sys.executable, "-m", "jitjax"]
FLAT_PROGRAM = Path(__file__).with_name("flat_program.py")
FLAT = [sys.executable, str(FLAT_PROGRAM)]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment of the commands, with the compilation cache that all tests share."""
    environment = os.environ | {"PYTHONUTF8": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # with it no text waits for the end of a command
    return environment


def run(*arguments, environment, command=COMMAND, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment,
        errors="surrogateescape", **options,
    )  # fmt: skip


def shell(
    script: str, *arguments, environment, command=COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run a shell script, in which "$@" is the command with its arguments."""
    return run(*arguments, environment=environment, command=["bash", "-c", script, "-", *command])


def start(command: list[str], environment: dict[str, str], **options) -> subprocess.Popen[str]:
    """Start a command with the signals of a terminal, whatever those of this process are."""

    def default_signals() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=default_signals, **options,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


FLAT_PICTURES = f"""
import sys
sys.path.insert(0, {str(FLAT_PROGRAM.parent)!r})
import flat_program
flat_program.install()
"""
SLOW_WRITER = """
import pathlib, sys, time
from PIL import Image

from jitjax.loading import BUNDLED
from jitjax import cli
save = Image.Image.save
left = {saves}
def slow_save(self, file, *arguments, **options):
    global left
    save(self, file, *arguments, **options)
    left -= 1
    if left == 0:
        pathlib.Path("saving").touch()
        {wait}
Image.Image.save = slow_save
cli.main(sys.argv[1:])
"""
WAIT = "time.sleep(600)"
SWALLOW = """
        class Callback:
            def __del__(self):
                pathlib.Path("in_callback").touch()
                time.sleep(600)  # an exception raised here is lost
        callback = Callback()
        del callback
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("wait", "signum", "text"),
    [
        (WAIT, 2, "Ctrl-C"),
        slow(SWALLOW, 15, "SIGTERM"),  # one handler for both signals
    ],
)
def test_signals_leave_nothing_half_written(environment, tmp_path, signum, text, wait):
    program = FLAT_PICTURES + SLOW_WRITER.format(wait=wait, saves=1)
    command = [sys.executable, "-c", program, *QUICK, "-o", "a.png"]
    process = start(command, environment, cwd=tmp_path)
    marker = tmp_path / ("saving" if wait == WAIT else "in_callback")
    wait_for(marker.exists, process)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert error.splitlines()[-1] == f"jitjax: stopped by {text}"
    assert "Traceback" not in error
    assert "ignored" not in error
    marker.unlink()
    (tmp_path / "saving").unlink(missing_ok=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("option", "name"), [("--animate", "b.webp"), ("--trace", "b.png")])
def test_ctrl_c_while_the_trace_is_written(environment, tmp_path, option, name):
    program = SLOW_WRITER.format(wait=WAIT, saves=2)
    command = [sys.executable, "-c", program, *QUICK, "-o", "a.png", option, name]
    process = start(command, environment, cwd=tmp_path)
    wait_for((tmp_path / "saving").exists, process)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "jitjax: stopped by Ctrl-C"
    assert "Traceback" not in error
    assert output.startswith("a.png: dense, seed 0, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "saving"]


@pytest.mark.slow
def test_ctrl_c_keeps_the_pictures_that_are_made(environment, tmp_path):
    command = [*COMMAND, *QUICK, "--count", "100000", "-o", "a.png"]
    process = start(command, environment, cwd=tmp_path)
    wait_for((tmp_path / "a-1.png").exists, process)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["a-0.png", "a-1.png"]
    assert output.splitlines()[0].startswith("a-0.png: dense, seed 0, ")
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path)).shape == (32, 32, 3)


@pytest.mark.parametrize("module", ["jitjax", "jitjax.convert"])
def test_ctrl_c_during_imports(environment, tmp_path, module):
    """A module that stands in for `jaxtyping` waits while it is imported."""
    (tmp_path / "jaxtyping.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-m", module, "x"]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    process = start(command, environment | {"PYTHONPATH": paths}, cwd=tmp_path)
    wait_for((tmp_path / "importing").exists, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "jitjax: stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("jitjax", "ImportError('it is gone')"),
        ("jitjax.convert", "MemoryError()"),
        ("jitjax", "OSError('it is gone')"),
    ],
)
def test_errors_while_importing_are_one_line(environment, tmp_path, module, error):
    (tmp_path / "jaxtyping.py").write_text(f"raise {error}\n")
    environment = environment | {"PYTHONPATH": str(tmp_path)}
    done = run("x", environment=environment, command=[sys.executable, "-m", module])
    assert done.returncode == 2
    assert done.stderr in ("jitjax: error: it is gone\n", "jitjax: error: MemoryError\n")


@pytest.mark.parametrize("late", ["flax", "diffrax"])
def test_errors_of_late_imports_are_one_line(environment, tmp_path, late):
    """Of modules that are imported at their first use, after the command has begun."""
    (tmp_path / f"{late}.py").write_text("raise ImportError('it is gone')\n")
    done = run(*QUICK, environment=environment | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "jitjax: error: it is gone"
    assert "Traceback" not in done.stderr


def test_ctrl_c_in_a_text_that_is_executed(environment, tmp_path):
    """Python then kills the process by SIGINT after `sys.exit`, even if the exception is caught."""
    (tmp_path / "flax.py").write_text(
        "exec(\"import pathlib, time; pathlib.Path('executing').touch(); time.sleep(600)\")\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    process = start([*COMMAND, *QUICK], environment | {"PYTHONPATH": paths}, cwd=tmp_path)
    wait_for((tmp_path / "executing").exists, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "jitjax: stopped by Ctrl-C"
    assert "Traceback" not in error


@pytest.mark.parametrize("module", ["jitjax", "jitjax.convert"])
def test_version(environment, module):
    done = run("--version", environment=environment, command=[sys.executable, "-m", module])
    assert done.returncode == 0
    assert done.stdout.startswith("jitjax 0")
    assert "jax 0." in done.stdout


def test_missing_backend_is_one_line(environment, tmp_path):
    done = run(*QUICK, environment=environment | {"JAX_PLATFORMS": "nonsense"}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("jitjax: error: JAX has no device (JAX_PLATFORMS is 'nonsense')")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ('set -o pipefail; "$@" | true', COMMAND),  # nobody reads what is printed
        slow('"$@" >&-', FLAT),
        ('"$@" >&- 2>&- <&-', FLAT),
        slow('"$@" > /dev/full', FLAT),
        slow('"$@" 2> /dev/full', FLAT),
        slow('set -o pipefail; "$@" 2>&1 | head -c 1', COMMAND),  # the bar has no reader
        slow('PYTHONIOENCODING=ascii "$@"', FLAT),
        slow('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@" <&-', FLAT),
    ],
)
def test_streams(environment, tmp_path, script, command):
    out = tmp_path / "é.png"
    done = shell(
        script, "ein grüner Kreis", *QUICK[1:], "-o", out, environment=environment, command=command
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    with Image.open(out) as image:
        assert image.text["prompt"] == "ein grüner Kreis"


def test_no_file_gets_the_number_of_a_closed_stream(environment):
    """Or what libraries print would be written into it."""
    program = """
import sys
sys.argv[0] = "jitjax"
import jitjax
with open(sys.executable) as file:
    sys.exit(file.fileno() < 3)
"""
    command = [sys.executable, "-c", program]
    done = shell('"$@" >&- 2>&- <&-', environment=environment, command=command)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("script", "status"),
    [('"$@" > /dev/full', 2), ('set -o pipefail; "$@" | true', 0), ('"$@" >&-', 0)],
)
@pytest.mark.parametrize("option", ["--help", slow("--version")])
def test_streams_of_help(environment, script, status, option):
    done = shell(script, option, environment=environment)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.slow
def test_cache_that_cannot_be_written_is_one_line(environment, tmp_path):
    (tmp_path / "file").touch()
    bad = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}
    done = run(*QUICK, "-o", tmp_path / "a.png", environment=bad)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
    notes = [line for line in done.stderr.splitlines() if "step" not in line and line.strip()]
    assert len(notes) <= 1, notes


@pytest.mark.slow
def test_prompt_from_standard_input(environment, tmp_path):
    out = tmp_path / "a.png"
    done = run(
        "-", *QUICK[1:], "-o", out, environment=environment, input="a green ring\n", command=FLAT
    )
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.text["prompt"] == "a green ring"
    for text, message in ((" \n", "is empty"), ("caf\udce9", "not UTF-8")):
        done = run("-", *QUICK[1:], environment=environment, input=text, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("jitjax: error: standard input ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_prompt_that_is_not_utf8(environment, tmp_path):
    done = run("caf\udce9", *QUICK[1:], environment=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        r"jitjax: error: the prompt has bytes that are not UTF-8 (b'\xe9'"
    )
    assert done.stderr.count("\n") == 1


SLOW_CONVERSION = """
import pathlib, sys, time
import numpy as np
from jitjax.convert.__main__ import main
from jitjax.convert.targets import checkpoint
def wait(self, shape, dtype):
    pathlib.Path("allocating").touch()
    time.sleep(2)  # a thread of the conversion waits here: it is let finish, then all is removed
    return np.empty(shape, dtype)
checkpoint.ArrayPool.__call__ = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("repeats", "signum", "text"),
    [
        (1, 2, "Ctrl-C"),
        slow(2, 15, "SIGTERM"),
    ],
)
def test_a_stopped_conversion_leaves_nothing(environment, tmp_path, signum, text, repeats):
    source = str(BUNDLED / "tiny")
    command = [sys.executable, "-c", SLOW_CONVERSION, source, "--out", "out"]
    process = start(command, environment, cwd=tmp_path)
    wait_for((tmp_path / "allocating").exists, process)
    assert len(list(tmp_path.glob(".out.*"))) == 1
    for _ in range(repeats):
        process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert error.splitlines()[-1] == f"jitjax: stopped by {text}"
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["allocating"]
