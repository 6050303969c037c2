"""Gradients through all stages of `denoise`, against finite differences in float64; their memory.

Which tokens are anchors is piecewise constant in everything: no gradient passes through that
choice, and the finite differences here are too small to change it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

from jitjax.denoise import FluxVelocity, denoise
from jitjax.latents import positions
from jitjax.models.flux import abstract_params
from jitjax.plan import Plan
from jitjax.schedule import plan_sigmas
from jitjax.solve import jit_solve
from jitjax.text import Conditioning

GRID = (4, 5)
PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0))


def normal(seed: int, like):
    """Standard normal numbers in the shapes of `like`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)


@pytest.mark.parametrize(
    "plan",
    [PLAN, PLAN.replace(microflow="blend", microflow_noise="fresh", lift="linear", pad_to=16)],
    ids=["hit", "blend"],
)
def test_gradients_agree_with_finite_differences(small, plan):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), small)
        config = small.config
        shapes = {
            "text": (2, 7, config.t5.d_model),
            "pooled": (2, config.clip.hidden_size),
            "noise": (2, 20, 64),
        }
        rng = np.random.default_rng(0)
        point = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        point["transformer"] = wide.transformer
        weights = jnp.asarray(rng.normal(size=shapes["noise"]))

        @jax.jit
        def loss(point):
            tokens = denoise(
                dataclasses.replace(wide, transformer=point["transformer"]),
                Conditioning(point["text"], point["pooled"]),
                point["noise"],
                plan=plan,
                grid=GRID,
                key=jax.random.key(0),
            )
            assert tokens.dtype == jnp.float64
            return (weights * tokens).sum()

        gradient = jax.jit(jax.grad(loss))(point)
        for seed, name in enumerate(point):
            along = normal(seed, point[name])
            parts = jax.tree.map(lambda g, d: (g * d).sum(), gradient[name], along)
            told = float(sum(jax.tree.leaves(parts)))
            step = jax.tree.map(lambda d: 1e-6 * d, along)
            ends = [
                loss(point | {name: jax.tree.map(move, point[name], step)})
                for move in (jnp.add, jnp.subtract)
            ]
            measured = float(ends[0] - ends[1]) / 2e-6
            assert abs(told) > 1e-3
            assert told == pytest.approx(measured, rel=1e-5), name


def test_memory_of_the_gradient_is_near_that_of_a_checkpointed_scan():
    """Temporary memory of the compiled gradients, as XLA plans it."""
    config = build.SMALL.transformer
    velocity, plan, n = FluxVelocity(config), Plan(16), 64
    sigmas = jnp.asarray(plan_sigmas(plan, n, build.SMALL))
    shapes = abstract_params(config)
    noise = jax.ShapeDtypeStruct((2, n, 64), jnp.float32)
    text = jax.ShapeDtypeStruct((2, 12, config.joint_attention_dim), jnp.float32)
    pooled = jax.ShapeDtypeStruct((2, config.pooled_projection_dim), jnp.float32)
    places = jnp.broadcast_to(positions(jnp.arange(n), (8, 8)), (2, n, 3))

    def solved(params, conditioning, noise):
        args = (params, conditioning, jnp.full((2,), 3.5))
        return jit_solve(velocity, noise, sigmas, plan=plan, grid=(8, 8), args=args).sum()

    def scanned(params, conditioning, noise):
        @jax.checkpoint
        def step(y, ends):
            args = (params, conditioning, jnp.full((2,), 3.5))
            return y + velocity(y, places, ends[0], None, args) * (ends[1] - ends[0]), None

        pairs = jnp.stack([sigmas[:-1], sigmas[1:]], axis=1)
        return jax.lax.scan(step, noise, pairs)[0].sum()

    memory = {
        f.__name__: jax.jit(jax.grad(f))
        .lower(shapes, Conditioning(text, pooled), noise)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (solved, scanned)
    }
    print(memory)
    assert memory["solved"] < 1.5 * memory["scanned"]
