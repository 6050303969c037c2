"""The micro-flow covers the expected part of the gap in any number of steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jitjax.sampler.plan import Plan
from jitjax.sampler.transition import microflow

START = np.random.default_rng(0).uniform(0.02, 1, 12).astype(np.float32)
START[:2] = 0.02, 1
END = START * np.random.default_rng(1).uniform(0.01, 0.95, 12).astype(np.float32)
END[:4] = START[:4] * np.float32([0.01, 0.95, 0.95, 0.01])
STATE, TARGET = np.random.default_rng(2).normal(size=(2, 2, 9, 4)).astype(np.float32)


def assert_moves(plan: Plan, expected: np.ndarray, target_sigma: np.ndarray, tolerance: float):
    """Check a micro-flow between all pairs of sigmas, also against its closed form."""
    ends = jax.vmap(microflow, (None, None, None, 0, 0))
    got = np.asarray(jax.jit(ends, static_argnums=0)(plan, STATE, TARGET, START, END))
    for moved, *sigmas in zip(got, START, END, target_sigma, strict=True):
        np.testing.assert_allclose(moved, expected, rtol=tolerance, atol=tolerance)
        closed_form = oracles.microflow(STATE, TARGET, *sigmas)
        np.testing.assert_allclose(moved, closed_form, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_hit_reaches_the_target_in_any_number_of_steps(steps):
    plan = Plan(1, microflow="hit", microflow_steps=steps)
    assert_moves(plan, TARGET, END, 1e-5)


@pytest.mark.parametrize(("steps", "relax"), [(1, 1.0), (2, 8.0), (3, 1.3), (6, 3.7)])
def test_blend_covers_its_fraction_of_the_gap_in_any_number_of_steps(steps, relax):
    plan = Plan(1, microflow="blend", relax=relax, microflow_steps=steps)
    expected = STATE + (TARGET - STATE) / relax
    assert_moves(plan, expected, START + relax * (END - START), 1e-4)


def test_none_leaves_tokens_unchanged():
    plan = Plan(1, microflow="none")
    moved = microflow(plan, jnp.asarray(STATE), jnp.asarray(TARGET), START[0], END[0])
    np.testing.assert_array_equal(moved, STATE)
