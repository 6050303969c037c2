"""Plans: validation, the named plans and their sigmas."""

from __future__ import annotations

import numpy as np
import pytest

import jitjax
from jitjax.denoise import flux_sigmas
from jitjax.sampler.plan import PLANS, Plan

PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0))


def test_shifted_sigmas_equal_the_schedule_of_flux():
    config = jitjax.FluxConfig()
    # FLUX.1-dev at 1024 px has mu = 1.15: sigma = e^1.15 / (e^1.15 + 1/s - 1).
    sigmas = flux_sigmas(Plan(4, schedule="shifted"), 4096, config)
    even = np.array([1, 0.75, 0.5, 0.25])
    expected = np.exp(1.15) / (np.exp(1.15) + 1 / even - 1)
    np.testing.assert_allclose(sigmas, [*expected, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "positive integer"),
        ({"steps": 2}, "at least one step in every stage"),
        ({"densities": (0.6, 0.4, 1.0)}, "increasing"),
        ({"densities": (0.3, 0.6, 1.2)}, "increasing"),
        ({"densities": (0.3, 0.6)}, "end at 1"),
        ({"densities": (0.3, 1.0)}, "one of each per stage"),
        ({"stage_ends": (0.6, 0.4, 1.0)}, "increasing"),
        ({"schedule": "cosine"}, "expected one of"),
        ({"schedule": (1.0, 0.5)}, "2 sigmas"),
        ({"schedule": (1.0, 0.8, 0.8, 0.5, 0.3, 0.1)}, "strictly decreasing"),
        ({"microflow": "jump"}, "expected one of"),
        ({"microflow_noise": "old"}, "expected one of"),
        ({"relax": 0.5}, "at least 1"),
        ({"pad_to": 0}, "positive integer"),
    ],
)
def test_invalid_plans_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        PLAN.replace(**changes)


def test_presets_have_the_stages_and_budgets_of_the_paper():
    assert PLANS["4x"].stage_steps == (7, 11, 18)
    assert PLANS["7x"].stage_steps == (4, 7, 11)
    assert PLANS["4x"].budgets(4096) == (1433, 2539, 4096)
    assert PLANS["7x"].budgets(4096) == (1310, 2457, 4096)
    assert hash(PLANS["4x"]) == hash(PLANS["4x"].replace())


def test_tuned_plans_differ_in_steps_stages_and_lift_only():
    expected = {"tuned-4x": (13, (3, 13)), "tuned-7x": (8, (2, 8))}
    for name, (steps, stage_steps) in expected.items():
        plan = PLANS[name]
        assert plan.stage_steps == stage_steps
        assert plan == Plan(steps, plan.densities, plan.stage_ends, lift="none")
