"""`sample(trace=True)`: the pictures, and the record of how they were made."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_runs import GRID, HEIGHT, PROMPTS, SIZE, SPARSE, WIDTH

import jitjax
from jitjax.denoise import batch_keys, flux_sigmas
from jitjax.latents import draw_noise
from jitjax.sampler.keys import split
from jitjax.sampler.plan import Plan

PLAN = SPARSE.replace(steps=3, microflow_noise="fresh")
"""A step on 5 of 8 tokens, two on all."""
KEY = jax.random.key(3)


def noise_and_keys() -> tuple[jax.Array, jax.Array]:
    noise_keys, denoise_keys = split(batch_keys(KEY, len(PROMPTS)))
    return draw_noise(noise_keys, GRID, 64), denoise_keys


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).random((1, HEIGHT, WIDTH, 3), np.float32)


@pytest.fixture(scope="module")
def made(small):
    return jitjax.sample(small, PROMPTS, key=KEY, plan=PLAN, trace=True, **SIZE)


def test_pictures_are_the_same_and_the_trace_is_that_of_denoise(small, made):
    images, trace = made
    plain = jitjax.sample(small, PROMPTS, key=KEY, plan=PLAN, **SIZE)
    np.testing.assert_array_equal(images, plain)
    noise, keys = noise_and_keys()
    text = jitjax.encode_prompt(small, PROMPTS)
    tokens, expected = jitjax.denoise(
        small, text, noise, plan=PLAN, grid=GRID, key=keys, trace=True
    )
    np.testing.assert_array_equal(trace.states[-1], tokens)
    jax.tree.map(np.testing.assert_array_equal, trace, expected)
    np.testing.assert_array_equal(trace.start, noise)
    assert trace.stage_steps == (1, 2)
    assert [anchors.shape for anchors in trace.anchors] == [(2, 5), (2, 8)]


def test_without_it_nothing_is_recorded(small):
    """The program is the one of `denoise` without a trace: fewer outputs, and no stacked states."""
    text = jitjax.encode_prompt(small, PROMPTS)

    def outputs(**options):
        make = lambda key: jitjax.sample(small, text, key=key, plan=PLAN, **SIZE, **options)  # noqa: E731
        return jax.make_jaxpr(make)(KEY)

    assert str(outputs()) == str(outputs(trace=False))
    shapes = [x.aval.shape for x in outputs(trace=False).jaxpr.outvars]
    assert shapes == [(2, 32, 64, 3)]
    assert (3, 2, 8, 64) in [x.aval.shape for x in outputs(trace=True).jaxpr.outvars]
    assert inspect.signature(jitjax.sample).parameters["trace"].default is False


@pytest.mark.slow
def test_under_jit(small, made):
    images, trace = made
    text = jitjax.encode_prompt(small, PROMPTS)
    jitted = jax.jit(lambda key: jitjax.sample(small, text, key=key, plan=PLAN, trace=True, **SIZE))
    got_images, got = jitted(KEY)
    np.testing.assert_allclose(got_images, images, atol=1e-4)
    np.testing.assert_allclose(got.states, trace.states, atol=1e-4)
    np.testing.assert_array_equal(got.anchors[0], trace.anchors[0])


@pytest.mark.slow
def test_from_a_picture(small, picture):
    """The first state is the mixture of its clean tokens and the noise."""
    dense = Plan(4)
    images, trace = jitjax.sample(
        small, PROMPTS, key=KEY, plan=dense, image=picture, strength=0.5, trace=True
    )
    sigma = flux_sigmas(dense, 8, small.config)[2]
    clean = jitjax.encode(small, jnp.repeat(jnp.asarray(picture), 2, 0))
    noise, _ = noise_and_keys()
    np.testing.assert_allclose(trace.start, (1 - sigma) * clean + sigma * noise, atol=1e-5)
    assert trace.stage_steps == (2,)
    np.testing.assert_array_equal(jitjax.decode(small, trace.states[-1], grid=GRID), images)


@pytest.mark.slow
def test_inside_a_mask(small, picture):
    """Tokens outside of the mask end as those of the picture."""
    mask = np.zeros((1, HEIGHT, WIDTH), np.float32)
    mask[:, :16, :16] = 1
    images, trace = jitjax.sample(
        small, PROMPTS, key=KEY, plan=PLAN, image=picture, mask=mask, trace=True
    )
    clean = jitjax.encode(small, jnp.repeat(jnp.asarray(picture), 2, 0))
    np.testing.assert_allclose(trace.states[-1][:, 7], clean[:, 7], atol=1e-5)
    assert np.abs(trace.states[-1][:, 0] - clean[:, 0]).max() > 0.1
    np.testing.assert_array_equal(images[:, 16:], np.repeat(picture[:, 16:], 2, 0))
    plain = jitjax.sample(small, PROMPTS, key=KEY, plan=PLAN, image=picture, mask=mask)
    np.testing.assert_array_equal(images, plain)


@pytest.mark.slow
def test_with_a_negative_prompt(small):
    options = {"plan": PLAN, "guidance": 2.0, **SIZE}
    images, trace = jitjax.sample(
        small, PROMPTS, key=KEY, negative_prompt="stripes", trace=True, **options
    )
    plain = jitjax.sample(small, PROMPTS, key=KEY, negative_prompt="stripes", **options)
    np.testing.assert_array_equal(images, plain)
    noise, keys = noise_and_keys()
    text, negative = (jitjax.encode_prompt(small, p) for p in (PROMPTS, "stripes"))
    tokens = jitjax.denoise(
        small, text, noise, plan=PLAN, grid=GRID, guidance=2.0, key=keys, negative=negative
    )
    np.testing.assert_allclose(trace.states[-1], tokens, atol=1e-4)


def test_only_of_pictures_that_are_made_at_once(small, made):
    with pytest.raises(ValueError, match=r"chunk is 1; expected None, or 2 or more"):
        jitjax.sample(small, PROMPTS, key=KEY, plan=PLAN, chunk=1, trace=True, **SIZE)
    images, _ = jitjax.sample(small, PROMPTS, key=KEY, plan=PLAN, chunk=2, trace=True, **SIZE)
    np.testing.assert_array_equal(images, made[0])
