"""The first moments of a command, before modules that take seconds are imported.

Until `jitjax.command.run` takes over, a signal ends the process at once, because there is nothing
to clean up, and an error that the user's machine causes is one line.

Ctrl-C gives a traceback before `begin`. This module therefore imports nothing that Python has not
loaded already: `signal` would load `enum`, `functools` and `collections`, half of the time.
"""

import _signal  # pyright: ignore[reportMissingImports]
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

SIGNALS = {
    getattr(_signal, name): name
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(_signal, name)
}
"""Number of each signal that stops a command -> its name."""
LEAST_ADDRESS_SPACE = 1300 * 2**20
"""Bytes of address space below which jaxlib 0.10 aborts when it starts, whatever the picture."""
garbage_waits = False
"""Whether `begin` has put off the search for garbage, which finds next to none while modules are
imported and models are traced, and takes a tenth of that time."""
QUIET = "3"
"""Level of `TF_CPP_MIN_LOG_LEVEL` at which XLA's libraries print nothing but why they abort."""


def begin() -> None:
    """Prepare for signals and errors, if Python was started as one of the commands."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0] if sys.argv else ""
    # While `python -m` looks for a module, `sys.argv[0]` is "-m".
    if name not in ("-m", "jitjax"):
        return
    module = (word.removeprefix("-m").split(".")[0] for word in sys.orig_argv[1:3])
    if name == "-m" and "jitjax" not in module:
        return
    open_missing_streams()
    try:
        for signum in default_signals():
            _signal.signal(signum, _exit_at_once)
    except ValueError:
        return  # a thread of another program
    sys.excepthook = _report_import_error
    import gc

    global garbage_waits
    garbage_waits = True
    gc.disable()
    address_space_problem()  # loads a module, for which there may be no memory later
    # Errors of XLA's libraries are exceptions, too. Where memory is used up, its allocator for GPUs
    # prints a hundred lines before them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", QUIET)


def end() -> None:
    """Undo the part of `begin` that is not for `jitjax.command.run`."""
    if sys.excepthook is _report_import_error:
        sys.excepthook = sys.__excepthook__


def collect_garbage() -> None:
    """Collect garbage from now on, as Python does by default."""
    import gc

    if garbage_waits:
        gc.enable()


def before_exit() -> None:
    """Let the process of a command end at once, without a search for garbage (0.4 s)."""
    import gc

    if garbage_waits:
        gc.freeze()


def exit_if_command(status: int) -> None:
    """End the process of a command that a signal has stopped, without Python's own last steps.

    Python crashes in them at times, while XLA's threads still run; and if the signal came while
    `exec` ran a text, as `dataclasses` does, Python kills the process by the same signal.
    """
    if not garbage_waits:  # set in commands alone
        return
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 -- see the head of this module
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody can read it
    os._exit(status)


def open_missing_streams() -> None:
    """Open the null device in place of standard streams that are closed.

    Otherwise the next file that is opened, such as a checkpoint, would get the number of standard
    error, and the messages of libraries with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def default_signals() -> list[int]:
    """Return the signals that nobody handles or ignores (as `nohup` does)."""
    default = (_signal.SIG_DFL, _signal.default_int_handler, _exit_at_once)
    return [signum for signum in SIGNALS if _signal.getsignal(signum) in default]


def _exit_at_once(signum: int, frame: object) -> None:
    _write_error(stop_text(signum))
    os._exit(128 + signum)


def _write_error(text: str) -> None:
    try:  # noqa: SIM105 -- see the head of this module
        os.write(2, f"jitjax: {text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass  # nobody can read it


def stop_text(signum: int) -> str:
    """Say which signal has stopped the command."""
    return f"stopped by {'Ctrl-C' if signum == _signal.SIGINT else SIGNALS[signum]}"


def _report_import_error(
    kind: type[BaseException], error: BaseException, traceback: "TracebackType | None"
) -> None:
    """An exception hook: errors that a user's machine causes while modules are imported."""
    expected = (ImportError, MemoryError, OSError, RuntimeError, ValueError)
    is_expected = isinstance(error, expected)
    if not is_expected or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, traceback)
    if not is_expected:
        return
    _write_error(f"error: {address_space_problem() or one_line(error)}")
    os._exit(2)  # the status of an exception hook is always 1


def address_space_problem() -> str | None:
    """Say if `ulimit -v` leaves too little for JAX, which would then abort or crash."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= LEAST_ADDRESS_SPACE:
        return None
    return (
        f"the address space is limited to {limit / 1e9:.2g} GB (ulimit -v); expected 2 GB or more, "
        "which JAX needs to start"
    )


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's text as one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
