"""Plans: the settings of a run that are independent of the model, and the named plans."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jitjax.sampler.grid import as_integer

CHOICES = {
    "first": ("even", "strided"),
    "fill": ("random", "dither"),
    "activation": ("importance", "grid", "random"),
    "lift": ("blur", "narrow", "linear", "nearest", "none"),
    "microflow": ("blend", "hit", "none"),
    "microflow_noise": ("fresh", "initial"),
    "spare": ("padding", "anchors"),
}
"""Allowed values of the fields of `Plan` that name an option."""

SCHEDULES = ("beta", "shifted")
"""Names of the schedules."""

SOLVERS = ("euler", "multistep")
"""Names of the solvers."""

_STEPS_TRIED = 10_000
"""How many larger numbers of steps are tried for the message about a stage without steps."""


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Return a list, tuple or array of finite real numbers as Python's; None for anything else."""
    if isinstance(values, str | bytes) or (
        isinstance(values, list | tuple) and any(isinstance(v, bool | np.bool_) for v in values)
    ):
        return None
    try:
        array = np.asarray(values)
        if array.ndim != 1 or not (np.isrealobj(array) and np.isfinite(array).all()):
            return None
    except (TypeError, ValueError):  # no numbers, rows of different lengths, or traced values
        return None
    if array.dtype == np.bool_:
        return None
    if isinstance(values, list | tuple):
        return tuple(_number(value) for value in values)
    return tuple(_number(value) for value in array)


def _number(value: Any) -> float:
    # The shortest decimal, which for 0.35 in float32 is 0.35 and not 0.3499999940395355.
    scalar = np.asarray(value)[()]
    return float(scalar) if scalar.dtype.itemsize >= 8 else float(str(scalar))


