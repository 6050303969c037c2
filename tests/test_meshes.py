"""Meshes with explicit and auto axes, with and without `jax.set_mesh`, and `shard_map`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_meshes_give_the_result_of_one_device():
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    program = Path(__file__).with_name("mesh_program.py")
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it spends its time on compilation
    }
    process = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=environment
    )
    assert process.stdout.strip() == "all equal", process.stdout + process.stderr[-3000:]
