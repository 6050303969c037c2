"""The lifter against SciPy, and properties of every interpolator."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.lifter import Lifter, blur_width
from jitjax.sampler.plan import CHOICES

KINDS = CHOICES["lift"]


def lift(values: np.ndarray, index: np.ndarray, grid, kind: str, padding: int = 2) -> np.ndarray:
    """Lift one sample with NaN in its padded slots."""
    padded = np.pad(values, ((0, padding), (0, 0)), constant_values=np.nan)
    return np.asarray(build_and_call(index[None], padded[None], grid, kind)[0])


@partial(jax.jit, static_argnums=(2, 3))
def build_and_call(index, values, grid, kind):
    anchors = AnchorSet.padded(index, values.shape[1], grid[0] * grid[1])
    return Lifter.build(anchors, grid, index.shape[1], kind)(values)


@given(
    st.sampled_from([(6, 7), (2, 9), (3, 1)]),  # each shape is compiled
    st.sampled_from(KINDS),
    st.sampled_from([0.2, 0.7]),
    st.integers(0, 99),
)
def test_lifter_equals_scipy_and_ignores_padding(grid, kind, density, seed):
    n = grid[0] * grid[1]
    rng = np.random.default_rng(seed)
    index = rng.permutation(n)[: max(1, int(n * density))]
    values = rng.normal(size=(len(index), 3)).astype(np.float32)
    got = lift(values, index, grid, kind)
    np.testing.assert_allclose(got, oracles.lift(values, index, grid, kind), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[index], values)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_constant_field_is_lifted_exactly(kind):
    index = np.random.default_rng(0).permutation(42)[:9]
    got = lift(np.full((9, 2), 3.0, np.float32), index, (6, 7), kind)
    np.testing.assert_allclose(got, 3.0, rtol=2e-5)  # "linear" is a float32 fit


def test_none_sets_other_tokens_to_zero():
    got = lift(np.ones((2, 1), np.float32), np.array([3, 4]), (3, 3), "none")
    np.testing.assert_array_equal(np.flatnonzero(got), [3, 4])


def test_linear_extrapolation_is_bounded():
    values = np.array([[1.0], [2.0]], np.float32)
    got = lift(values, np.array([0, 1]), (1, 40), "linear")[:, 0]
    assert np.abs(got - 2).max() < 2


def test_linear_is_the_most_accurate_on_smooth_fields():
    """Mean error over random smooth fields, at the first stage's density of the preset 4x."""
    grid, errors = (32, 32), {kind: [] for kind in ("blur", "narrow", "linear", "nearest")}
    rows, columns = np.indices(grid) / 32
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b, c = rng.uniform(-6, 6, 3)
        field = np.sin(a * rows + b * columns + c).reshape(-1, 1).astype(np.float32)
        index = np.sort(rng.permutation(1024)[:358])
        for kind, kind_errors in errors.items():
            kind_errors.append(np.abs(lift(field[index], index, grid, kind) - field).mean())
    mean = {kind: np.mean(kind_errors) for kind, kind_errors in errors.items()}
    assert mean["linear"] < 0.5 * min(mean["blur"], mean["narrow"], mean["nearest"])


@pytest.mark.parametrize("kind", KINDS)
def test_search_and_fit_run_in_build_only(kind):
    """A call of the lifter, which runs in every step, has no nearest search and no plane fit."""

    def build(index):
        return Lifter.build(AnchorSet.padded(index, 16, 42), (6, 7), 14, kind)

    lifter = jax.eval_shape(build, np.arange(0, 40, 3)[None])
    program = str(
        jax.make_jaxpr(lambda lifter, values: lifter(values))(lifter, jnp.ones((1, 16, 2)))
    )
    assert "argmin" not in program
    assert " exp" not in program


def test_blur_width():
    assert blur_width(0.35) == blur_width(1.0) == 1.0
    assert blur_width(0.01) == 4.0
    assert blur_width(0.0001) == 10.0
    assert blur_width(0.25, clip=False) == 0.8
