"""Settings of all tests (shape checks, no implicit rank promotion) and shared fixtures."""

from __future__ import annotations

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

# Derandomised for reproducible runs; no deadline, because an example may include compilation.
settings.register_profile("jitjax", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("jitjax")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> jitjax.FluxParams:
    """A randomly initialised pipeline with tokenizers and about 64 000 parameters."""
    return build.small_params(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def unoptimised() -> Iterator[None]:
    """Compile a module's programs without LLVM's optimisations, in about half the time.

    For tests of what is computed on analytic examples, to a tolerance. Other tests compile as users
    do, and get no program from these.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the tests' type checks, so that jitjax raises its own errors as for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
