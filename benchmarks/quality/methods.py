"""Methods of the quality benchmark. A name says all about a method:

    dense-11, dense-11-beta, dense-11-beta-multistep    all tokens; FLUX's sigmas and Euler's
                                                        method, unless the name has others
    4x, 7x:hit-initial:multistep                        a plan of `PLANS`, with variants
    4x:lift=linear:steps=12                             a plan with fields changed
    jit-10x:dense-5                                     5 steps of all tokens with the solver and
                                                        the sigmas of a plan
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
PEER_STEPS = 28
"""Number of steps of TeaCache and Taylor, as in the paper's table; some are not evaluated."""
FULL_SIZE = (4096, 512)
"""Tokens of image and text of FLUX.1-dev at 1024 px."""
COST_TOLERANCE = 0.25
"""Methods have equal cost if the logarithms of their FLOPs differ by less. The bundled checkpoint
has less text: there jit-10x costs 4.1 evaluations, and the 5 dense steps of its cost at `FULL_SIZE`
a fifth more."""
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

    @property
    def is_dense_multistep(self) -> bool:
        """Whether this is dense, by the solver that costs no more than Euler's method."""
        return self.is_dense and self.plan.solver == "multistep"


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


def solver_words(plan: Plan) -> str:
    """Return the solver's name: "Euler", "multistep" or that of a class of diffrax."""
    if isinstance(plan.solver, str):
        return {"euler": "Euler", "multistep": "multistep"}[plan.solver]
    return type(plan.solver).__name__


def dense_words(plan: Plan) -> str:
    """Describe a plan of all tokens: "11 dense steps, Beta sigmas, Euler"."""
    names = {"beta": "Beta sigmas", "shifted": "FLUX's sigmas"}
    if isinstance(plan.schedule, str):
        sigmas = names[plan.schedule]
    elif plan.schedule[0] == "beta":
        sigmas = "Beta({:g}, {:g}) sigmas".format(*plan.schedule[1:])
    else:
        sigmas = "sigmas of its own"
    return f"{plan.steps} dense steps, {sigmas}, {solver_words(plan)}"


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


def distinct(names: Iterable[str]) -> list[str]:
    """Drop names of methods that an earlier name already stands for."""
    first: dict[Method, str] = {}
    for name in names:
        first.setdefault(parse_method(name), name)
    return list(first.values())


def standard() -> list[str]:
    """Return the names of the methods that docs/quality.md and the README compare.

    `REFERENCE`, all of `PLANS`, and for every plan with sparse stages dense steps of equal cost by
    multistep: a plan of `PLANS` if one is that, else steps with Beta sigmas. Costs are those at
    `FULL_SIZE`, so that the list is the same at any size.
    """
    names = [REFERENCE, *PLANS]
    methods = [Method(plan) for plan in PLANS.values()]
    dense = [method.plan.steps for method in methods if method.is_dense_multistep]
    for method in methods:
        if method.is_dense:
            continue
        evaluations = dense_evaluations(TransformerConfig(), method.plan, *FULL_SIZE)
        if not any(equal_cost(steps, evaluations) for steps in dense):
            names.append(f"dense-{max(2, round(evaluations))}-beta-multistep")
    return distinct(names)


def ablations() -> list[str]:
    """Return the names of the paper's plans, each followed by itself with one choice changed."""
    changes = [variant for variant in VARIANTS if variant != "multistep"]
    return [name for plan in PAPER_PLANS for name in (plan, *(f"{plan}:{c}" for c in changes))]
