"""Families of sigma schedules with two parameters each, for `benchmarks.plan_search`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit, ndtri

from jitjax.sampler.schedule import beta_sigmas

Sigmas = Float[np.ndarray, " steps"]


@dataclass(frozen=True)
class Family:
    """A family of schedules.

    Attributes:
        sigmas: `(steps, first, second) -> sigmas` at the start of each step, falling from 1.
        parameters: names of the two parameters.
        bounds: lowest and highest value of each parameter in a search.
        start: parameters that a local search starts from.
    """

    sigmas: Callable[[int, float, float], Sigmas]
    parameters: tuple[str, str]
    bounds: tuple[tuple[float, float], tuple[float, float]]
    start: tuple[float, float]


def shift(steps: int, mu: float, power: float) -> Sigmas:
    """FLUX's time shift e^mu of the times t^power; FLUX at 1024 pixels has mu = 1.15, power = 1."""
    times = np.linspace(1, 1 / steps, steps) ** power
    return times / (times + np.exp(-mu) * (1 - times))


def karras(steps: int, rho: float, lowest: float) -> Sigmas:
    """Evenly spaced (sigma / (1 - sigma))^(1 / rho), from 80 to `lowest`; the first sigma is 1.

    Source: Karras et al., "Elucidating the design space of diffusion-based generative models".
    """
    ratio = np.linspace(80 ** (1 / rho), lowest ** (1 / rho), steps) ** rho
    return np.append(1.0, ratio[1:] / (1 + ratio[1:]))


def logit_normal(steps: int, mean: float, deviation: float) -> Sigmas:
    """Quantiles of a logit-normal distribution; the first sigma is 1."""
    quantiles = np.linspace(1, 0, steps + 1)[1:-1]
    return np.append(1.0, expit(mean + deviation * ndtri(quantiles)))


FAMILIES = {
    "beta": Family(beta_sigmas, ("a", "b"), ((0.2, 4.0), (0.15, 1.2)), (1.4, 0.425)),
    "shift": Family(shift, ("mu", "power"), ((0, 4), (0.7, 4)), (1.15, 1)),
    "karras": Family(karras, ("rho", "lowest"), ((2, 20), (0.01, 0.8)), (7, 0.05)),
    "logit-normal": Family(logit_normal, ("mean", "deviation"), ((-1, 3), (1, 5)), (0.5, 2)),
}
"""The families by name."""
