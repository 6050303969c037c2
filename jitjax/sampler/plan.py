"""What a run does, apart from the model: steps, stages, anchors, lifting, micro-flow."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

CHOICES = {
    "first": ("even", "strided"),
    "fill": ("random", "dither"),
    "activation": ("importance", "grid", "random"),
    "lift": ("blur", "narrow", "linear", "nearest", "none"),
    "microflow": ("blend", "hit", "none"),
    "microflow_noise": ("fresh", "initial"),
    "spare": ("padding", "anchors"),
}
"""What each choice of a `Plan` may be."""
SCHEDULES = ("beta", "shifted")


@dataclass(frozen=True)
class Plan:
    """What a run does, apart from the model.

    Attributes:
        steps: steps of the solver; with Euler's, one network evaluation each.
        densities: share of tokens that are anchors, per stage; rising, the last is 1.
        stage_ends: share of the steps after which each stage ends; rising, the last is 1.
        schedule: "beta" (the authors' Beta quantiles), "shifted" (FLUX's own, shifted by
            resolution) or the sigmas themselves: one per step, falling, in (0, 1].
        first: the first anchors' layout: "even" rows and columns and the border, or "strided",
            every s-th of both (the program's `use_checkerboard_init=False`).
        fill: which tokens complete or thin that layout to the budget: "random" ones (the
            program) or evenly spread ones ("dither").
        activation: the later anchors: by "importance", or, to compare with, on a fixed "grid"
            (the paper's ablation) or at "random".
        lift: how values on anchors reach other tokens, see `jitjax.sampler.lifter`; "none" leaves
            the others' velocity 0 (the paper's ablation).
        microflow: how new tokens reach their target: "blend" goes 1 / `relax` of the way (the
            authors' program); "hit" goes all the way (paper, DMF); "none" leaves them where the
            lifted velocity has led them (the paper's ablation).
        relax: r of "blend", at least 1 (the program's r = 0 means "hit").
        microflow_steps: Euler steps of the micro-flow.
        microflow_noise: noise of the target: "fresh" is a new field (the authors' program),
            "initial" the noise each token started from.
        pad_to: text and anchors together are padded to a multiple of this many tokens.
        spare: what the slots so gained hold: "padding", or more "anchors".

    Raises:
        ValueError: a fact that no run could have; says what was got and what was expected.
    """

    steps: int
    densities: tuple[float, ...] = (1.0,)
    stage_ends: tuple[float, ...] = (1.0,)
    schedule: str | tuple[float, ...] = "beta"
    first: str = "even"
    fill: str = "random"
    activation: str = "importance"
    lift: str = "blur"
    microflow: str = "blend"
    relax: float = 3.0
    microflow_steps: int = 1
    microflow_noise: str = "fresh"
    pad_to: int = 1
    spare: str = "padding"

    def __post_init__(self) -> None:
        for name in ("steps", "microflow_steps", "pad_to"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Plan.{name} is {value!r}; expected a positive integer")
        for name in ("densities", "stage_ends"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values:
                raise ValueError(f"Plan.{name} is {values!r}; expected a tuple, one per stage")
            rising = all(a < b for a, b in itertools.pairwise(values))
            if not (rising and values[0] > 0 and values[-1] == 1):
                raise ValueError(
                    f"Plan.{name} is {values}; expected rising values in (0, 1] that end at 1"
                )
        if len(self.densities) != len(self.stage_ends):
            raise ValueError(
                f"Plan has {len(self.densities)} densities and {len(self.stage_ends)} stage_ends; "
                "expected one of each per stage"
            )
        if self.steps < len(self.densities):
            raise ValueError(
                f"Plan has {self.steps} steps for {len(self.densities)} stages; expected at least "
                "one step in every stage"
            )
        if any(a >= b for a, b in itertools.pairwise((0, *self.stage_steps))):
            raise ValueError(
                f"Plan of {self.steps} steps ends its stages after steps {self.stage_steps}; "
                "expected at least one step in every stage"
            )
        self._check_schedule()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Plan.{name} is {getattr(self, name)!r}; expected one of {allowed}"
                )
        if not 1 <= self.relax < math.inf:
            raise ValueError(f"Plan.relax is {self.relax}; expected at least 1")

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ValueError(
                    f"Plan.schedule is {self.schedule!r}; expected one of {SCHEDULES} or sigmas"
                )
            return
        sigmas = tuple(self.schedule)
        if len(sigmas) != self.steps:
            raise ValueError(f"Plan.schedule has {len(sigmas)} sigmas; expected {self.steps}")
        falling = all(a > b for a, b in itertools.pairwise(sigmas))
        if not (falling and sigmas[0] <= 1 and sigmas[-1] > 0):
            raise ValueError(
                f"Plan.schedule is {sigmas}; expected strictly falling sigmas in (0, 1]"
            )

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Number of steps done when each stage ends (the last is `steps`)."""
        # The small addend keeps a fraction k / n, times n, from ending just below k.
        return tuple(int(end * self.steps + 1e-9) for end in self.stage_ends)

    def budgets(self, tokens: int, text_tokens: int = 0) -> tuple[int, ...]:
        """Number of anchors per stage on a grid of `tokens` tokens."""
        wanted = [max(1, int(tokens * density)) for density in self.densities]
        if self.spare == "anchors":
            wanted = [min(tokens, self.slots(k, text_tokens)) for k in wanted]
        return tuple(wanted)

    def slots(self, anchors: int, text_tokens: int = 0) -> int:
        """Number of slots that `anchors` anchors get, beside `text_tokens` of text."""
        return -(-(anchors + text_tokens) // self.pad_to) * self.pad_to - text_tokens

    def replace(self, **changes: Any) -> Plan:
        """A copy with some facts changed, validated anew."""
        return dataclasses.replace(self, **changes)


PLANS: dict[str, Plan] = {
    "dense": Plan(50, schedule="shifted"),
    "4x": Plan(18, (0.35, 0.62, 1.0), (0.4, 0.65, 1.0)),
    "7x": Plan(11, (0.32, 0.6, 1.0), (0.4, 0.65, 1.0)),
    "tuned-4x": Plan(13, (0.5, 1.0), (0.3, 1.0), lift="none"),
    "tuned-7x": Plan(8, (0.5, 1.0), (0.25, 1.0), lift="none"),
}
"""The named plans: 50 dense steps, the paper's two presets for FLUX.1-dev, and two of about their
operations that were chosen on two earlier versions of the bundled checkpoint (README, "Judging
samplers")."""


def get_plan(plan: str | Plan) -> Plan:
    """A plan by name, or the plan itself. Raises `ValueError` for an unknown name."""
    if isinstance(plan, Plan):
        return plan
    if plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}; expected one of {sorted(PLANS)} or a Plan")
    return PLANS[plan]
