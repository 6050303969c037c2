"""Shape checks on, no silent rank promotion; a small random pipeline for tests that need one."""

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

# The same examples in every run; no deadline, since an example may have to compile.
settings.register_profile("jitjax", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("jitjax")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> jitjax.FluxParams:
    """A randomly initialised pipeline with tokenizers, a few thousand parameters."""
    return build.small_params(tmp_path_factory.mktemp("small"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' type checks: as a user has it, and sees our own messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
