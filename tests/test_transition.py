"""The micro-flow: it hits, or goes a part of the way, in any number of steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitjax.plan import Plan
from jitjax.transition import microflow, microflow_exact

sigmas = st.tuples(st.floats(0.02, 1), st.floats(0.01, 0.95)).map(lambda p: (p[0], p[0] * p[1]))
states = jax.random.normal(jax.random.key(0), (2, 2, 9, 4))


def move(plan: Plan, start: float, end: float) -> np.ndarray:
    return np.asarray(microflow(plan, *states, jnp.float32(start), jnp.float32(end)))


@given(sigmas, st.integers(1, 6))
def test_hit_hits_the_target_in_any_number_of_steps(ends, steps):
    got = move(Plan(1, microflow="hit", microflow_steps=steps), *ends)
    np.testing.assert_allclose(got, states[1], rtol=1e-5, atol=1e-5)
    closed = microflow_exact(*states, *map(jnp.float32, ends), jnp.float32(ends[1]))
    np.testing.assert_allclose(got, closed, rtol=1e-5, atol=1e-5)


@given(sigmas, st.integers(1, 6), st.floats(1, 8))
def test_blend_goes_one_part_of_the_way_in_any_number_of_steps(ends, steps, relax):
    got = move(Plan(1, microflow="blend", relax=relax, microflow_steps=steps), *ends)
    y, target = states
    np.testing.assert_allclose(got, y + (target - y) / relax, rtol=1e-4, atol=1e-4)
    start, end = ends
    closed = microflow_exact(
        y, target, jnp.float32(start), jnp.float32(end), jnp.float32(start + relax * (end - start))
    )
    np.testing.assert_allclose(got, closed, rtol=1e-4, atol=1e-4)


def test_none_leaves_the_tokens_where_they_are():
    np.testing.assert_array_equal(move(Plan(1, microflow="none"), 0.7, 0.6), states[0])


@pytest.mark.parametrize("steps", [1, 3])
def test_the_way_between_is_straight(steps):
    """Half of the steps of a hitting flow, done: half of the way."""
    y, target = states
    half = microflow_exact(y, target, jnp.float32(0.8), jnp.float32(0.7), jnp.float32(0.6))
    np.testing.assert_allclose(half, (y + target) / 2, rtol=1e-5, atol=1e-6)
