"""Which tokens are anchors: any grid, any budget, every way of choosing."""

from __future__ import annotations

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

grids = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda g: g[0] * g[1] > 1)


def layout_of(grid: tuple[int, int], budget: int, layout: str) -> set[int]:
    """The layout token by token, as the authors' program describes it."""
    rows, columns = grid
    if layout == "even":
        return {
            r * columns + c
            for r in range(rows)
            for c in range(columns)
            if (r % 2 == 0 and c % 2 == 0) or r in (0, rows - 1) or c in (0, columns - 1)
        }
    stride = max(1, int((rows * columns / budget) ** 0.5))
    down = {*range(0, rows, stride), rows - 1}
    across = {*range(0, columns, stride), columns - 1}
    return {r * columns + c for r in down for c in across}


@given(
    grids,
    st.floats(0.01, 1),
    st.sampled_from(["even", "strided"]),
    st.sampled_from(["random", "dither"]),
    st.integers(0, 9),
)
def test_first_anchors(grid, share, layout, fill, seed):
    n = grid[0] * grid[1]
    budget = max(1, int(n * share))
    with jax.disable_jit():  # hundreds of shapes, each used once
        draw = [
            np.asarray(first_anchors(jax.random.key(seed), grid, budget, layout=layout, fill=fill))
            for _ in range(2)
        ]
    got = draw[0]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (np.diff(got) > 0).all()  # rising, hence distinct
    assert got[0] >= 0
    assert got[-1] < n
    assert len(got) == budget
    base = layout_of(grid, budget, layout)
    if budget >= len(base):
        assert base <= set(got.tolist())
    else:
        assert set(got.tolist()) <= base
    corners = {0, grid[1] - 1, n - grid[1], n - 1}
    assert len(corners & set(got.tolist())) == min(len(corners), budget)


@pytest.mark.parametrize("fill", ["random", "dither"])
def test_another_key_draws_other_anchors(fill):
    sets = [
        tuple(first_anchors(jax.random.key(s), (16, 16), 90, fill=fill).tolist()) for s in range(4)
    ]
    assert len(set(sets)) == 4


def test_the_7x_budget_at_512_pixels_is_below_the_border_and_keeps_the_corners():
    budget = PLANS["7x"].budgets(32 * 32)[0]
    assert budget == 327
    assert len(layout_of((32, 32), budget, "even")) == 349
    got = set(first_anchors(jax.random.key(3), (32, 32), budget).tolist())
    assert {0, 31, 1023 - 31, 1023} <= got


def test_the_dithered_fill_is_more_even_than_the_random_one():
    """Spread of the number of anchors over blocks of 8 x 8 tokens, filled up and thinned."""

    def spread(fill, budget):
        counts = []
        for seed in range(8):
            taken = np.zeros(1024)
            taken[np.asarray(first_anchors(jax.random.key(seed), (32, 32), budget, fill=fill))] = 1
            counts.append(taken.reshape(4, 8, 4, 8)[1:3, :, 1:3].sum((1, 3)))  # no border
        return np.std(counts)

    for budget in (600, 200):
        assert spread("dither", budget) < 0.7 * spread("random", budget)


def test_dither_thresholds_are_even():
    values = dither((24, 30))
    assert values.min() >= 0
    assert values.max() < 1
    for share in (0.1, 0.35, 0.8):
        counts = (values < share).reshape(4, 6, 5, 6).sum((1, 3))  # 20 blocks of 36 tokens
        assert np.abs(counts - 36 * share).max() <= 4  # independent draws stray by 9 and more


@given(grids, st.integers(1, 3), st.integers(0, 99))
def test_local_variance_against_numpy(grid, channels, seed):
    u = np.random.default_rng(seed).normal(size=(2, grid[0] * grid[1], channels))
    u = u.astype(np.float32)
    with jax.disable_jit():
        got = local_variance(jnp.asarray(u), grid)
    expected = np.stack([oracles.importance(one, grid) for one in u])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@given(grids, st.data())
def test_activation_takes_the_highest_scores_and_keeps_the_old(grid, data):
    n = grid[0] * grid[1]
    known = data.draw(st.integers(1, n))
    budget = data.draw(st.integers(known, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    old = np.stack([rng.permutation(n)[:known] for _ in range(2)])
    scores = rng.permuted(np.tile(np.arange(n), (2, 1)), axis=1).astype(np.float32)
    anchors = AnchorSet.padded(jnp.asarray(old), known + 3, n)
    with jax.disable_jit():
        index, new = activate(anchors, jnp.asarray(scores), known, budget)
    for row in range(2):
        rest = [i for i in np.argsort(-scores[row]) if i not in set(old[row].tolist())]
        assert new[row].tolist() == rest[: budget - known]
        assert index[row].tolist() == old[row].tolist() + rest[: budget - known]


def test_the_fixed_grid_takes_even_places_first():
    grid = (8, 10)
    scores = np.asarray(fixed_grid_scores(2, grid))
    base = layout_of(grid, 80, "even")
    assert set(np.argsort(-scores[0])[: len(base)].tolist()) == base
    np.testing.assert_array_equal(scores[0], scores[1])
