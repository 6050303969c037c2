"""FLOPs of the transformer, computed from its configuration; a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jitjax.config import TransformerConfig
from jitjax.sampler.plan import Plan
from jitjax.sampler.solvers import evaluations_per_step


def forward(config: TransformerConfig, tokens: int, text: int) -> float:
    """Count the FLOPs of one evaluation of one sample.

    Counts the matrix products of the token streams, attention included. The adaLN modulation, one
    row per sample, is left out: it is less than a thousandth at any size of interest.

    Args:
        config: configuration of the transformer.
        tokens: number of image tokens.
        text: number of text tokens.
    """
    hidden, length = config.hidden, tokens + text
    blocks = config.num_layers + config.num_single_layers
    # Double and single blocks both have 12 hidden^2 weights per token: QKV 3, output 1, MLP 8.
    blocks_flops = blocks * (24 * hidden**2 * length + 4 * hidden * length**2)
    # Image tokens in and out, text tokens in.
    image_channels = config.in_channels + config.out_channels
    projections = image_channels * tokens + config.joint_attention_dim * text
    return float(blocks_flops + 2 * hidden * projections)


def run(config: TransformerConfig, slots: Sequence[int], text: int) -> float:
    """Count the FLOPs of one image, given the number of image tokens in each evaluation."""
    return sum(forward(config, tokens, text) for tokens in slots)


def slots(plan: Plan, tokens: int, text: int) -> list[int]:
    """Return the number of image tokens in each evaluation of a plan, padding included.

    Args:
        plan: the plan.
        tokens: number of tokens of the whole grid.
        text: number of text tokens.

    Raises:
        ValueError: the number of evaluations per step of the plan's solver is unknown.
    """
    per_step = 1 if isinstance(plan.solver, str) else evaluations_per_step(plan.solver)
    if per_step is None:
        raise ValueError(
            f"Plan.solver is {plan.solver!r}; expected one whose evaluations per step are known"
        )
    budgets = plan.budgets(tokens, text)
    stages = [tokens if k == tokens else plan.slots(k, text) for k in budgets]
    return np.repeat(stages, np.diff([0, *plan.stage_steps]) * per_step).tolist()
