"""The operations of a call that take the most time, from JAX's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax


def kernels(call: Callable[[], Any], limit: int = 40) -> str:
    """Profile one call with JAX's profiler.

    Args:
        call: the function to profile.
        limit: number of operations to list.

    Returns:
        A table of the operations that take the most time on the device, with time, share and count.
        On a CPU a loop and the operations in it both have lines.
    """
    jax.block_until_ready(call())
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        files = sorted(Path(folder).glob("**/*.xplane.pb"))
        planes = [p for file in files for p in jax.profiler.ProfileData.from_file(str(file)).planes]
    durations, counts = Counter(), Counter()
    for plane in [p for p in planes if "GPU" in p.name or "TPU" in p.name] or planes:
        for line in plane.lines:
            if "GPU" in plane.name and "Stream" not in line.name:
                continue
            for event in line.events:
                if event.name.startswith("$"):  # a frame of Python, on a CPU
                    continue
                durations[event.name] += event.duration_ns
                counts[event.name] += 1
    total = sum(durations.values())
    rows = [f"{total / 1e6:10.3f} ms in all, {len(durations)} names"]
    rows += [
        f"{ns / 1e6:10.3f} ms {ns / max(total, 1):6.1%} {counts[name]:6d} x  {name[:160]}"
        for name, ns in durations.most_common(limit)
    ]
    return "\n".join(rows)
