"""Writes of a folder that appear complete or not at all.

    parent/NAME                   the target
    parent/.NAME.jitjax.tmp/      exists while a process writes, and after it was killed
        lock                      locked (flock) by the process that writes
        new/                      what it has written
        old/                      the previous target, between the two renames

The operating system releases the lock when the process ends, in whatever way. So the next write to
the same target knows whether the folder is still in use, and cleans it up if it is not.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jitjax.checkpoint.direct_io import stop_writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_NAME_BYTES = 255
"""Longest name of a file or folder that the usual file systems allow."""

_unfinished: dict[Path, tuple[Path, Sequence[str]]] = {}
"""Working folder of each write of this process -> its target and what it owns there."""


def check_target(
    path: str | os.PathLike[str], overwrite: bool, check_replaceable: Callable[[Path], None]
) -> Path:
    """Check that a folder may be written, without writing anything; for use before long work.

    Returns:
        the absolute path that is written: symbolic links are followed, dangling ones too.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is false or it may not be replaced.
        OSError: `path` cannot be written.
    """
    target = Path(os.path.realpath(path))
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
        raise OSError(
            f"the name {target.name[:20]!r}... has {len(os.fsencode(target.name))} bytes; expected "
            f"at most {MAX_NAME_BYTES}"
        )
    if target.is_symlink():
        raise OSError(f"{str(target)!r} is a circle of symbolic links; expected a folder")
    if target.is_mount():
        raise OSError(f"{str(target)!r} is a mount point; expected a folder inside it")
    _check_existing(target, overwrite, check_replaceable)
    parent = next(parent for parent in target.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise NotADirectoryError(f"{str(parent)!r} is no folder; expected one to write into")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{str(parent)!r} is not writable; expected a folder to write into")
    return target


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    owned: Sequence[str],
    check_replaceable: Callable[[Path], None],
) -> Iterator[Path]:
    """Create a folder beside `path` that takes its place when the block ends without an error.

    If `path` exists, its entries in `owned` are replaced, and all others stay.

    Args:
        path: the target; a symbolic link is followed.
        overwrite: replace `path` if it exists.
        owned: names of all files and folders that the block may write.
        check_replaceable: raises `FileExistsError` for a folder that may not be replaced. It is
            called before the block, and again for what is about to be replaced.

    Yields:
        the new folder, empty, under a temporary name. It is deleted if the block raises.

    Raises:
        FileExistsError: `path` exists and may not be replaced, appears while the block runs and
            `overwrite` is false, or another process is writing it.
        OSError: `path` cannot be written.
    """
    path = check_target(path, overwrite, check_replaceable)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = _work_folder(path)
    lock = _lock(work, path)
    _unfinished[work] = path, owned
    try:
        _recover(work, path, owned)
        _check_existing(path, overwrite, check_replaceable)
        new = work / "new"
        new.mkdir()
        yield new
        if os.path.lexists(path) and overwrite:
            _replace(path, work, owned, check_replaceable)
        else:
            _rename_to_new_path(new, path)
    finally:
        try:
            _recover(work, path, owned)
        finally:
            _remove(work)
            del _unfinished[work]
            if lock is not None:
                os.close(lock)


def remove_unfinished(seconds: float = 1.0) -> None:
    """Remove what `atomic_folder` has not finished; only right before the process ends.

    Other threads start no new file. What they still write to the present ones is removed again.

    Args:
        seconds: time after which this gives up; the next write to the same target cleans up then.
    """
    stop_writing()
    deadline = time.monotonic() + seconds
    for work, (path, owned) in list(_unfinished.items()):
        while work.exists():
            with suppress(OSError):
                _recover(work, path, owned)
                _remove(work)
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)


def _remove(work: Path) -> None:
    """Remove a working folder in which there is only a lock."""
    (work / "lock").unlink(missing_ok=True)
    with suppress(OSError):  # another process has locked it meanwhile
        work.rmdir()


def _check_existing(path: Path, overwrite: bool, check_replaceable: Callable[[Path], None]) -> None:
    if os.path.lexists(path):
        check_replaceable(path)
        if not overwrite:
            raise FileExistsError(
                f"{str(path)!r} already exists; expected a new path, or overwrite"
            )


def _work_folder(path: Path) -> Path:
    name = f".{path.name}.jitjax.tmp"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.jitjax.tmp"
    return path.with_name(name)


def _lock(work: Path, path: Path) -> int | None:
    """Create `work` and lock it for this process; return the descriptor that holds the lock."""
    while True:
        try:
            work.mkdir()
            created = True
        except FileExistsError:
            created = False
        if fcntl is None:
            return _without_lock(work, path, created)
        try:
            file = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last owner has just removed it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(work / "lock")):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return _without_lock(work, path, created)
            raise FileExistsError(
                f"{str(path)!r} is being written by another process; expected one at a time"
            ) from None
        os.close(file)


def _without_lock(work: Path, path: Path, created: bool) -> None:
    """For file systems that cannot lock: only a folder that did not exist is surely not in use."""
    if not created:
        raise FileExistsError(
            f"{str(path)!r} is being written by another process, or one was killed; if none is "
            f"running, remove {str(work)!r}"
        )


def _recover(work: Path, path: Path, owned: Sequence[str]) -> None:
    """Undo or finish an interrupted replacement, and delete what was written."""
    old = work / "old"
    if old.exists():
        if not os.path.lexists(path):
            old.rename(path)
        else:
            _move_others(old, path, owned)
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work / "new", ignore_errors=True)


def _replace(
    path: Path, work: Path, owned: Sequence[str], check_replaceable: Callable[[Path], None]
) -> None:
    old = work / "old"
    path.rename(old)
    try:
        check_replaceable(old)  # what stands there now, not what stood there at the start
        _rename_to_new_path(work / "new", path)
    except BaseException:
        if not os.path.lexists(path):
            old.rename(path)
        raise
    _move_others(old, path, owned)


def _move_others(old: Path, path: Path, owned: Sequence[str]) -> None:
    """Move the entries of `old` that are not in `owned` to `path`."""
    for entry in old.iterdir():
        if entry.name not in owned:
            if os.path.lexists(path / entry.name):
                raise FileExistsError(f"{str(path / entry.name)!r} exists; {entry} is kept")
            entry.rename(path / entry.name)


def _rename_to_new_path(new: Path, path: Path) -> None:
    """Rename a folder, but never replace anything: `rename` alone replaces an empty folder."""
    try:
        if os.name != "nt":
            path.mkdir()
        try:
            new.rename(path)  # fails if the folder just made is not empty any more
        except OSError:
            if os.name != "nt":
                with suppress(OSError):
                    path.rmdir()
            raise
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"{str(path)!r} has appeared meanwhile; it is not replaced, and nothing is written"
        ) from None
