"""Attention on a CPU: one head and one block of queries at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.models import attention


def arrays(dtype: str, tokens: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, tokens, 3, 8), dtype) for key in keys]


@pytest.mark.parametrize("valid", [37, 29])
@pytest.mark.parametrize("block", [1, 5, 36, 37])
def test_blocks_equal_the_formula(monkeypatch, block: int, valid: int):
    monkeypatch.setattr(attention, "CPU_QUERIES", block)
    query, key, value = arrays("float32", 37)
    mask = None
    if valid < 37:
        mask = jnp.broadcast_to(jnp.arange(37) < valid, (2, 1, 1, 37))
        # Values that would be seen in any result that attends to padding.
        key, value = (jnp.where(mask[:, 0, 0, :, None, None], x, 1e6) for x in (key, value))
    got = jax.jit(attention._attend_per_head)(query, key, value, mask)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key[:, :valid], value[:, :valid]))
    logits = np.einsum("bqhw,bkhw->bhqk", q, k) / 8**0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhw->bqhw", weights, v)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)


@pytest.mark.slow
def test_blocks_have_the_derivatives_of_one_block(monkeypatch):
    inputs = arrays("float32", 37)

    def loss(*inputs: jax.Array) -> jax.Array:
        return (attention._attend_per_head(*inputs, None) ** 2).sum()

    def derivatives() -> tuple:
        # jit in a function of its own, so that the block's size is read again.
        backward = jax.jit(lambda *x: jax.grad(loss, (0, 1, 2))(*x))(*inputs)
        forward = jax.jit(lambda *x: jax.jvp(loss, x, x)[1])(*inputs)
        return *backward, forward

    expected = derivatives()
    monkeypatch.setattr(attention, "CPU_QUERIES", 5)
    for got, want in zip(derivatives(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("tokens", "heads"), [(4608, 24), (65536, 1)])
def test_no_more_than_a_block_of_logits_of_one_head_is_held(tokens: int, heads: int):
    """In FLUX at 1024 px, and in the autoencoder at 2048 px, forwards and for a gradient.

    The largest arrays of the traced program are looked at. XLA's own account of memory leaves out
    what its fused kernels on a CPU hold.
    """
    array = jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.float32)

    def loss(*inputs: jax.Array) -> jax.Array:
        return attention._attend_per_head(*inputs, None).sum()

    for function in (loss, jax.grad(loss, (0, 1, 2))):
        program = str(jax.make_jaxpr(function)(array, array, array))
        assert f"{attention.CPU_QUERIES},{tokens}]" in program
        assert f"{tokens},{tokens}" not in program
        assert f",{attention.CPU_QUERIES},{tokens}]" not in program  # of several blocks
