"""Samplers that keep results of earlier steps: lifted changes, and presets with shorter stages.

    D  dense step     v of all tokens                                      prediction p is kept
    s  sparse step    p now = p kept + lift(p of the anchors now - p of the anchors then)

Predictions are clean ones, p = y - sigma v, or velocities, p = v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import jitjax
from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.grid import Grid, positions
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.schedule import beta_sigmas
from jitjax.sampler.solvers import named_solver
from jitjax.sampler.terms import Velocity

COMPARISONS = ("sparse", "dense", "kept")
"""Values of `CachingPlan.compare_with`."""


@dataclass(frozen=True)
class CachingPlan:
    """Dense steps, and sparse ones that lift a change of the prediction.

    Attributes:
        steps: a letter per step: "D" for a dense one, "s" for a sparse one; the first is "D".
        density: fraction of tokens that are anchors.
        compare_with: what the anchors' prediction is compared with. "sparse": that of the network
            on the anchors alone at the last dense step, one more evaluation of the anchors for
            every dense step that a sparse one follows. "dense": the dense step's own. "kept": the
            same, but the anchors also see the other tokens as they were at the dense step.
        prediction: what is kept and lifted: the "clean" prediction, or the "velocity".
        forecast: whether the kept prediction is "constant", or extrapolated by the last two dense
            steps, "linear" in log((1 - sigma) / sigma).
        lift: interpolator, as in `Plan.lift`.
        solver: "euler" or "multistep".

    Raises:
        ValueError: a field has an invalid value.
    """

    steps: str
    density: float = 0.25
    compare_with: str = "sparse"
    prediction: str = "clean"
    forecast: str = "constant"
    lift: str = "blur"
    solver: str = "multistep"

    def __post_init__(self) -> None:
        if not self.steps.startswith("D") or set(self.steps) - {"D", "s"}:
            raise ValueError(f"steps is {self.steps!r}; expected D and s, with D first")
        if self.compare_with not in COMPARISONS:
            raise ValueError(f"compare_with is {self.compare_with!r}; expected {COMPARISONS}")

    @property
    def sigmas(self) -> Float[np.ndarray, " levels"]:
        """The Beta sigmas of as many steps, and 0."""
        return np.append(beta_sigmas(len(self.steps)), 0)

    def budget(self, tokens: int) -> int:
        """Return the number of anchors of a sparse step."""
        return max(1, int(self.density * tokens))

    def slots(self, tokens: int) -> list[int]:
        """Return the number of tokens in each evaluation of the network."""
        comparisons = self.steps.count("Ds") if self.compare_with == "sparse" else 0
        sparse = self.steps.count("s") + comparisons
        return [tokens] * self.steps.count("D") + [self.budget(tokens)] * sparse


def solve(
    velocity: Velocity,
    noise: Float[Array, "b n d"],
    plan: CachingPlan,
    *,
    grid: Grid,
    anchors: Int[Array, "b k"],
    args: Any = None,
) -> Float[Array, "b n d"]:
    """Integrate from noise to clean tokens by a `CachingPlan`.

    Args:
        velocity: the velocity function. For "kept" it is also called with one sigma per token.
        noise: tokens at sigma 1.
        plan: the plan.
        grid: rows and columns of tokens.
        anchors: token indices of the anchors of all sparse steps.
        args: the last argument of `velocity`.
    """
    b, n, _ = noise.shape
    everywhere = jnp.broadcast_to(positions(jnp.arange(n), grid), (b, n, 3))
    anchor_set = AnchorSet.padded(anchors, anchors.shape[1], n)
    lifter = Lifter.build(anchor_set, grid, anchors.shape[1], plan.lift)
    gather, anchor_positions = anchor_set.gather, positions(anchors, grid)
    solver = named_solver(plan.solver)
    y, state, dense_steps, comparison = noise, None, [], None
    levels = [jnp.asarray(sigma, noise.dtype) for sigma in plan.sigmas]

    def predict(y: Array, v: Array, sigma: Array) -> Array:
        return y - sigma * v if plan.prediction == "clean" else v

    for letter, sigma, end in zip(plan.steps, levels[:-1], levels[1:], strict=True):
        if letter == "D":
            v = velocity(y, everywhere, sigma, None, args)
            dense_steps = [*dense_steps[-1:], (y, predict(y, v, sigma), sigma)]
            comparison = None
        else:
            kept_y, kept, kept_sigma = dense_steps[-1]
            if comparison is None:
                comparison = gather(kept)
                if plan.compare_with == "sparse":
                    x = gather(kept_y)
                    u = velocity(x, anchor_positions, kept_sigma, None, args)
                    comparison = predict(x, u, kept_sigma)
            forecast = jnp.zeros_like(kept)
            if plan.forecast == "linear" and len(dense_steps) == 2:
                forecast = _extrapolation(dense_steps[0][2], kept_sigma, sigma) * (
                    kept - dense_steps[0][1]
                )
            x = gather(y)
            if plan.compare_with == "kept":
                mixed = anchor_set.scatter(kept_y, x)
                levels_of_tokens = jnp.full((b, n, 1), kept_sigma)
                levels_of_tokens = anchor_set.scatter(
                    levels_of_tokens, jnp.full_like(x[..., :1], sigma)
                )
                u = gather(velocity(mixed, everywhere, levels_of_tokens, None, args))
            else:
                u = velocity(x, anchor_positions, sigma, None, args)
            now = predict(x, u, sigma)
            prediction = kept + forecast + lifter(now - comparison - gather(forecast))
            v = (y - prediction) / sigma if plan.prediction == "clean" else prediction
        term = diffrax.ODETerm(lambda t, y, v: v)
        if state is None:
            state = solver.init(term, sigma, end, y, v)
        y, _, _, state, _ = solver.step(term, sigma, end, y, v, state, made_jump=False)
    return y


def _extrapolation(before: Array, kept: Array, now: Array) -> Array:
    """Return (lambda(now) - lambda(kept)) / (lambda(kept) - lambda(before)); 0 from sigma 1."""

    def log_snr(sigma: Array) -> Array:
        return jnp.log1p(-sigma) - jnp.log(sigma)

    ratio = (log_snr(now) - log_snr(kept)) / (log_snr(kept) - log_snr(before))
    return jnp.where(before < 1, ratio, 0)


def with_steps(plan: jitjax.Plan, counts: tuple[int, ...], share: float = 1.0) -> jitjax.Plan:
    """Return a plan with another number of steps in each stage.

    Its sigmas lie on the same curve: within a stage, steps divide the Beta quantiles evenly.

    Args:
        plan: a plan with Beta sigmas.
        counts: number of steps of each stage.
        share: 1 for stages that end at the same sigmas; below 1, all stages but the last end
            after this share of the steps after which they ended, hence at higher sigmas.
    """
    from scipy.interpolate import PchipInterpolator  # monotone

    sigma_after = PchipInterpolator(
        np.arange(plan.steps + 1), np.append(beta_sigmas(plan.steps), 0)
    )
    ends = [0.0, *(share * end for end in plan.stage_steps[:-1]), plan.steps]
    done = [
        np.linspace(start, end, count, endpoint=False)
        for start, end, count in zip(ends[:-1], ends[1:], counts, strict=True)
    ]
    total = sum(counts)
    return plan.replace(
        steps=total,
        stage_ends=tuple(np.cumsum(counts) / total),
        schedule=tuple(sigma_after(np.concatenate(done)).tolist()),
    )
