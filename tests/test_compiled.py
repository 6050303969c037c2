"""`compile`: what its result computes, and that it compiles nothing more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_runs import PROMPTS, SIZE, SPARSE

import jitjax


@pytest.fixture(scope="module")
def compiled(small):
    return jitjax.compile(small, plan=SPARSE, batch=2, **SIZE)


@pytest.fixture
def compilations():
    """The seconds of each compilation of XLA."""
    seconds = []

    def record(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(record)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(record)


def test_result_equals_sample(small, compiled):
    key, guidance = jax.random.key(3), jnp.asarray([2.0, 4.0])
    got = compiled(PROMPTS, key=key, guidance=guidance)
    options = {"plan": SPARSE, "guidance": guidance, **SIZE}
    expected = jitjax.sample(small, PROMPTS, key=key, **options)
    assert got.dtype == jnp.float32
    # One program for all rounds differently from one per stage.
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert float(jnp.abs(got[0] - got[1]).max()) > 1e-3


@pytest.mark.slow
def test_other_prompts_keys_guidance_and_params_compile_nothing(small, compiled, compilations):
    # By NumPy: JAX compiles a program for each shape.
    other = jax.tree.map(lambda leaf: jax.device_put(-np.asarray(leaf)), small)
    first = compiled(PROMPTS, key=jax.random.key(0))
    compilations.clear()
    images = [
        compiled(PROMPTS, key=jax.random.key(1)),
        compiled(PROMPTS[::-1], key=jax.random.key(0)),
        compiled(PROMPTS, key=jax.random.key(0), guidance=1.5),
        compiled(PROMPTS, key=jax.random.key(0), params=other),
    ]
    assert compilations == []
    for image in images:
        assert float(jnp.abs(image - first).max()) > 1e-4


def test_what_does_not_fit_is_refused(small, compiled):
    with pytest.raises(ValueError, match="prompt has 1 strings; expected 2"):
        compiled("a", key=jax.random.key(0))
    with pytest.raises(ValueError, match="guidance is nan"):
        compiled(PROMPTS, key=jax.random.key(0), guidance=float("nan"))
    with pytest.raises(ValueError, match="batch is 0; expected 1 or more"):
        jitjax.compile(small, batch=0)
    with pytest.raises(ValueError, match="height"):
        jitjax.compile(small, height=65)
    with pytest.raises(ValueError, match="attention is 'flash'"):
        jitjax.compile(small, attention="flash")
    assert "plan=Plan(" in repr(compiled)
    assert len(repr(compiled)) < 1000
