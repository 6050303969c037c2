"""How all commands run: `jitjax`, its subcommands and `python -m jitjax.convert`.

Errors are one line, and the exit status says what happened:

    0    done
    1    lines of a list have failed, `--verify` found damage, or an unexpected error (with a
         traceback)
    2    what was asked for cannot be done
    128 + n  stopped by signal n: 130 by Ctrl-C, 143 by SIGTERM
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from jitjax import startup
from jitjax.validation import shown

OUT_OF_MEMORY = (
    "resource_exhausted",
    "out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "failed to allocate",
    "can't start new thread",
    "failed to map segment",
)
"""Parts of the messages by which JAX, XLA, LLVM and Python say that memory is used up."""

CLEANUP_SECONDS = 10.0
"""Longest time for removing unfinished files; a disk that hangs must not keep the process."""

_tracebacks = False
"""Whether the command that runs was asked to print them, by `--debug`."""


def run(
    body: Callable[[], int],
    *,
    error_prefix: str,
    cleanup: Callable[[], None],
    grace: float,
    memory_hint: str,
) -> int:
    """Run the body of a command.

    Args:
        body: does the work and returns the exit status.
        error_prefix: begins errors.
        cleanup: deletes unfinished files while `body` still runs, before the process is ended.
        grace: seconds that `body` has to end after Ctrl-C or SIGTERM, which raise
            `KeyboardInterrupt` in it. After that, or after a second signal, the process is ended.
        memory_hint: what to do if memory is used up.

    Returns:
        The exit status.
    """
    global _tracebacks
    _tracebacks = False
    startup.end()
    with (
        _no_garbage_at_exit(),
        _streams(),
        _warnings_as_notes(),
        _stoppable(cleanup, grace) as stopped,
    ):
        try:
            return body()
        except KeyboardInterrupt:
            pass
        except Exception as error:
            if not stopped:  # else the error is what a library made of the interruption
                text = error_prefix + _explain(error, memory_hint)
                note_traceback(error)
                note(text)
                return 2
        signum = stopped[0] if stopped else signal.SIGINT
        note(f"jitjax: {startup.stop_text(signum)}")
        startup.exit_if_command(128 + signum)
        return 128 + signum


def show_tracebacks() -> None:
    """Let `note_traceback` print, until the next command runs."""
    global _tracebacks
    _tracebacks = True


def note_traceback(error: Exception) -> None:
    """Print the traceback of an error that is told in one line, if `--debug` asks for it."""
    if _tracebacks:
        note("".join(traceback.format_exception(error)).rstrip("\n"))


def run_report(body: Callable[[], int], *, error_prefix: str) -> int:
    """Run the body of a command that only prints, as `run` does; return the exit status."""
    return run(
        body,
        error_prefix=error_prefix,
        cleanup=lambda: None,
        grace=1.0,
        memory_hint="there is too little to start",
    )


def _explain(error: Exception, memory_hint: str) -> str:
    """Return the text of an error that the user can cause; raise the error if it is another."""
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, (OSError, RuntimeError))
        and any(part in text.lower() for part in OUT_OF_MEMORY)
    ):
        return f"out of memory; {memory_hint} ({startup.one_line(error)})"
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, (ValueError, ImportError)):  # what takes long is imported at its first use
        return text or type(error).__name__
    if type(error).__name__ == "JaxRuntimeError":
        # XLA's libraries do not always say that memory is what they lack.
        return f"JAX has failed: {startup.one_line(error)}; if memory is short, {memory_hint}"
    raise error


def _explain_os_error(error: OSError) -> str:
    """Return the text of an error, where the system's own names nothing or a very long path."""
    try:
        os.getcwd()
    except OSError:
        return f"the working directory is gone ({error.strerror or error}); change to another one"
    if error.errno == errno.ENAMETOOLONG and error.strerror and error.filename is not None:
        return f"{error.strerror}: {shown(str(error.filename))}"
    return str(error)


@contextlib.contextmanager
def _no_garbage_at_exit() -> Iterator[None]:
    try:
        yield
    finally:
        startup.before_exit()


