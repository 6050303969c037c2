"""Entering a plan after its start, for solves that begin with a picture instead of noise.

    steps    0   1   2 | 3   4 | 5   6   7   8   9       three stages
    kept                     4 | 5   6   7   8   9       at strength 0.6: two stages

Source: `FluxImg2ImgPipeline.get_timesteps` of diffusers 0.42, for plans of one stage.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jitjax.sampler.plan import Plan


def check_strength(strength: Any) -> float:
    """Return a strength as a Python number.

    Raises:
        ValueError: it is outside (0, 1].
        TypeError: it is no number, or traced.
    """
    number = isinstance(strength, (int, float, np.integer, np.floating))
    if not number or isinstance(strength, bool):
        kind = type(strength).__name__
        raise TypeError(
            f"strength is {kind}; expected a number in (0, 1], which decides the number of steps"
        )
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; expected a number in (0, 1]")
    return float(strength)


def first_step(steps: int, strength: float) -> int:
    """Return how many of the first steps a strength drops, below `steps`.

    About (1 - strength) of them, rounded down. The arithmetic is that of diffusers to the last bit:
    at 100 steps and strength 0.55, 44 are dropped and not 45, since 100 * 0.55 is above 55.
    """
    return min(int(max(steps - min(steps * strength, steps), 0)), steps - 1)


def enter_plan(plan: Plan, sigmas: np.ndarray, strength: float) -> Plan:
    """Return the plan without the steps that a strength drops.

    A stage loses its dropped steps, and vanishes with the last of them. The first stage left gets
    first anchors in its own number, by the plan's layout. The context of inpainting stays that of
    the whole plan.

    Args:
        plan: the plan.
        sigmas: its sigmas, [plan.steps + 1], the last 0.
        strength: share of the steps to keep, in (0, 1]. At least one step is kept; 1 returns the
            plan unchanged.

    Returns:
        A plan whose schedule is the tuple of the sigmas left.

    Raises:
        ValueError: the strength is outside (0, 1].
        TypeError: it is no number, or traced.
    """
    start = first_step(plan.steps, check_strength(strength))
    if start == 0:
        return plan
    steps = plan.steps - start
    ends = [end - start for end in plan.stage_steps if end > start]
    return plan.replace(
        steps=steps,
        densities=plan.densities[-len(ends) :],
        stage_ends=tuple(end / steps for end in ends),
        schedule=tuple(map(float, sigmas[start:-1])),
        context=plan.context_density,
    )
