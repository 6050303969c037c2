"""The choice of anchors, for any grid and budget and every option."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitjax.sampler.anchors import (
    AnchorSet,
    activate,
    dither,
    first_anchors,
    fixed_grid_scores,
    local_variance,
)
from jitjax.sampler.plan import PLANS

# Few, because every shape is compiled.
grids = st.sampled_from([(1, 2), (7, 1), (2, 2), (5, 6), (9, 4)])
shares = st.sampled_from([0.01, 0.2, 0.35, 0.62, 1])


def layout_tokens(grid: tuple[int, int], budget: int, layout: str) -> set[int]:
    """Return the token indices of a layout, token by token, as the authors' program defines it."""
    rows, columns = grid
    if layout == "even":
        return {
            r * columns + c
            for r in range(rows)
            for c in range(columns)
            if (r % 2 == 0 and c % 2 == 0) or r in (0, rows - 1) or c in (0, columns - 1)
        }
    stride = max(1, int((rows * columns / budget) ** 0.5))
    layout_rows = {*range(0, rows, stride), rows - 1}
    layout_columns = {*range(0, columns, stride), columns - 1}
    return {r * columns + c for r in layout_rows for c in layout_columns}


@given(
    grids,
    shares,
    st.sampled_from(["even", "strided"]),
    st.sampled_from(["random", "dither"]),
    st.integers(0, 9),
)
def test_first_anchors(grid, density, layout, fill, seed):
    n = grid[0] * grid[1]
    budget = max(1, int(n * density))
    draws = [
        np.asarray(first_anchors(jax.random.key(seed), grid, budget, layout=layout, fill=fill))
        for _ in range(2)
    ]
    anchors = draws[0]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (np.diff(anchors) > 0).all()  # ascending, hence distinct
    assert anchors[0] >= 0
    assert anchors[-1] < n
    assert len(anchors) == budget
    expected = layout_tokens(grid, budget, layout)
    if budget >= len(expected):
        assert expected <= set(anchors.tolist())
    else:
        assert set(anchors.tolist()) <= expected
    corners = {0, grid[1] - 1, n - grid[1], n - 1}
    assert len(corners & set(anchors.tolist())) == min(len(corners), budget)


@pytest.mark.parametrize("fill", ["random", "dither"])
def test_different_keys_draw_different_anchors(fill):
    anchors = [
        tuple(first_anchors(jax.random.key(s), (16, 16), 90, fill=fill).tolist()) for s in range(4)
    ]
    assert len(set(anchors)) == 4


def test_first_anchors_below_the_layout_size_keep_the_corners():
    budget = PLANS["7x"].budgets(32 * 32)[0]  # 512 pixels
    assert budget == 327
    assert len(layout_tokens((32, 32), budget, "even")) == 349
    anchors = set(first_anchors(jax.random.key(3), (32, 32), budget).tolist())
    assert {0, 31, 1023 - 31, 1023} <= anchors


def test_dither_fill_is_more_even_than_random_fill():
    """The number of anchors per block of 8 x 8 tokens varies less, for 600 and for 200 anchors."""

    def spread(fill, budget):
        counts = []
        for seed in range(8):
            is_anchor = np.zeros(1024)
            anchors = first_anchors(jax.random.key(seed), (32, 32), budget, fill=fill)
            is_anchor[np.asarray(anchors)] = 1
            counts.append(is_anchor.reshape(4, 8, 4, 8)[1:3, :, 1:3].sum((1, 3)))  # no border
        return np.std(counts)

    for budget in (600, 200):
        assert spread("dither", budget) < 0.7 * spread("random", budget)


def test_dither_thresholds_are_even():
    values = dither((24, 30))
    assert values.min() >= 0
    assert values.max() < 1
    for threshold in (0.1, 0.35, 0.8):
        counts = (values < threshold).reshape(4, 6, 5, 6).sum((1, 3))  # 20 blocks of 36 tokens
        assert np.abs(counts - 36 * threshold).max() <= 4  # 9 and more for independent draws


@given(grids, st.sampled_from([1, 3]), st.integers(0, 99))
def test_local_variance_equals_numpy(grid, channels, seed):
    u = np.random.default_rng(seed).normal(size=(2, grid[0] * grid[1], channels))
    u = u.astype(np.float32)
    got = jax.jit(local_variance, static_argnums=1)(jnp.asarray(u), grid)
    expected = np.stack([oracles.importance(sample, grid) for sample in u])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@partial(jax.jit, static_argnums=(2, 3))
def pad_and_activate(old, scores, old_budget, budget):
    anchors = AnchorSet.padded(old, old_budget + 3, scores.shape[1])
    return activate(anchors, scores, old_budget, budget)


@given(grids, shares, shares, st.integers(0, 99))
def test_activate_keeps_old_anchors_and_adds_the_highest_scores(grid, first, second, seed):
    n = grid[0] * grid[1]
    old_budget, budget = sorted(max(1, int(n * share)) for share in (first, second))
    rng = np.random.default_rng(seed)
    old = np.stack([rng.permutation(n)[:old_budget] for _ in range(2)])
    scores = rng.permuted(np.tile(np.arange(n), (2, 1)), axis=1).astype(np.float32)
    index, new = (np.asarray(x) for x in pad_and_activate(old, scores, old_budget, budget))
    for sample in range(2):
        is_old = set(old[sample].tolist())
        ranked = [i for i in np.argsort(-scores[sample]) if i not in is_old]
        assert new[sample].tolist() == ranked[: budget - old_budget]
        assert index[sample].tolist() == old[sample].tolist() + ranked[: budget - old_budget]


def test_fixed_grid_scores_rank_the_even_layout_first():
    grid = (8, 10)
    scores = np.asarray(fixed_grid_scores(2, grid))
    expected = layout_tokens(grid, 80, "even")
    assert set(np.argsort(-scores[0])[: len(expected)].tolist()) == expected
    np.testing.assert_array_equal(scores[0], scores[1])
