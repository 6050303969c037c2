"""Gradients through all stages against finite differences in float64, and their memory.

The choice of anchors is piecewise constant in all inputs, so no gradient passes through it. The
finite differences here are too small to change it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

from jitjax.denoise import denoise, flux_sigmas
from jitjax.sampler.plan import PLANS, Plan
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2
from jitjax.text import Conditioning

GRID = (4, 5)
PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0), microflow="hit", microflow_noise="initial")
TWO_STAGES = PLAN.replace(steps=4, densities=(0.5, 1.0), stage_ends=(0.5, 1.0))


def normal_like(seed: int, tree):
    """Return a pytree of standard normal arrays in the shapes of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), tree)


def check_gradients(loss, inputs) -> None:
    """Check the gradient of `loss` for each entry of `inputs`, along one random direction each.

    `inputs` are float64 in NumPy, which compiles nothing for each leaf.
    """
    value_and_grad = jax.jit(jax.value_and_grad(loss))  # compiles once for values and gradients
    _, gradients = value_and_grad(inputs)
    for seed, name in enumerate(inputs):
        direction = normal_like(seed, inputs[name])
        products = jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradients[name], direction)
        derivative = float(sum(jax.tree.leaves(products)))
        above, below = (
            value_and_grad(
                inputs | {name: jax.tree.map(lambda x, d, h=h: x + h * d, inputs[name], direction)}
            )[0]
            for h in (1e-6, -1e-6)
        )
        difference = float(above - below) / 2e-6
        assert abs(derivative) > 1e-3
        assert derivative == pytest.approx(difference, rel=1e-5), name


@pytest.mark.slow
def test_gradients_of_denoise_equal_finite_differences(small):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), small)
        shapes = {
            "text": (2, 7, small.config.t5.d_model),
            "pooled": (2, small.config.clip.hidden_size),
            "noise": (2, 20, 64),
        }
        rng = np.random.default_rng(0)
        inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        inputs["transformer"] = params.transformer
        weights = rng.normal(size=shapes["noise"])

        def loss(inputs):
            tokens = denoise(
                dataclasses.replace(params, transformer=inputs["transformer"]),
                Conditioning(inputs["text"], inputs["pooled"]),
                inputs["noise"],
                plan=TWO_STAGES,
                grid=GRID,
                key=jax.random.key(0),
            )
            assert tokens.dtype == jnp.float64
            return (weights * tokens).sum()

        check_gradients(loss, inputs)


def wave(tokens, positions, sigma, valid, args):
    distance = positions[..., 1:].sum(-1, keepdims=True)
    return jnp.sin(tokens + 0.3 * distance) * sigma + jnp.roll(tokens, 1, axis=-1) * args


@pytest.mark.parametrize("lift", [pytest.param("narrow", marks=pytest.mark.slow), "linear"])
def test_gradients_of_jit_solve_equal_finite_differences(lift):
    """With "blend", separate micro-flow noise, padding, other lifters and a multistep solver."""
    plan = PLAN.replace(microflow="blend", lift=lift, pad_to=16)
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        noise, microflow_noise = rng.normal(size=(2, 1, 20, 5))
        weights = jnp.asarray(rng.normal(size=noise.shape))
        sigmas = jnp.asarray(flux_sigmas(plan, 20, build.SMALL), jnp.float64)

        def loss(inputs):
            tokens = jit_solve(
                wave,
                inputs["noise"],
                sigmas,
                plan=plan,
                grid=GRID,
                first_anchors=jnp.arange(0, 20, 2)[None, : plan.budgets(20)[0]],
                microflow_noise=inputs["microflow_noise"],
                args=inputs["args"],
                solver=AdamsBashforth2(),
            )
            return (weights * tokens).sum()

        inputs = {"noise": noise, "microflow_noise": microflow_noise, "args": np.array(0.4)}
        check_gradients(loss, inputs)


def wide(tokens, positions, sigma, valid, args):
    """A network whose activations are 64 times as large as a state."""
    x = tokens @ args["in"]
    for scale in args["layers"]:
        x = x + jnp.sin(x * scale)
    return x @ args["out"] * (0.5 + sigma)


def wide_inputs():
    """Return the arguments of `wide`, and noise of 8 x 8 tokens."""
    channels, width = 4, 256
    args = {
        "in": jnp.ones((channels, width)),
        "layers": [jnp.ones((1, 1, width))] * 3,
        "out": jnp.ones((width, channels)),
    }
    return args, jnp.ones((1, 64, channels))


def wide_loss(plan):
    """Return the sum of the result of a solve by `wide`, as a function of `wide_inputs`."""
    first = jnp.arange(plan.budgets(64)[0])[None]

    def loss(args, noise):
        return jit_solve(
            wide, noise, jnp.linspace(1, 0, plan.steps + 1), plan=plan, grid=(8, 8),
            first_anchors=first, microflow_noise=noise, args=args,
        ).sum()  # fmt: skip

    return loss


def temporary_bytes(loss):
    """Return the temporary memory of the compiled gradient, as reported by XLA."""
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*wide_inputs()).compile()
    return gradient.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_gradient_memory_is_close_to_a_checkpointed_scan():
    sigmas = jnp.linspace(1, 0, 17)
    where = jnp.zeros((1, 64, 3), int)  # `wide` does not read it

    def scan(args, noise):
        @jax.checkpoint
        def step(y, sigma_pair):
            sigma, next_sigma = sigma_pair
            return y + wide(y, where, sigma, None, args) * (next_sigma - sigma), None

        return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0].sum()

    assert temporary_bytes(wide_loss(Plan(16))) < 1.5 * temporary_bytes(scan)


@pytest.mark.parametrize("name", ["dense", pytest.param("4x", marks=pytest.mark.slow)])
def test_a_step_more_keeps_one_state_more_for_the_gradient(name):
    """An activation that is kept as well would be 64 states more in each step."""
    kept, compiled = {}, {}
    for steps in (8, 24):  # stages end in proportion, so none of them ends in its first step
        loss = wide_loss(PLANS[name].replace(steps=steps))
        # What the backward pass gets, without a program for the forward pass.
        backward = jax.make_jaxpr(lambda *x, f=loss: jax.tree.leaves(jax.vjp(f, *x)[1]))
        outputs = {id(x): x.aval for x in backward(*wide_inputs()).jaxpr.outvars}
        kept[steps] = sum(x.size * x.dtype.itemsize for x in outputs.values())
        compiled[steps] = temporary_bytes(loss)
    state = wide_inputs()[1].nbytes
    sigma = 4
    assert 16 * state <= kept[24] - kept[8] <= 16 * (state + 2 * sigma)
    assert compiled[24] - compiled[8] <= 2 * 16 * state
