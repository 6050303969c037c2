"""A key decides its draws, whatever its implementation, the batch and JAX's configuration."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.denoise import batch_keys
from jitjax.latents import draw_noise
from jitjax.sampler.anchors import first_anchors
from jitjax.sampler.keys import fold_in, normal, split, threefry_keys, uniform

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
GRID = (4, 5)


def draws(key, batch: int = 3) -> dict[str, np.ndarray]:
    """Return all kinds of draws of jitjax for a batch."""
    return jax.tree.map(np.asarray, draw(key, batch))


@partial(jax.jit, static_argnums=1)
def draw(key, batch):
    keys = batch_keys(key, batch)
    noise_keys, anchor_keys = split(keys)

    def anchors(fill):
        return jax.vmap(lambda k: first_anchors(k, GRID, 13, fill=fill))(anchor_keys)

    return {
        "noise": draw_noise(noise_keys, GRID, 2),
        "random anchors": anchors("random"),
        "dithered anchors": anchors("dither"),
        "scores": jax.vmap(lambda k: uniform(k, (7,)))(fold_in(keys, jnp.full(batch, 2))),
    }


def assert_equal(got, expected):
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_draws_of_threefry_keys_are_those_of_jax_random():
    key = jax.random.key(7)
    np.testing.assert_array_equal(uniform(key, (5,)), jax.random.uniform(key, (5,)))
    np.testing.assert_array_equal(normal(key, (2, 3)), jax.random.normal(key, (2, 3)))
    first, second = split(key[None])
    expected = jax.random.key_data(jax.random.split(key))
    got = jax.random.key_data(jnp.concatenate([first, second]))
    np.testing.assert_array_equal(got, expected)
    expected = jax.random.key_data(jax.random.fold_in(key, 1))
    np.testing.assert_array_equal(jax.random.key_data(batch_keys(key, 2))[1], expected)


def test_other_keys_become_threefry_keys_by_their_words():
    """Another rule would give other pictures for the same key."""
    key = jax.random.key(3, impl="rbg")
    words = jax.random.key_data(key)
    expected = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for word in words[2:]:
        expected = jax.random.fold_in(expected, word)
    got = threefry_keys(key)
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(expected))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])  # "unsafe_rbg" has keys of "rbg"
@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.threefry_partitionable(False),
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["x64", "partitionable", "default implementation", "strict promotion"],
)
def test_draws_do_not_depend_on_the_configuration(implementation, setting):
    key = jax.random.key(3, impl=implementation)
    expected = draws(key)
    with setting():
        # By a jitted function, which is compiled outside, too; and outside of `jit`.
        assert_equal(draws(key), expected)
        noise_keys, _ = split(batch_keys(key, 3))
        np.testing.assert_array_equal(draw_noise(noise_keys, GRID, 2), expected["noise"])


@pytest.mark.parametrize(
    "implementation",
    ["threefry2x32", *(pytest.param(name, marks=pytest.mark.slow) for name in IMPLEMENTATIONS[1:])],
)
def test_each_sample_is_drawn_from_its_own_key(implementation):
    keys = jax.random.split(jax.random.key(0, impl=implementation), 3)
    batch = draws(keys)
    for i in range(3):
        alone = draws(keys[i : i + 1], 1)
        assert_equal({name: value[0] for name, value in alone.items()},
                     {name: value[i] for name, value in batch.items()})  # fmt: skip
    others = draws(keys[jnp.array([0, 2, 1])])
    assert not np.array_equal(batch["noise"][1], others["noise"][1])
    np.testing.assert_array_equal(batch["noise"][1], others["noise"][2])
    mapped = jax.vmap(lambda key: draw_noise(batch_keys(key, 1), GRID, 2))(keys)
    alone = [draw_noise(batch_keys(key, 1), GRID, 2) for key in keys]
    np.testing.assert_array_equal(mapped, jnp.stack(alone))


def test_all_words_of_a_key_count():
    keys = [
        jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="rbg")
        for words in ([1, 2, 3, 4], [0, 2, 3, 4], [1, 0, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0])
    ]
    assert len({jax.random.key_data(threefry_keys(key)).tobytes() for key in keys}) == 5


@pytest.mark.parametrize(
    "implementation", ["threefry2x32", pytest.param("rbg", marks=pytest.mark.slow)]
)
def test_raw_keys_are_those_of_their_width(implementation):
    key = jax.random.key(5, impl=implementation)
    with jax.default_prng_impl("rbg" if implementation != "rbg" else "threefry2x32"):
        assert_equal(draws(jax.random.key_data(key)), draws(key))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("key", [None, "0", 0, [], jnp.zeros(2), jnp.zeros(3, jnp.uint32)])
def test_other_keys_are_refused_by_name(key):
    with pytest.raises(ValueError, match=r"^key (is|has) .*expected jax.random.key\(seed\)"):
        batch_keys(key, 1)