@dataclass(frozen=True)
class Plan:
    """The settings of a run that are independent of the model.

    Numbers may be of any type (Python, NumPy, JAX), and tuples may be lists or arrays. They are
    turned into Python's numbers and tuples, so that every plan is hashable and equal to the same
    plan made in another way.

    Attributes:
        steps: number of solver steps, 1 or more, and so many that every stage has one. Euler's
            method evaluates the network once per step.
        densities: fraction of tokens that are anchors in each stage, in (0, 1]; increasing, the
            last is 1. (1.0,) is a dense plan.
        stage_ends: fraction of the steps done when each stage ends, in (0, 1], one per stage;
            increasing, the last is 1.
        schedule: "beta" (quantiles of Beta(1.4, 0.425), the authors' program), ("beta", a, b)
            (quantiles of another Beta distribution; a and b are above 0), "shifted" (evenly spaced
            sigmas moved towards 1, as in FLUX), or a tuple of sigmas: one per step, decreasing, in
            (0, 1]. The last step ends at 0.
        first: layout of the first anchors: "even" for even rows and even columns and the border,
            or "strided" for every s-th row and column (the program's
            `use_checkerboard_init=False`).
        fill: which tokens are added to the layout or dropped from it to meet the budget: "random"
            (the authors' program) or evenly spread ones ("dither").
        activation: which tokens become the new anchors: those of highest "importance", those of a
            fixed "grid" (the paper's ablation), or "random" ones.
        lift: interpolator of the tokens that are not anchors: "blur" (the authors' program),
            "narrow", "linear", "nearest", see `jitjax.sampler.lifter`; "none" sets their velocity
            to 0 (the paper's ablation).
        microflow: how new tokens move to their target: "blend" moves them 1 / `relax` of the way
            (the authors' program), "hit" all the way (paper, DMF), and "none" leaves them
            unchanged (the paper's ablation).
        relax: r of "blend", a finite number, 1 or more (r = 0 in the authors' program is "hit").
        microflow_steps: number of Euler steps of the micro-flow, 1 or more. Any number ends at the
            same place up to rounding.
        microflow_noise: noise of the target: "fresh" for a new noise field (the authors'
            program), "initial" for the noise that each token started from.
        pad_to: text tokens and anchors together are padded to a multiple of this number, 1 or
            more; at 1 nothing is padded.
        spare: content of the padded slots: masked "padding", or additional "anchors".
        solver: "euler" (the paper), "multistep" (second order with as many evaluations, see
            `jitjax.sampler.solvers.Multistep`), or a hashable diffrax solver of ordinary
            differential equations with one term.
        context: for inpainting, fraction of the tokens outside the mask and its surroundings that
            the network sees, in (0, 1]; None for the density of the first stage. They are chosen
            by `first` and `fill`; see `jitjax.sampler.known`. All other fields of stages, lift,
            micro-flow and `spare` do not matter then.

    Raises:
        ValueError: a field has an invalid value, or a stage has no step.

    Source: the paper's algorithm 1, and the options of its authors' program; "multistep", "narrow",
    "linear", "dither", "initial", `pad_to`, `spare` and `context` are not from there.

    Examples:
        >>> plan = jitjax.Plan(10, densities=(0.35, 1.0), stage_ends=(0.8, 1.0))
        >>> plan.stage_steps, plan.budgets(4096)
        ((8, 10), (1433, 4096))
    """

    steps: int
    densities: tuple[float, ...] = (1.0,)
    stage_ends: tuple[float, ...] = (1.0,)
    schedule: str | tuple[float, ...] | tuple[str, float, float] = "beta"
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
    solver: Any = "euler"
    context: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "microflow_steps", "pad_to"):
            value = as_integer(getattr(self, name))
            if value is None or value < 1:
                raise ValueError(
                    f"Plan.{name} is {getattr(self, name)!r}; expected a positive integer"
                )
            object.__setattr__(self, name, value)
        for name in ("densities", "stage_ends"):
            values = _numbers(getattr(self, name))
            if not values:
                raise ValueError(
                    f"Plan.{name} is {getattr(self, name)!r}; expected numbers, one per stage"
                )
            increasing = all(a < b for a, b in itertools.pairwise(values))
            if not (increasing and values[0] > 0 and values[-1] == 1):
                raise ValueError(
                    f"Plan.{name} is {values}; expected increasing values in (0, 1] that end at 1"
                )
            object.__setattr__(self, name, values)
        self._check_stages()
        self._check_schedule()
        self._check_solver()
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"Plan.{name} is {value!r}; expected one of {allowed}")
            object.__setattr__(self, name, str(value))
        relax = _numbers([self.relax])
        if not relax or not 1 <= relax[0] < math.inf:
            raise ValueError(f"Plan.relax is {self.relax!r}; expected a number, at least 1")
        object.__setattr__(self, "relax", relax[0])
        if self.context is not None:
            context = _numbers([self.context])
            if not context or not 0 < context[0] <= 1:
                raise ValueError(
                    f"Plan.context is {self.context!r}; expected a number in (0, 1], or None"
                )
            object.__setattr__(self, "context", context[0])

    def _check_stages(self) -> None:
        if len(self.densities) != len(self.stage_ends):
            raise ValueError(
                f"Plan has {len(self.densities)} densities and {len(self.stage_ends)} stage_ends; "
                "expected one of each per stage"
            )

        def has_all_stages(steps: int) -> bool:
            return all(a < b for a, b in itertools.pairwise((0, *self._stage_steps(steps))))

        if not has_all_stages(self.steps):
            more = range(self.steps + 1, self.steps + _STEPS_TRIED)
            enough = next((steps for steps in more if has_all_stages(steps)), None)
            hint = "" if enough is None else f", as with {enough} steps"
            raise ValueError(
                f"Plan with {self.steps} steps ends its stages after steps {self.stage_steps}; "
                f"expected at least one step in every stage{hint}"
            )

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str) and self.schedule in SCHEDULES:
            object.__setattr__(self, "schedule", str(self.schedule))
            return
        first = self.schedule[0] if isinstance(self.schedule, list | tuple) and self.schedule else 0
        if isinstance(first, str) and first == "beta":
            parameters = _numbers(self.schedule[1:])
            if parameters is None or len(parameters) != 2 or min(parameters) <= 0:
                raise ValueError(
                    f'Plan.schedule is {self.schedule!r}; expected ("beta", a, b) with positive '
                    "numbers a and b"
                )
            object.__setattr__(self, "schedule", ("beta", *parameters))
            return
        sigmas = _numbers(self.schedule)
        if sigmas is None:
            raise ValueError(
                f'Plan.schedule is {self.schedule!r}; expected one of {SCHEDULES}, ("beta", a, b) '
                "or sigmas"
            )
        if len(sigmas) != self.steps:
            raise ValueError(f"Plan.schedule has {len(sigmas)} sigmas; expected {self.steps}")
        decreasing = all(a > b for a, b in itertools.pairwise(sigmas))
        if not (decreasing and sigmas[0] <= 1 and sigmas[-1] > 0):
            raise ValueError(
                f"Plan.schedule is {sigmas}; expected strictly decreasing sigmas in (0, 1]"
            )
        object.__setattr__(self, "schedule", sigmas)

    def _check_solver(self) -> None:
        if isinstance(self.solver, str):
            if self.solver not in SOLVERS:
                raise ValueError(
                    f"Plan.solver is {self.solver!r}; expected one of {SOLVERS} or a diffrax solver"
                )
            object.__setattr__(self, "solver", str(self.solver))
            return
        import diffrax  # here, because it takes half a second to import

        if not isinstance(self.solver, diffrax.AbstractSolver):
            raise ValueError(
                f"Plan.solver is {self.solver!r}; expected one of {SOLVERS} or a diffrax solver"
            )
        try:
            hash(self.solver)
        except TypeError as error:
            raise ValueError(
                f"Plan.solver is a {type(self.solver).__name__} that is not hashable ({error}); "
                "pass it to `denoise` or `jit_solve` as `solver` instead"
            ) from None

    @property
    def context_density(self) -> float:
        """`context`, or the density of the first stage if that is None; in (0, 1]."""
        return self.densities[0] if self.context is None else self.context

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Number of steps done when each stage ends; increasing, the last is `steps`."""
        return self._stage_steps(self.steps)

    def _stage_steps(self, steps: int) -> tuple[int, ...]:
        # The small addend keeps (k / n) * n from rounding to just below k.
        return tuple(int(end * steps + 1e-9) for end in self.stage_ends)

    def budgets(self, tokens: int, text_tokens: int = 0) -> tuple[int, ...]:
        """Return the number of anchors of each stage.

        Args:
            tokens: number of tokens of the grid, 1 or more.
            text_tokens: number of text tokens that run with the anchors, 0 or more; used by
                `pad_to` if `spare` is "anchors".

        Returns:
            One number per stage, from 1 to `tokens`: the stage's density of the tokens, rounded
            down; with `spare="anchors"` also what fills the padded slots. The last is `tokens`.

        Examples:
            >>> jitjax.PLANS["4x"].budgets(4096)  # FLUX.1 at 1024 x 1024 pixels
            (1433, 2539, 4096)
        """
        budgets = [max(1, int(tokens * density)) for density in self.densities]
        if self.spare == "anchors":
            budgets = [min(tokens, self.slots(budget, text_tokens)) for budget in budgets]
        return tuple(budgets)

    def slots(self, anchors: int, text_tokens: int = 0) -> int:
        """Return the number of slots that the network runs on for a number of anchors.

        Args:
            anchors: number of anchors, 1 or more.
            text_tokens: number of text tokens that run with them, 0 or more.

        Returns:
            The least number of slots, `anchors` or more, that together with the text tokens is a
            multiple of `pad_to`. Text tokens are not counted.

        Examples:
            >>> jitjax.PLANS["4x"].replace(pad_to=128).slots(1433, text_tokens=512)
            1536
        """
        return -(-(anchors + text_tokens) // self.pad_to) * self.pad_to - text_tokens

    def replace(self, **changes: Any) -> Plan:
        """Return a copy with some fields changed.

        Args:
            **changes: fields and their new values.

        Returns:
            The new plan; this one stays as it is.

        Raises:
            ValueError: a field has an invalid value.
            TypeError: there is no such field.

        Examples:
            >>> jitjax.PLANS["multistep-12"].replace(steps=25).steps
            25
        """
        return dataclasses.replace(self, **changes)


_JIT: dict[str, Any] = {
    "lift": "linear",
    "microflow": "hit",
    "microflow_noise": "initial",
    "solver": "multistep",
}

PLANS: dict[str, Plan] = {
    "dense": Plan(50, schedule="shifted"),
    "4x": Plan(18, (0.35, 0.62, 1.0), (0.4, 0.65, 1.0)),
    "7x": Plan(11, (0.32, 0.6, 1.0), (0.4, 0.65, 1.0)),
    "multistep-12": Plan(12, schedule=("beta", 0.6, 0.25), solver="multistep"),
    "multistep-7": Plan(7, solver="multistep"),
    "jit-10x": Plan(10, (0.35, 1.0), (0.8, 1.0), ("beta", 1.2, 0.4), **_JIT),
    "jit-14x": Plan(7, (0.25, 1.0), (0.72, 1.0), ("beta", 1.5, 0.5), **_JIT),
}
"""The named plans: 50 dense steps; the paper's two presets for FLUX.1-dev, as released; and, by a
search on two judges (docs/plans.md), 12 and 7 dense steps of second order, and two plans with most
steps on a part of the tokens, for a tenth and a fourteenth of the operations of 50 dense steps."""

DEFAULT_PLAN = "multistep-12"
"""The plan of `sample`, `denoise`, `compile` and the command line."""


def get_plan(plan: str | Plan) -> Plan:
    """Return the plan of the given name; a `Plan` is returned unchanged.

    Args:
        plan: a name in `PLANS`, or a `Plan`.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str) or plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}; expected one of {sorted(PLANS)} or a Plan")
    return PLANS[plan]
