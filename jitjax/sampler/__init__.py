"""The sampler: steps, stages, anchors, lifting and micro-flow, for any velocity function.

Nothing here knows a model, or imports anything of `jitjax` outside this package: `jit_solve` runs
whatever is a `Velocity`. `jitjax.denoise` is this with FLUX plugged in. In the order to read them:

    grid.py         rows and columns of tokens
    plan.py         what a run does, and the named plans
    schedule.py     noise levels of the steps
    anchors.py      which tokens run, and which are taken up next
    lifter.py       from values on anchors to values on all tokens
    terms.py        the two differential equations
    solvers.py      solvers that remember the last velocity
    transition.py   between two stages
    solve.py        the staged solve
    trace.py        what a run did
    checks.py       what a solve refuses
"""

from jitjax.sampler.anchors import AnchorSet, first_anchors
from jitjax.sampler.grid import Grid, positions
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.plan import PLANS, Plan, get_plan
from jitjax.sampler.schedule import Shift, beta_sigmas, plan_sigmas, shifted_sigmas
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2
from jitjax.sampler.terms import Velocity
from jitjax.sampler.trace import Trace

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
