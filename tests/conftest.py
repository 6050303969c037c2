"""Settings of all tests (shape checks, no implicit rank promotion) and shared fixtures."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Iterator

# The workers and the processes that they start share one compilation cache, which is removed at
# the end. The user's cache is neither read nor written.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jitjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # Only with a limit does JAX lock the cache, so that nothing half-written is read.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)

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
    """Let the quick set, also its processes, compile in a third of the time that users need.

    It leaves out LLVM's optimisations, and the newer way to emit fused loops, which XLA has no
    switch for since jax 0.11. Every other set, as `-m slow` and `-m parity`, compiles as users do.
    """
    if "not slow" not in config.option.markexpr:
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    jaxlib = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    flag, flags = "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")
    if jaxlib < (0, 11) and flag not in flags:  # workers inherit it
        os.environ["XLA_FLAGS"] = f"{flags} {flag}"


# Derandomised for reproducible runs; no deadline, because an example may include compilation.
settings.register_profile("jitjax", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("jitjax")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> jitjax.FluxParams:
    """A randomly initialised pipeline with tokenizers and about 64 000 parameters."""
    return build.small_params(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def unoptimised() -> Iterator[None]:
    """Compile a module's programs without LLVM's optimisations in every set of tests.

    For tests of what is computed on analytic examples, to a tolerance. Tests of other modules get
    no program from these.
    """
    if jax.config.read("jax_disable_most_optimizations"):  # as in all of the quick set
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the tests' type checks, so that jitjax raises its own errors as for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