@contextlib.contextmanager
def _stoppable(cleanup: Callable[[], None], grace: float) -> Iterator[list[int]]:
    """Make signals raise `KeyboardInterrupt` once, and end the process if that does not help.

    JAX swallows exceptions that are raised in its callbacks, and Python handles no signal while
    XLA compiles or computes. A thread therefore waits for signals, too.

    Yields:
        a list that the numbers of the signals are appended to.
    """
    stopped: list[int] = []
    signals = startup.default_signals()
    if threading.current_thread() is not threading.main_thread() or not signals:
        yield stopped
        return

    def interrupt(signum: int, frame: Any) -> None:
        stopped.append(signum)
        if len(stopped) == 1:
            raise KeyboardInterrupt

    def watch() -> None:
        received: list[int] = []
        deadline = 0.0
        while len(received) < 2:
            try:
                byte = reader.recv(1)
            except TimeoutError:
                break
            if not byte:
                return  # the command has ended
            if byte[0] in signals:
                if not received:
                    deadline = time.monotonic() + grace
                received.append(byte[0])
            if received:
                reader.settimeout(max(deadline - time.monotonic(), 0.001))
        cleaner = threading.Thread(target=cleanup, daemon=True)
        cleaner.start()
        cleaner.join(CLEANUP_SECONDS)
        with contextlib.suppress(OSError):
            os.write(2, f"\njitjax: {startup.stop_text(received[0])}\n".encode())
        os._exit(128 + received[0])

    def silence(unraisable: Any) -> None:
        if not (stopped and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            hook(unraisable)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    hook, sys.unraisablehook = sys.unraisablehook, silence
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers = {signum: signal.signal(signum, interrupt) for signum in signals}
    try:
        yield stopped
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = hook
        writer.close()
        thread.join()
        reader.close()


class _Unbreakable:
    """A text stream whose errors are ignored: a reader of progress bars may have gone away."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _give_up(stream: Any) -> None:
    """Point a standard stream that cannot be written to the null device.

    Otherwise Python writes what is left when it ends, fails again, and exits with status 120.
    """
    if any(stream is standard for standard in (sys.__stdout__, sys.__stderr__)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Give libraries a standard error that exists and takes everything."""
    original = sys.stderr
    stream = original if original is not None else open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = _Unbreakable(stream)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stderr = original
        if original is None:
            stream.close()
        else:
            try:
                stream.flush()
            except OSError:
                _give_up(stream)
            except ValueError:  # it is closed
                pass


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print warnings as one line each; all that concern the compilation cache as one."""
    cache_is_told = False

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        nonlocal cache_is_told
        if "compilation cache" in str(message):
            if cache_is_told:
                return
            cache_is_told = True
        note(f"jitjax: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def note(text: str) -> None:
    """Print a line to standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(_encodable(text, sys.stderr) + "\n")
            sys.stderr.flush()


def report(text: str) -> None:
    """Print a line about something that is done to standard output.

    It remains done if nobody reads the line: a closed pipe is ignored, another error is a note.
    """
    try:
        write_line(text, sys.stdout)
    except OSError as error:
        note(f"standard output: {error.strerror or error}; not written there: {text}")


def write_line(text: str, stream: Any) -> None:
    """Write a line to a stream that may be closed or unable to encode it.

    Raises:
        OSError: the stream cannot be written to, but not because its reader has gone away.
    """
    if stream is None:
        return
    try:
        stream.write(_encodable(text, stream) + "\n")
        stream.flush()
    except OSError as error:
        _give_up(stream)
        if not isinstance(error, BrokenPipeError):
            raise


def _encodable(text: str, stream: Any) -> str:
    """Return `text` with the characters escaped that the encoding of `stream` does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def check_device() -> None:
    """Raise `OSError` unless JAX can start and has a device to compute on."""
    import jax

    if problem := startup.address_space_problem():
        raise OSError(problem)
    try:
        jax.devices()
    except Exception as error:  # JAX's plug-ins for devices raise errors of any type
        platforms = os.environ.get("JAX_PLATFORMS")
        setting = f" (JAX_PLATFORMS is {platforms!r})" if platforms else ""
        reason = startup.one_line(error) if str(error) else "it is not installed, or finds none"
        raise OSError(f"JAX has no device{setting}: {reason}") from error
