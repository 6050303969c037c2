"""Operations of the network, counted by hand from its configuration; a product and sum are two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jitjax.config import TransformerConfig
from jitjax.sampler.plan import Plan


def forward(config: TransformerConfig, tokens: int, text: int) -> float:
    """Operations of one evaluation on `tokens` image tokens and `text` text tokens, one sample.

    Matrix products of the token streams, attention included; the adaLN vectors, one row per
    sample, are left out (under a thousandth at any size of interest).
    """
    hidden, length = config.hidden, tokens + text
    blocks = config.num_layers + config.num_single_layers
    # Per token 12 h^2 weights in either kind of block: qkv 3, output 1, MLP 8.
    inside = blocks * (24 * hidden**2 * length + 4 * hidden * length**2)
    outside = 2 * hidden * (2 * config.in_channels * tokens + config.joint_attention_dim * text)
    return float(inside + outside)


def run(config: TransformerConfig, slots: Sequence[int], text: int) -> float:
    """Operations of one picture: `slots` image tokens in each evaluation."""
    return sum(forward(config, tokens, text) for tokens in slots)


def slots(plan: Plan, tokens: int, text: int) -> list[int]:
    """Image tokens that each step of `plan` runs, padding included, on a grid of `tokens`."""
    budgets = plan.budgets(tokens, text)
    stages = [tokens if k == tokens else plan.slots(k, text) for k in budgets]
    return np.repeat(stages, np.diff([0, *plan.stage_steps])).tolist()
