"""Noise levels (sigma) of the steps: 1 is pure noise, 0 the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from jitjax.sampler.plan import Plan

BETA_A, BETA_B = 1.4, 0.425
"""The quantile function that the authors use for FLUX.1: many steps near sigma 1."""


@dataclass(frozen=True)
class Shift:
    """How far FLUX's own schedule moves the steps towards sigma 1.

    Attributes:
        dynamic: by the number of tokens, from `base_shift` at `base_seq` to `max_shift` at
            `max_seq`, linear between; if not, by the constant `shift`.
    """

    dynamic: bool
    base_shift: float
    max_shift: float
    base_seq: int
    max_seq: int
    shift: float


def beta_sigmas(steps: int) -> np.ndarray:
    """Sigma at the start of each step, [steps], by quantiles of Beta(1.4, 0.425).

    They fall from 1 to 1 / steps. Source: the authors' program (FLUX.1 presets).
    """
    lowest = 1 / steps
    quantiles = betaincinv(BETA_A, BETA_B, np.linspace(1, 0, steps))
    return lowest + (1 - lowest) * quantiles


def shifted_sigmas(steps: int, tokens: int, by: Shift) -> np.ndarray:
    """Sigma at the start of each step, [steps], by FLUX's own schedule for `tokens` tokens.

    Even steps from 1 to 1 / steps, moved towards 1 the more, the more tokens there are
    (FLUX.1-dev) or by a constant (models without dynamic shift, such as FLUX.1-schnell).
    """
    even = np.linspace(1, 1 / steps, steps)
    if not by.dynamic:
        return by.shift * even / (1 + (by.shift - 1) * even)
    slope = (by.max_shift - by.base_shift) / (by.max_seq - by.base_seq)
    mu = by.base_shift + slope * (tokens - by.base_seq)
    return math.exp(mu) / (math.exp(mu) + 1 / even - 1)


def plan_sigmas(plan: Plan, tokens: int, shift: Shift) -> np.ndarray:
    """The `steps + 1` sigmas that the steps of `plan` run between, float32; the last is 0."""
    if not isinstance(plan.schedule, str):
        starts = np.asarray(plan.schedule)
    elif plan.schedule == "beta":
        starts = beta_sigmas(plan.steps)
    else:
        starts = shifted_sigmas(plan.steps, tokens, shift)
    return np.append(starts, 0.0).astype(np.float32)
