"""The threads of the writer of arrays end with it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from jitjax.checkpoint import array_writer


def test_close_waits_for_a_thread_that_the_pool_has_forgotten(tmp_path, monkeypatch):
    """Ctrl-C while `submit` starts a thread: the thread runs, and the pool does not know it."""
    write_file = array_writer.write_file

    def write_slowly(*args):
        time.sleep(0.3)
        write_file(*args)

    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name.startswith("jitjax-writer"):
            raise KeyboardInterrupt

    monkeypatch.setattr(array_writer, "write_file", write_slowly)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    writer = array_writer.Writer(tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        writer.write("leaf", np.zeros(3, np.float32), 0, (3,))
    writer.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("jitjax-writer")]
