"""Training with tokens missing, on a small random transformer."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.config import TransformerConfig
from jitjax.models import param_shapes
from jitjax.models.flux import FluxTransformer
from jitjax.sampler.anchors import layout_priority, local_variance
from training.missing_tokens import (
    GRID,
    TOKENS,
    Scenes,
    draw_batch,
    draw_subset,
    loss_parts,
    make_optimizer,
    make_update,
    token_weights,
)

CONFIG = TransformerConfig(
    in_channels=64,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    rng = np.random.default_rng(1)
    things = np.zeros((3, 4, 3), np.float32)
    things[:, 0] = 0.5, 0.25, 0.125
    return Scenes(
        jnp.asarray(rng.normal(0, 0.1, (3, TOKENS, 64)).astype(np.float16)),
        jnp.asarray(things),
        jnp.asarray([[0, 1], [2, 3], [4, 5]]),
        jnp.asarray(rng.normal(size=(7, 4, 6)).astype(np.float16)),
        jnp.asarray(rng.normal(size=(7, 5)).astype(np.float32)),
    )


def test_weights_are_highest_around_a_thing_unless_noise_hides_it(scenes):
    weigh = jax.jit(token_weights)
    weights = np.asarray(weigh(scenes.things[0], jnp.asarray(0.4))).reshape(GRID)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    # 4 + 1 tokens on each side of (row 8, column 16): 10 x 10 tokens, sqrt(1024 / 100) times more.
    inside = np.zeros(GRID, bool)
    inside[3:13, 11:21] = True
    assert weights[inside].std() < 1e-5
    assert weights[inside][0] / weights[~inside][0] == pytest.approx(3.2, rel=1e-5)
    np.testing.assert_allclose(weigh(scenes.things[0], jnp.asarray(0.8)), 1, rtol=1e-6)


def test_batches(scenes):
    draw = jax.jit(draw_batch, static_argnums=(2, 3))
    batch = jax.tree.map(np.asarray, draw(jax.random.key(0), scenes, 64, 0.25))
    assert batch.x0.shape == batch.noise.shape == (64, TOKENS, 64)
    # FLUX's time shift of 8 moves the median of 0.6 to above 0.92.
    assert 0.5 < batch.sigma.min() < 0.92 < np.median(batch.sigma) < batch.sigma.max() < 1
    assert 2 <= batch.guidance.min() < 2.2 < 3.8 < batch.guidance.max() <= 4
    assert 5 < (batch.rows == 6).sum() < 30  # a quarter has no caption
    shown = [tuple(row) for row in np.asarray(scenes.tokens, float)[:, 0, :4]]
    for row, x0 in zip(batch.rows.tolist(), batch.x0[:, 0, :4], strict=True):
        assert row == 6 or tuple(x0) == shown[row // 2]  # the caption is the picture's


@pytest.mark.slow
def test_subsets_hold_the_layout_or_the_most_important_tokens():
    velocity = np.random.default_rng(2).normal(size=(64, TOKENS, 8)).astype(np.float32)
    draw = jax.jit(draw_subset, static_argnums=2)
    chosen = np.asarray(draw(jax.random.key(3), velocity, 400))
    assert (np.diff(chosen) > 0).all()
    layout = np.flatnonzero(layout_priority(GRID))
    with_layout = [np.isin(layout, row).all() for row in chosen]
    assert 40 < sum(with_layout) < 62  # four of five
    importance = np.asarray(jax.jit(local_variance, static_argnums=1)(velocity, GRID))
    ranks = importance.argsort(axis=1).argsort(axis=1)
    free = np.array([ranks[i][np.setdiff1d(row, layout)].mean() for i, row in enumerate(chosen)])
    # Tokens beyond the layout are the most important ones, or random, in equal shares.
    assert 20 < (free > 700).sum() < 44


@pytest.mark.slow
def test_the_loss_of_a_batch_falls(scenes):
    rng = np.random.default_rng(4)

    def random_weights() -> dict:
        shapes = param_shapes.transformer(CONFIG)
        return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)

    weights, teacher = random_weights(), random_weights()
    settings = {"model": FluxTransformer(CONFIG), "sizes": (1, 2), "count": 320, "dropout": 0.1}
    gradient = jax.jit(jax.grad(partial(loss_parts, **settings), has_aux=True))
    optimizer = make_optimizer(weights, 0.05, 0.01)
    update = make_update(optimizer, 0.9)
    moments = jax.jit(optimizer.init)(weights)
    state = (weights, jax.tree.map(np.copy, weights), moments, np.float32(0))
    losses = []
    for _ in range(8):
        slope, parts = gradient(state[0], teacher, jax.random.key(5), scenes)
        losses.append(np.asarray(parts))
        averaged = jax.tree.map(np.array, state[1])  # copies, because `update` donates the state
        state = update(state, slope, np.float32(1))
    assert (losses[-1] < 0.7 * losses[0]).all(), losses
    # The eighth update moves the average 1 - (1 + 7) / (10 + 7) = 9 / 17 of the way.
    expected = jax.tree.map(lambda a, w: a + 9 / 17 * (np.asarray(w) - a), averaged, state[0])
    for got, want in zip(jax.tree.leaves(state[1]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
