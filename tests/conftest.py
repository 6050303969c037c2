"""Settings of all tests (shape checks, no implicit rank promotion) and shared fixtures."""

from __future__ import annotations

import os

# Tests must not read or write the user's compilation cache.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

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


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the tests' type checks, so that jitjax raises its own errors as for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
