"""Methods of the quality benchmark. A name says all about a method:

    dense-11, dense-11-beta, dense-11-beta-multistep    all tokens; FLUX's sigmas and Euler's
                                                        method, unless the name has others
    4x, 7x:hit-initial:multistep                        a plan of `PLANS`, with variants
    4x:lift=linear:steps=12                             a plan with fields changed
    fast:dense-11                                       11 steps of all tokens with the solver and
                                                        the sigmas of the plan "fast"
    teacache-11, taylor-11                              28 steps, 11 of them evaluated

`standard` and `ablations` are the lists that docs/quality.md has.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from benchmarks.quality import flops
from jitjax.config import TransformerConfig
from jitjax.sampler.plan import PLANS, Plan, get_plan

REFERENCE = "dense-50"
STEPS = (28, 11, 7)
"""Numbers of dense steps in `standard`; 11 and 7 cost as much as the plans 4x and 7x."""
PEER_STEPS = 28
"""Number of steps of TeaCache and Taylor, as in the paper's table; some are not evaluated."""
COST_TOLERANCE = 0.15
"""Methods have equal cost if the logarithms of their FLOPs differ by less."""
PAPER_PLANS = ("4x", "7x")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (label, fields of the plan)
    "random": ("random later anchors", {"activation": "random"}),
    "grid": ("later anchors on a fixed grid", {"activation": "grid"}),
    "no-lift": ("no lift", {"lift": "none"}),
    "linear": ("linear lift", {"lift": "linear"}),
    "no-microflow": ("no micro-flow", {"microflow": "none"}),
    "blend-initial": ("blend, initial noise", {"microflow_noise": "initial"}),
    "hit-fresh": ("hit, fresh noise", {"microflow": "hit"}),
    "hit-initial": (
        "hit, initial noise",
        {"microflow": "hit", "microflow_noise": "initial"},
    ),
    "multistep": ("multistep", {"solver": "multistep"}),
}


