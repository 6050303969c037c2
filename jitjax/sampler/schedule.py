"""Sigmas (noise levels) of the steps: sigma is 1 for pure noise and 0 for the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jitjax.sampler.plan import Plan

BETA_A, BETA_B = 1.4, 0.425
"""Parameters of the Beta quantile schedule, from the authors' program: many steps near sigma 1."""


@dataclass(frozen=True)
class Shift:
    """How far `shifted_sigmas` moves the steps towards sigma 1.

    Attributes:
        dynamic: whether the shift depends on the number of tokens.
        base_shift: exponent mu of the dynamic shift at `base_seq` tokens.
        max_shift: exponent mu of the dynamic shift at `max_seq` tokens; mu is linear in the number
            of tokens.
        base_seq: number of tokens at which mu is `base_shift`.
        max_seq: number of tokens at which mu is `max_shift`; not `base_seq`.
        shift: constant factor of the shift if `dynamic` is False, above 0; 1 moves nothing.

    Source: FLUX's schedule, as the scheduler of its diffusers folders names it (`dynamic` is
    `use_dynamic_shifting`, `base_seq` is `base_image_seq_len`, `max_seq` is `max_image_seq_len`).

    Examples:
        >>> jitjax.sampler.Shift(True, 0.5, 1.15, 256, 4096, 3.0)  # FLUX.1-dev
        Shift(dynamic=True, base_shift=0.5, max_shift=1.15, base_seq=256, max_seq=4096, shift=3.0)
    """

    dynamic: bool
    base_shift: float
    max_shift: float
    base_seq: int
    max_seq: int
    shift: float


def beta_sigmas(steps: int, a: float = BETA_A, b: float = BETA_B) -> np.ndarray:
    """Compute the Beta schedule: sigmas at quantiles of Beta(a, b).

    Source: the authors' program (FLUX.1 presets), with a = 1.4 and b = 0.425.

    Args:
        steps: number of steps, 1 or more.
        a, b: parameters of the distribution, positive. A lower b puts more steps near sigma 1, a
            lower a more near 0.

    Returns:
        Sigma at the start of each step, float64 [steps]; falls from 1 to 1 / steps.

    Examples:
        >>> jitjax.sampler.beta_sigmas(4).round(3)
        array([1.   , 0.962, 0.793, 0.25 ])
    """
    # Imported here, because it takes a sixth of a second.
    from scipy.special import betaincinv

    lowest = 1 / steps
    quantiles = betaincinv(a, b, np.linspace(1, 0, steps))
    return lowest + (1 - lowest) * quantiles


def shifted_sigmas(steps: int, tokens: int, shift: Shift) -> np.ndarray:
    """Compute the shifted schedule: evenly spaced sigmas, moved towards 1.

    A dynamic shift grows with the number of tokens; otherwise the shift is constant. Source: the
    schedules of FLUX.1-dev (dynamic) and FLUX.1-schnell (constant).

    Args:
        steps: number of steps, 1 or more.
        tokens: number of tokens of the grid, 1 or more; used by a dynamic shift only.
        shift: parameters of the shift.

    Returns:
        Sigma at the start of each step, float64 [steps]; falls from 1.

    Examples:
        >>> shift = jitjax.sampler.Shift(True, 0.5, 1.15, 256, 4096, 3.0)  # FLUX.1-dev
        >>> jitjax.sampler.shifted_sigmas(4, 4096, shift).round(3)
        array([1.   , 0.905, 0.76 , 0.513])
    """
    even = np.linspace(1, 1 / steps, steps)
    if not shift.dynamic:
        return shift.shift * even / (1 + (shift.shift - 1) * even)
    slope = (shift.max_shift - shift.base_shift) / (shift.max_seq - shift.base_seq)
    mu = shift.base_shift + slope * (tokens - shift.base_seq)
    return math.exp(mu) / (math.exp(mu) + 1 / even - 1)


def plan_sigmas(plan: Plan, tokens: int, shift: Shift) -> np.ndarray:
    """Compute the sigmas of a plan.

    Args:
        plan: the plan; its `schedule` names the schedule or lists the sigmas.
        tokens: number of tokens of the grid, 1 or more.
        shift: parameters of the "shifted" schedule.

    Returns:
        Sigmas at the step boundaries, [plan.steps + 1], float32, strictly decreasing in [0, 1]; the
        last is 0.

    Raises:
        ValueError: the plan has so many steps that neighbouring sigmas are equal in float32.
    """
    if plan.schedule[0] == "beta":
        a, b = (float(parameter) for parameter in plan.schedule[1:])
        starts = beta_sigmas(plan.steps, a, b)
    elif not isinstance(plan.schedule, str):
        starts = np.asarray(plan.schedule)
    elif plan.schedule == "beta":
        starts = beta_sigmas(plan.steps)
    else:
        starts = shifted_sigmas(plan.steps, tokens, shift)
    sigmas = np.append(starts, 0.0).astype(np.float32)
    equal = np.flatnonzero(np.diff(sigmas) >= 0)
    if equal.size:
        name = plan.schedule if isinstance(plan.schedule[0], str) else "its own"
        raise ValueError(
            f"Plan has {plan.steps} steps, too many for the schedule {name!r}: in float32, sigma "
            f"does not fall in {equal.size} of them (first in step {equal[0]}); expected fewer"
        )
    return sigmas
