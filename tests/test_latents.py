"""Packing latents into tokens."""

from __future__ import annotations

import jax
import numpy as np

from jitjax.latents import pack, unpack


def test_packing_is_channel_major_and_invertible():
    latents = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    # Token in row 1 and column 2 of the grid; channel 1, row 0 and column 1 of the patch.
    assert tokens[1, 5, 1 * 4 + 0 * 2 + 1] == latents[1, 2, 5, 1]
    np.testing.assert_array_equal(unpack(tokens, (2, 3)), latents)
