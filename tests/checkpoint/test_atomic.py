"""A folder appears complete or not at all, and nothing but the writer's own files is replaced."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest

import jitjax
from jitjax.checkpoint import atomic

OWNED = ("a", "b")

HOLDER = """
import os, signal, sys
from pathlib import Path
from jitjax.checkpoint import atomic
with atomic.atomic_folder(
    sys.argv[1], overwrite=True, owned=("a", "b"), check_replaceable=lambda path: None
) as new:
    (new / "a").write_text("half")
    if sys.argv[2] == "between renames":
        os.rename(sys.argv[1], new.with_name("old"))
    print("go", flush=True)
    signal.pause()
"""


def hidden(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name.startswith(".")]


def accept(path: Path) -> None:
    """Let every folder be replaced that has a file `a`."""
    if not (path / "a").is_file():
        raise FileExistsError(f"{path} is not ours")


def write(target, content="new", *, overwrite=False, meanwhile=lambda: None) -> None:
    with atomic.atomic_folder(
        target, overwrite=overwrite, owned=OWNED, check_replaceable=accept
    ) as new:
        (new / "a").write_text(content)
        meanwhile()


def hold(target: Path, state: str = "writing") -> subprocess.Popen:
    """Start a process that is writing `target` and does not go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target), state], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    process.stdout.close()
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def appear():
        target.mkdir()
        (target / "thesis.txt").write_text("my only copy")

    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        write(target, meanwhile=appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


@pytest.mark.parametrize("appear", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_anything_that_appears_meanwhile_is_not_replaced(tmp_path, appear):
    target = tmp_path / "out"
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        write(target, meanwhile=lambda: appear(target))
    assert os.path.lexists(target)
    assert not hidden(tmp_path)


def test_overwrite_checks_what_it_replaces_at_the_end(tmp_path):
    target = tmp_path / "out"
    write(target, "old")

    def exchange():
        (target / "a").unlink()
        (target / "thesis.txt").write_text("my only copy")

    with pytest.raises(FileExistsError, match="is not ours"):
        write(target, overwrite=True, meanwhile=exchange)
    assert (target / "thesis.txt").read_text() == "my only copy"
    assert not hidden(tmp_path)


def test_overwrite_keeps_other_files(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    (target / "b").mkdir()
    (target / "notes").mkdir()
    (target / "notes" / "1.txt").write_text("text")
    write(target, overwrite=True)
    assert (target / "a").read_text() == "new"
    assert (target / "notes" / "1.txt").read_text() == "text"
    assert sorted(os.listdir(target)) == ["a", "notes"]
    assert os.listdir(tmp_path) == ["out"]


def test_error_leaves_the_old_folder(tmp_path):
    target = tmp_path / "out"
    write(target, "old")

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(target, overwrite=True, meanwhile=fail)
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_second_writer_fails_early(tmp_path):
    target = tmp_path / "out"
    process = hold(target)
    try:
        reached = []
        with pytest.raises(FileExistsError, match="is being written by another process"):
            write(target, meanwhile=lambda: reached.append(True))
        assert not reached
        assert hidden(tmp_path) == [".out.jitjax.tmp"]  # the other process still has its folder
        assert (tmp_path / ".out.jitjax.tmp/new/a").read_text() == "half"
    finally:
        kill(process)
    write(target)
    assert os.listdir(tmp_path) == ["out"]


def test_second_writer_in_the_same_process_fails(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(FileExistsError, match="another process"):
        write(target, meanwhile=lambda: write(target))
    assert not list(tmp_path.iterdir())


def test_killed_writer_is_cleaned_up(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    kill(hold(target))
    assert hidden(tmp_path)
    write(target, overwrite=True)
    assert (target / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_writer_killed_between_the_renames_is_undone(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    kill(hold(target, "between renames"))
    assert not target.exists()
    with pytest.raises(FileExistsError, match="already exists"):
        write(target)
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_writer_killed_before_it_moved_other_files(tmp_path):
    target, work = tmp_path / "out", tmp_path / ".out.jitjax.tmp"
    write(target, "half way")
    (work / "old").mkdir(parents=True)
    (work / "old" / "a").write_text("old")
    (work / "old" / "notes.txt").write_text("text")
    write(target, overwrite=True)
    assert (target / "notes.txt").read_text() == "text"
    assert (target / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_symbolic_links_are_followed(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to("real")
    write(link)
    assert (real / "a").read_text() == "new"
    write(link, "again", overwrite=True)
    assert link.is_symlink()
    assert (real / "a").read_text() == "again"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle of symbolic links"):
        write(tmp_path / "circle")


def test_targets_that_cannot_be_written(tmp_path, monkeypatch):
    reached = []
    with pytest.raises(OSError, match="has 256 bytes; expected at most 255"):
        write(tmp_path / ("ä" * 128), meanwhile=lambda: reached.append(True))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is no folder"):
        write(tmp_path / "file" / "out", meanwhile=lambda: reached.append(True))
    with pytest.raises(OSError, match="mount point"):
        write("/proc", overwrite=True, meanwhile=lambda: reached.append(True))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="is not writable"):
        write(tmp_path / "out", meanwhile=lambda: reached.append(True))
    assert not reached


def test_longest_name(tmp_path):
    write(tmp_path / ("x" * 255))
    assert (tmp_path / ("x" * 255) / "a").read_text() == "new"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("code", ["ENOTSUP", "ENOSYS", "ENOLCK"])
def test_file_systems_without_locks(tmp_path, monkeypatch, code):
    def refuse(file, operation):
        import errno

        raise OSError(getattr(errno, code), "no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / ".other.jitjax.tmp").mkdir()
    with pytest.raises(FileExistsError, match="if none is running, remove"):
        write(tmp_path / "other")


def test_failed_save_leaves_no_threads(few, tmp_path, monkeypatch):
    from jitjax.checkpoint import array_writer

    def fail(*arguments):
        raise OSError("the disk is full")

    before = threading.active_count()
    monkeypatch.setattr(array_writer, "write_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        jitjax.save(few, tmp_path / "out")
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_save_keeps_notes_beside_a_checkpoint(few, copy_of_few):
    (copy_of_few / "notes.txt").write_text("text")
    changed = dataclasses.replace(few, config=dataclasses.replace(few.config, shift=2.0))
    jitjax.save(changed, copy_of_few, overwrite=True)
    assert (copy_of_few / "notes.txt").read_text() == "text"
    assert jitjax.load(copy_of_few, dtype=jnp.float32).config == changed.config