@dataclass(frozen=True)
class Method:
    """A sampling method.

    Attributes:
        plan: the plan to sample with; for a peer, its number of steps and schedule.
        peer: "teacache", "taylor", or "" for the plan itself.
        evaluations: for a peer, the number of evaluations.
    """

    plan: Plan
    peer: str = ""
    evaluations: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether all steps have all tokens and are evaluated."""
        return not self.peer and self.plan.densities == (1.0,)


def as_dense(plan: Plan, steps: int) -> Plan:
    """Return a plan of all tokens with the solver and the sigmas of `plan`.

    Args:
        plan: the plan.
        steps: number of steps. Sigmas that are a list are interpolated: sigma is a monotone
            function (PCHIP) of the share of steps done.
    """
    schedule = plan.schedule
    if not isinstance(schedule[0], str):
        sigma = PchipInterpolator(np.linspace(0, 1, plan.steps + 1), [*schedule, 0.0])
        schedule = tuple(float(value) for value in sigma(np.arange(steps) / steps))
    return Plan(steps, schedule=schedule, solver=plan.solver)


def parse_plan(text: str) -> Plan:
    """Parse a plan written as NAME, followed by changes: ":VARIANT", ":FIELD=VALUE", ":dense-N".

    Examples are 4x:hit-initial:multistep and "4x:densities=(0.5,1):steps=12".

    Raises:
        ValueError: the plan, the variant or the field is unknown, or the field cannot have the
            value.
    """
    name, *changes = text.split(":")
    plan = get_plan(name)
    overrides: dict[str, Any] = {}
    field_names = {field.name for field in fields(Plan)}
    for change in changes:
        field, equals, value = change.partition("=")
        if change in VARIANTS:
            overrides |= VARIANTS[change][1]
        elif dense := re.fullmatch(r"dense-(\d+)", change):
            plan = as_dense(plan, int(dense[1]))
        elif not equals or field not in field_names:
            raise ValueError(
                f"{text!r} changes {field!r}; expected one of {sorted(VARIANTS)}, dense-N, or "
                f"FIELD=VALUE with one of {sorted(field_names)}"
            )
        else:
            try:
                overrides[field] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                overrides[field] = value  # an unquoted string
    return plan.replace(**overrides)


def parse_method(name: str) -> Method:
    """Return the method of a name, see the module's docstring.

    Raises:
        ValueError: the name has another form, or a number is out of range.
    """
    if name in PLANS:
        return Method(PLANS[name])
    if dense := re.fullmatch(r"dense-(\d+)(-beta)?(-multistep)?", name):
        schedule, solver = "beta" if dense[2] else "shifted", "multistep" if dense[3] else "euler"
        return Method(Plan(int(dense[1]), schedule=schedule, solver=solver))
    if peer := re.fullmatch(r"(teacache|taylor)-(\d+)", name):
        if not 2 < int(peer[2]) <= PEER_STEPS:
            raise ValueError(f"{name!r} has {peer[2]} evaluations; expected 3 to {PEER_STEPS}")
        return Method(Plan(PEER_STEPS, schedule="shifted"), peer[1], int(peer[2]))
    return Method(parse_plan(name))


def dense_words(plan: Plan) -> str:
    """Describe a plan of all tokens: "11 dense steps, Beta sigmas, Euler"."""
    names = {"beta": "Beta sigmas", "shifted": "FLUX's sigmas"}
    if isinstance(plan.schedule, str):
        sigmas = names[plan.schedule]
    elif plan.schedule[0] == "beta":
        sigmas = "Beta({:g}, {:g}) sigmas".format(*plan.schedule[1:])
    else:
        sigmas = "sigmas of its own"
    solver = {"euler": "Euler", "multistep": "multistep"}.get(
        plan.solver if isinstance(plan.solver, str) else "", type(plan.solver).__name__
    )
    return f"{plan.steps} dense steps, {sigmas}, {solver}"


def label(name: str) -> str:
    """Describe a method in words, for a table."""
    method = parse_method(name)
    if method.peer:
        peer = {"teacache": "TeaCache", "taylor": "Taylor forecast"}[method.peer]
        return f"{peer}, {method.evaluations} of {PEER_STEPS} steps"
    if name in PLANS:
        return f"**`{name}`**" + (f": {dense_words(method.plan)}" if method.is_dense else "")
    if method.is_dense:
        return dense_words(method.plan)
    plan, *changes = name.split(":")
    words = [VARIANTS[change][0] if change in VARIANTS else f"`{change}`" for change in changes]
    return ", ".join([f"`{plan}`", *words])


def dense_evaluations(config: TransformerConfig, plan: Plan, tokens: int, text: int) -> float:
    """Return the FLOPs of a plan as a number of evaluations of all tokens.

    Args:
        config: configuration of the transformer.
        plan: the plan.
        tokens: number of tokens of the whole grid.
        text: number of text tokens.
    """
    operations = flops.run(config, flops.slots(plan, tokens, text), text)
    return operations / flops.forward(config, tokens, text)


def equal_cost(a: float, b: float) -> bool:
    """Whether two numbers of operations are equal up to `COST_TOLERANCE`."""
    return abs(math.log(a / b)) < COST_TOLERANCE


def matched_steps(evaluations: float) -> int:
    """Return a number of dense steps of equal cost: one of `STEPS` if there is one.

    Args:
        evaluations: the cost to match, in evaluations of all tokens.
    """
    usual = min(STEPS, key=lambda steps: abs(math.log(steps / evaluations)))
    return usual if equal_cost(usual, evaluations) else max(2, round(evaluations))


def dense_name(name: str, steps: int) -> str:
    """Return the shortest name of `as_dense(PLANS[name], steps)`."""
    wanted = Method(as_dense(PLANS[name], steps))
    plain = (f"dense-{steps}{a}{b}" for a in ("", "-beta") for b in ("", "-multistep"))
    return next((n for n in plain if parse_method(n) == wanted), f"{name}:dense-{steps}")


def distinct(names: Iterable[str]) -> list[str]:
    """Drop names of methods that an earlier name already stands for."""
    first: dict[Method, str] = {}
    for name in names:
        first.setdefault(parse_method(name), name)
    return list(first.values())


def standard(config: TransformerConfig, tokens: int, text: int) -> list[str]:
    """Return the names of the methods that docs/quality.md and the README compare.

    `REFERENCE`, all of `PLANS`, dense steps with Beta sigmas by Euler's method and by multistep,
    for every plan dense steps of equal cost with the plan's own sigmas and solver and by multistep
    with Beta sigmas, the paper's plans with the paper's target, and TeaCache. Which numbers of
    steps match a plan depends on the size.

    Args:
        config: configuration of the transformer.
        tokens: number of tokens of the whole grid.
        text: number of text tokens.
    """
    names = [REFERENCE, *PLANS]
    names += [f"dense-{steps}-beta{solver}" for steps in STEPS for solver in ("", "-multistep")]
    for name, plan in PLANS.items():
        if Method(plan) == parse_method(REFERENCE):
            continue
        steps = matched_steps(dense_evaluations(config, plan, tokens, text))
        names.append(f"dense-{steps}-beta-multistep")
        if not Method(plan).is_dense:
            names.append(dense_name(name, steps))
    names += [f"{plan}:hit-initial{end}" for plan in PAPER_PLANS for end in ("", ":multistep")]
    names += [f"teacache-{steps}" for steps in STEPS[1:]]
    return distinct(names)


def ablations() -> list[str]:
    """Return the names of the paper's plans, each followed by itself with one choice changed."""
    changes = [variant for variant in VARIANTS if variant != "multistep"]
    return [name for plan in PAPER_PLANS for name in (plan, *(f"{plan}:{c}" for c in changes))]
