"""Plans: validation, the named plans and their sigmas."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from benchmarks.quality import flops
from jitjax.config import TransformerConfig
from jitjax.denoise import flux_sigmas
from jitjax.latents import token_grid
from jitjax.sampler.grid import as_grid
from jitjax.sampler.plan import PLANS, Plan, get_plan

PLAN = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0))


def test_shifted_sigmas_equal_the_schedule_of_flux():
    config = jitjax.FluxConfig()
    # FLUX.1-dev at 1024 px has mu = 1.15: sigma = e^1.15 / (e^1.15 + 1/s - 1).
    sigmas = flux_sigmas(Plan(4, schedule="shifted"), 4096, config)
    even = np.array([1, 0.75, 0.5, 0.25])
    expected = np.exp(1.15) / (np.exp(1.15) + 1 / even - 1)
    np.testing.assert_allclose(sigmas, [*expected, 0], rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_beta_schedules_have_two_parameters():
    config = jitjax.FluxConfig()
    program = flux_sigmas(Plan(7), 4096, config)
    np.testing.assert_array_equal(
        flux_sigmas(Plan(7, schedule=("beta", 1.4, 0.425)), 4096, config), program
    )
    # Beta(a, 1) has the quantiles q^(1 / a), and Beta(1, b) has 1 - (1 - q)^(1 / b).
    quantiles = np.linspace(1, 0, 7)
    for a, b, expected in (
        (0.5, 1.0, quantiles**2),
        (1.0, 0.25, 1 - (1 - quantiles) ** 4),
    ):
        sigmas = flux_sigmas(Plan(7, schedule=("beta", a, b)), 4096, config)
        np.testing.assert_allclose(sigmas, [*(1 / 7 + 6 / 7 * expected), 0], rtol=1e-6)
    made = Plan(7, schedule=["beta", np.float32(0.5), jnp.int32(1)])
    assert made == Plan(7, schedule=("beta", 0.5, 1.0))
    assert hash(made) == hash(Plan(7, schedule=("beta", 0.5, 1.0)))
    with pytest.raises(ValueError, match=r"too many for the schedule \('beta', 0.5, 0.01\)"):
        flux_sigmas(Plan(7, schedule=("beta", 0.5, 0.01)), 4096, config)


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
        ({"schedule": ("beta", 0.5, 0.0)}, "with positive numbers"),
        ({"schedule": ("beta", 0.5, np.nan)}, "with positive numbers"),
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


@pytest.mark.parametrize(
    ("name", "stage_steps", "evaluations"),
    [
        ("multistep-12", (12,), 12),
        ("multistep-7", (7,), 7),
        ("jit-10x", (8, 10), 5.0),
        ("jit-14x", (5, 7), 3.45),
    ],
)
def test_plans_of_second_order_cost_what_they_promise(name, stage_steps, evaluations):
    """Operations at FLUX.1-dev's size and 1024 px, in evaluations of all tokens."""
    plan, config = PLANS[name], TransformerConfig()
    assert plan.solver == "multistep"
    assert plan.stage_steps == stage_steps
    operations = flops.run(config, flops.slots(plan, 4096, 512), 512)
    actual = operations / flops.forward(config, 4096, 512)
    assert actual == pytest.approx(evaluations, rel=0.01)
    if name.startswith("jit-"):  # the name says how many times fewer than 50
        assert 50 / actual == pytest.approx(float(name[4:-1]), rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        list,
        np.array,
        jnp.array,
        lambda v: np.array(v, np.float32),
        lambda v: [jnp.float32(x) for x in v],
    ],
    ids=["list", "numpy", "jax", "float32", "jax scalars"],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_numbers_and_sequences_of_any_type_make_the_same_plan(make):
    schedule = (1.0, 0.9, 0.7, 0.55, 0.3, 0.1)
    plain = Plan(6, (0.4, 0.7, 1.0), (0.34, 0.67, 1.0), schedule, relax=2.0, pad_to=16)
    made = Plan(
        np.int64(6),
        make((0.4, 0.7, 1.0)),
        make((0.34, 0.67, 1.0)),
        make(schedule),
        relax=np.float32(2),
        pad_to=jnp.int32(16),
    )
    assert made == plain
    assert hash(made) == hash(plain)
    assert repr(made) == repr(plain)
    replaced = dataclasses.replace(plain, densities=make((0.4, 0.7, 1.0)), steps=np.uint8(6))
    assert (replaced, hash(replaced)) == (plain, hash(plain))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": True}, "Plan.steps is True"),
        ({"steps": 6.0}, "Plan.steps is 6.0"),
        ({"steps": "6"}, "Plan.steps is '6'"),
        ({"relax": "2"}, "Plan.relax is '2'"),
        ({"relax": True}, "Plan.relax is True"),
        ({"densities": [0.4, 0.7, True]}, "Plan.densities is"),
        ({"densities": {}}, "Plan.densities is {}"),
        ({"densities": 1.0}, "Plan.densities is 1.0"),
        ({"stage_ends": "1"}, "Plan.stage_ends is '1'"),
        ({"schedule": None}, "Plan.schedule is None"),
        ({"schedule": ["1"] * 6}, "Plan.schedule is"),
        ({"schedule": ()}, "0 sigmas"),
        ({"schedule": ("beta", 0.5)}, r'expected \("beta", a, b\) with positive numbers'),
        ({"schedule": ("beta", "0.5", 1)}, "with positive numbers"),
        ({"schedule": ("shifted", 0.5, 1)}, "expected one of"),
        ({"first": ["even"]}, r"Plan.first is \['even'\]"),
        ({"first": np.array(["even"])}, "Plan.first is array"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_of_other_types_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        PLAN.replace(**changes)


@pytest.mark.parametrize("plan", [{}, None, 4, ["4x"]])
@pytest.mark.usefixtures("unchecked")
def test_get_plan_refuses_other_types(plan):
    with pytest.raises(ValueError, match="unknown plan"):
        get_plan(plan)


def test_too_few_steps_say_how_many_are_needed():
    with pytest.raises(ValueError, match=r"3 steps .* \(1, 1, 3\).*as with 4 steps"):
        PLANS["4x"].replace(steps=3)
    assert PLANS["4x"].replace(steps=4).stage_steps == (1, 2, 4)


def test_too_many_steps_are_refused():
    assert (np.diff(flux_sigmas(Plan(1323), 16, jitjax.FluxConfig())) < 0).all()
    with pytest.raises(ValueError, match="1324 steps, too many for the schedule 'beta'"):
        flux_sigmas(Plan(1324), 16, jitjax.FluxConfig())


@pytest.mark.usefixtures("unchecked")
def test_grids_and_sizes_of_any_integer_type():
    for grid in ([3, 5], np.array([3, 5]), (np.int32(3), jnp.int32(5))):
        assert as_grid(grid) == (3, 5)
        assert all(type(side) is int for side in as_grid(grid))
    assert token_grid(np.int64(48), np.uint16(80), jitjax.FluxConfig()) == (3, 5)
    for grid in (None, 4, (4,), (4, 0), (4, True), (4, 4.0), "44"):
        with pytest.raises(ValueError, match=r"grid is .*; expected"):
            as_grid(grid)
