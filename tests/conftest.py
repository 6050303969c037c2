"""Settings of all tests (shape checks, no implicit rank promotion) and shared fixtures."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

# The workers and the processes that they start share one compilation cache. It is removed at the
# end, unless JITJAX_TEST_CACHE names a folder. The user's cache is neither read nor written.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jitjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JITJAX_TEST_CACHE", _cache.name)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # Only with a limit does JAX lock the cache, so that nothing half-written is read.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)
    # There is a worker for each core; threads of NumPy and PyTorch would wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

with install_import_hook("jitjax", "beartype.beartype"):
    import jitjax

import jax
import jaxtyping
import pytest
from golden import build
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Let tests, also their processes, compile in a third of the time that users need.

    Programs are compiled without LLVM's optimisations, in one piece, and without the newer way to
    emit fused loops, which XLA has no switch for since jax 0.11. `-m gpu` compiles as users do.
    """
    # Tracing makes millions of objects, few of them in cycles.
    gc.set_threshold(100_000, 50, 100)
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    set_flags = os.environ.get("XLA_FLAGS", "")
    # Workers inherit them.
    os.environ["XLA_FLAGS"] = " ".join([set_flags, *(f for f in flags if f not in set_flags)])


def pytest_collection_finish() -> None:
    """Let the collector of garbage leave alone what was imported."""
    gc.collect()
    gc.freeze()


# Derandomised for reproducible runs; no deadline, because an example may include compilation.
settings.register_profile("jitjax", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("jitjax")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> jitjax.FluxParams:
    """A randomly initialised pipeline with tokenizers and about 64 000 parameters."""
    return build.small_params(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def saved(small: jitjax.FluxParams, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `small`, which no test may edit."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    jitjax.save(small, path)
    return path


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """`jitjax.load` reads a checkpoint once. For tests of commands that load it again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jitjax, "load", functools.cache(jitjax.load))
        yield


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the tests' type checks, so that jitjax raises its own errors as for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
