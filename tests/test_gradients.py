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

from jitjax.denoise import FluxVelocity, denoise, flux_sigmas
from jitjax.models.flux import abstract_params
from jitjax.sampler.grid import positions
from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2
from jitjax.text import Conditioning

GRID = (4, 5)
PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0), microflow="hit", microflow_noise="initial")


def normal(seed: int, like):
    """Standard normal numbers in the shapes of `like`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)


def check(loss, point) -> None:
    """Gradients of `loss` at `point`, part by part, along a random direction each."""
    both = jax.jit(jax.value_and_grad(loss))  # one program for values and gradients
    _, gradient = both(point)
    for seed, name in enumerate(point):
        along = normal(seed, point[name])
        parts = jax.tree.map(lambda g, d: (g * d).sum(), gradient[name], along)
        told = float(sum(jax.tree.leaves(parts)))
        step = jax.tree.map(lambda d: 1e-6 * d, along)
        ends = [
            both(point | {name: jax.tree.map(move, point[name], step)})[0]
            for move in (jnp.add, jnp.subtract)
        ]
        measured = float(ends[0] - ends[1]) / 2e-6
        assert abs(told) > 1e-3
        assert told == pytest.approx(measured, rel=1e-5), name


def test_gradients_of_denoise_agree_with_finite_differences(small):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), small)
        shapes = {
            "text": (2, 7, small.config.t5.d_model),
            "pooled": (2, small.config.clip.hidden_size),
            "noise": (2, 20, 64),
        }
        rng = np.random.default_rng(0)
        point = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        weights = jnp.asarray(rng.normal(size=shapes["noise"]))

        def loss(point):
            tokens = denoise(
                dataclasses.replace(params, transformer=point["transformer"]),
                Conditioning(point["text"], point["pooled"]),
                point["noise"],
                plan=PLAN,
                grid=GRID,
                key=jax.random.key(0),
            )
            assert tokens.dtype == jnp.float64
            return (weights * tokens).sum()

        check(loss, point | {"transformer": params.transformer})


def wave(tokens, positions, sigma, valid, args):
    place = positions[..., 1:].sum(-1, keepdims=True)
    return jnp.sin(tokens + 0.3 * place) * sigma + jnp.roll(tokens, 1, axis=-1) * args


@pytest.mark.parametrize("lift", ["narrow", "linear"])
def test_gradients_through_the_other_transitions(lift):
    """The program's blend with noise of its own, padding, other lifters, a multistep solver."""
    plan = PLAN.replace(microflow="blend", lift=lift, pad_to=16)
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        noise, fresh = rng.normal(size=(2, 1, 20, 5))
        weights = jnp.asarray(rng.normal(size=noise.shape))
        sigmas = jnp.asarray(flux_sigmas(plan, 20, build.SMALL), jnp.float64)

        def loss(point):
            tokens = jit_solve(
                wave,
                point["noise"],
                sigmas,
                plan=plan,
                grid=GRID,
                first_anchors=jnp.arange(0, 20, 2)[None, : plan.budgets(20)[0]],
                microflow_noise=point["fresh"],
                args=point["args"],
                solver=AdamsBashforth2(),
            )
            return (weights * tokens).sum()

        point = {"noise": noise, "fresh": fresh, "args": np.array(0.4)}
        check(loss, {name: jnp.asarray(value) for name, value in point.items()})


def test_memory_of_the_gradient_is_near_that_of_a_checkpointed_scan():
    """Temporary memory of the compiled gradients, as XLA plans it."""
    config = build.SMALL.transformer
    velocity, plan, n = FluxVelocity(config), Plan(16), 64
    sigmas = jnp.asarray(flux_sigmas(plan, n, build.SMALL))
    shapes = abstract_params(config)
    noise = jnp.zeros((2, n, 64))
    conditioning = Conditioning(
        jnp.zeros((2, 12, config.joint_attention_dim)), jnp.zeros((2, config.pooled_projection_dim))
    )
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
        .lower(shapes, conditioning, noise)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (solved, scanned)
    }
    print(memory)
    assert memory["solved"] < 1.5 * memory["scanned"]
