"""The sampler: steps, stages, anchors, lifting and micro-flow, for any velocity function.

This package is independent of the model and imports nothing else of `jitjax`: `jit_solve`
integrates any `Velocity`. `jitjax.denoise` calls it with the FLUX transformer.

The modules, in reading order:

    keys.py         random draws that depend on the key's bits alone
    static.py       arrays and the hashable rest of a velocity or a solver
    meshes.py       arrays over explicit mesh axes
    grid.py         the token grid and token positions
    plan.py         the settings of a run, and the named plans
    schedule.py     sigmas of the steps
    anchors.py      anchor sets: the first ones, and the activation of new ones
    lifter.py       interpolation from anchors to all tokens
    known.py        inpainting: what is known of the state, and the anchors
    terms.py        the SAG-ODE and the micro-flow as diffrax terms
    solvers.py      solvers whose state includes the last velocity
    transition.py   activation and micro-flow between two stages
    solve.py        the staged solve
    progress.py     reports of finished steps
    trace.py        the record of a run
    checks.py       validation of a solve's inputs

What needs equinox and diffrax is imported at its first use, since they take half a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jitjax.sampler.grid import Grid, positions
from jitjax.sampler.plan import PLANS, Plan, get_plan
from jitjax.sampler.schedule import Shift, beta_sigmas, plan_sigmas, shifted_sigmas

if TYPE_CHECKING:
    from jitjax.sampler.anchors import AnchorSet, first_anchors
    from jitjax.sampler.lifter import Lifter
    from jitjax.sampler.solve import jit_solve
    from jitjax.sampler.solvers import AdamsBashforth2
    from jitjax.sampler.terms import Velocity
    from jitjax.sampler.trace import Trace

_MODULES = {
    "AdamsBashforth2": "solvers",
    "AnchorSet": "anchors",
    "Lifter": "lifter",
    "Trace": "trace",
    "Velocity": "terms",
    "first_anchors": "anchors",
    "jit_solve": "solve",
}
"""Names that are imported at their first use -> their modules."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "PLANS",
    "AdamsBashforth2",
    "AnchorSet",
    "Grid",
    "Lifter",
    "Plan",
    "Shift",
    "Trace",
    "Velocity",
    "beta_sigmas",
    "first_anchors",
    "get_plan",
    "jit_solve",
    "plan_sigmas",
    "positions",
    "shifted_sigmas",
]
