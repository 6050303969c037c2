"""The micro-flow covers the expected part of the gap in any number of steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st

from jitjax.sampler.plan import Plan
from jitjax.sampler.transition import microflow

sigmas = st.tuples(st.floats(0.02, 1), st.floats(0.01, 0.95)).map(lambda p: (p[0], p[0] * p[1]))
states = jax.random.normal(jax.random.key(0), (2, 2, 9, 4))


def move(plan: Plan, start: float, end: float) -> np.ndarray:
    return np.asarray(microflow(plan, *states, jnp.float32(start), jnp.float32(end)))


@given(sigmas, st.integers(1, 6))
def test_hit_reaches_the_target_in_any_number_of_steps(ends, steps):
    got = move(Plan(1, microflow="hit", microflow_steps=steps), *ends)
    np.testing.assert_allclose(got, states[1], rtol=1e-5, atol=1e-5)
    closed_form = oracles.microflow(*states, *ends, ends[1])
    np.testing.assert_allclose(got, closed_form, rtol=1e-5, atol=1e-5)


@given(sigmas, st.integers(1, 6), st.floats(1, 8))
def test_blend_covers_its_fraction_of_the_gap_in_any_number_of_steps(ends, steps, relax):
    got = move(Plan(1, microflow="blend", relax=relax, microflow_steps=steps), *ends)
    y, target = states
    np.testing.assert_allclose(got, y + (target - y) / relax, rtol=1e-4, atol=1e-4)
    start, end = ends
    closed_form = oracles.microflow(y, target, start, end, start + relax * (end - start))
    np.testing.assert_allclose(got, closed_form, rtol=1e-4, atol=1e-4)


def test_none_leaves_tokens_unchanged():
    np.testing.assert_array_equal(move(Plan(1, microflow="none"), 0.7, 0.6), states[0])
