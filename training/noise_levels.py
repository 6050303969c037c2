"""Which noise levels training draws; shared by the programs in torch and in JAX."""

from __future__ import annotations

SHIFT = {128: 3.0, 256: 5.0, 512: 8.0}
"""Shift of the sigmas by side in pixels. With four times the tokens a layout is visible through
twice the noise: with one shift for all sizes, only one step in twenty would teach outlines at
512 px."""
HIGH_SIGMAS, HIGH_SIGMAS_WITHIN = (0.25, 0.7), (0.8, 0.85)
"""(share, start): this share of a batch has sigmas spread evenly from start to 1, before the shift.
`HIGH_SIGMAS_WITHIN` is for windows within a thing."""
