"""The search for plans: its fast map, its costs, its families of sigmas and its tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import jitjax
from benchmarks import gaussian, plan_scores, plan_search
from benchmarks.gaussian_field import Field
from benchmarks.gaussian_map import fast_linear_map
from benchmarks.plan_choices import CHOSEN, build_plan, round_end
from benchmarks.sigma_families import FAMILIES
from jitjax.sampler.schedule import beta_sigmas, shifted_sigmas

SMALL = Field(8)
HIT = jitjax.PLANS["7x"].replace(activation="grid", microflow="hit", microflow_noise="initial")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"solver": "multistep"}, marks=pytest.mark.slow),
        pytest.param(
            {"solver": jitjax.AdamsBashforth2(), "lift": "narrow"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"microflow": "blend", "lift": "linear", "first": "strided"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"microflow": "none", "lift": "none", "solver": "multistep", "fill": "dither"},
            marks=pytest.mark.slow,
        ),
        {
            "densities": (0.4, 1.0),
            "stage_ends": (0.7, 1.0),
            "lift": "nearest",
            "solver": "multistep",
        },
        {"densities": (1.0,), "stage_ends": (1.0,), "solver": "multistep"},
    ],
)
def test_fast_map_is_that_of_jit_solve(changes):
    plan = HIT.replace(**changes)
    expected = gaussian.linear_map(SMALL, plan, seed=2).initial
    # Weights of the lifter "linear" are float32, and rounded differently with other paddings.
    tolerance = 1e-6 if plan.lift == "linear" else 1e-11
    actual = fast_linear_map(SMALL, plan, seed=2).initial
    np.testing.assert_allclose(actual, expected, atol=tolerance)


def test_scores_are_those_of_the_judge():
    sampler = fast_linear_map(SMALL, HIT)
    scores = sampler.scores()
    assert plan_scores.wasserstein(sampler) == pytest.approx(scores.wasserstein, rel=1e-9)
    assert plan_scores.distance(sampler) == pytest.approx(scores.distance, rel=1e-12)
    mean = plan_scores.judge([SMALL, Field(8, 4)], HIT)
    other = fast_linear_map(Field(8, 4), HIT).scores()
    assert mean == pytest.approx(np.sqrt(scores.wasserstein * other.wasserstein), rel=1e-9)


@pytest.mark.parametrize("solver", plan_scores.SOLVERS.values())
def test_dense_score_is_both_distances(solver):
    plan = jitjax.Plan(6, solver=solver)
    sampler = fast_linear_map(SMALL, plan)
    sigmas = np.append(beta_sigmas(6), 0)
    score = plan_scores.judge_dense([SMALL], sigmas, solver)
    assert score == pytest.approx(plan_scores.wasserstein(sampler), rel=1e-5)  # float32 sigmas
    assert score == pytest.approx(plan_scores.distance(sampler) ** 2, rel=1e-5)


def test_families_hold_the_known_schedules():
    beta, shift = FAMILIES["beta"], FAMILIES["shift"]
    np.testing.assert_allclose(beta.sigmas(9, 1.4, 0.425), beta_sigmas(9))
    flux = shifted_sigmas(9, 4096, gaussian.FLUX_SHIFT)
    np.testing.assert_allclose(shift.sigmas(9, 1.15, 1), flux)
    karras = FAMILIES["karras"].sigmas(9, 7, 0.05)
    roots = (karras[1:] / (1 - karras[1:])) ** (1 / 7)  # evenly spaced
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0])
    assert karras[-1] == pytest.approx(0.05 / 1.05)
    middle = FAMILIES["logit-normal"].sigmas(8, 0, 2)[4]
    assert middle == pytest.approx(0.5)  # the median


@pytest.mark.parametrize(("name", "steps"), list(itertools.product(FAMILIES, (3, 7, 50))))
def test_sigmas_fall_from_one(name, steps):
    family = FAMILIES[name]
    for parameters in (family.start, *itertools.product(*family.bounds)):
        sigmas = family.sigmas(steps, *parameters)
        assert sigmas.shape == (steps,)
        assert sigmas[0] == 1
        assert sigmas[-1] > 0
        assert (np.diff(sigmas) <= 0).all()


def test_costs():
    assert plan_scores.evaluations(jitjax.Plan(11)) == 11
    # Text tokens cost the same in every step, attention the square: more than the share, and less.
    assert 0.2 < plan_scores.step_cost(0.2) < 0.3
    assert plan_scores.step_cost(1.0) == 1
    assert plan_scores.evaluations(jitjax.PLANS["7x"]) == pytest.approx(7.19, abs=0.01)
    assert plan_scores.evaluations(jitjax.PLANS["7x"]) < plan_scores.allowed(7)
    assert plan_scores.evaluations(jitjax.PLANS["4x"]) == pytest.approx(12.08, abs=0.01)


@pytest.mark.parametrize("steps", [2, 7, 11, 97])
def test_ends_of_stages_are_round(steps):
    for done in range(1, steps + 1):
        assert int(round_end(done, steps) * steps + 1e-9) == done
    assert round_end(steps, steps) == 1
    assert round_end(1, 2) == 0.5
    assert round_end(7, 10) == 0.7


def test_choices_keep_to_their_budgets():
    assert tuple(CHOSEN) == plan_scores.BUDGETS
    for budget, plans in CHOSEN.items():
        assert {len(plan.densities) > 1 for plan in plans.values()} == {True, False}
        for plan in plans.values():
            assert 0.8 * 50 / budget < plan_scores.evaluations(plan) <= plan_scores.allowed(budget)


@pytest.mark.slow
def test_searches_find_better_plans():
    fields = [Field(8, 2.5), Field(8, 4)]
    family = FAMILIES["beta"]
    score, parameters = plan_scores.search_dense(fields, 5, family, "multistep")
    program = plan_scores.judge_dense(fields, np.append(beta_sigmas(5), 0), "multistep")
    assert score < program
    found = np.append(family.sigmas(5, *parameters), 0)
    assert plan_scores.judge_dense(fields, found, "multistep") == pytest.approx(score)
    free, sigmas = plan_scores.search_free(fields, 5, "multistep", found[:-1])
    assert free <= score
    assert sigmas[0] == 1
    assert (np.diff(sigmas) < 0).all()
    best, plan, (a, b) = plan_scores.search_jit(
        fields, 10, family, "multistep", 2, iterations=3, population=4
    )
    assert plan_scores.judge(fields, plan) == pytest.approx(best)
    assert plan_scores.evaluations(plan) <= plan_scores.allowed(10)
    assert plan.schedule == tuple(family.sigmas(plan.steps, a, b).tolist())
    as_released = jitjax.PLANS["7x"].replace(activation="grid")  # 1.4 times as many operations
    paper = [gaussian.linear_map(field, as_released).scores().wasserstein for field in fields]
    assert best < plan_scores.geometric_mean(paper) / 2


def test_built_plans_have_the_given_stages():
    plan = build_plan((3, 1, 4), (0.3, 0.55), beta_sigmas(8), "multistep", "linear")
    assert plan.stage_steps == (3, 4, 8)
    assert plan.densities == (0.3, 0.55, 1)
    assert (plan.microflow, plan.microflow_noise) == ("hit", "initial")


@pytest.mark.slow
def test_command_writes_its_parts(tmp_path, monkeypatch, capsys):
    page = tmp_path / "plans.md"
    marked = "Before.\n\n<!-- {0}: begin -->\nold\n<!-- {0}: end -->\n\n"
    page.write_text("".join(marked.format(part) for part in ("table", "scale")) + "After.\n")
    arguments = f"table scale --budgets 14 --side 12 --sides 12 13 --markdown {page}"
    monkeypatch.setattr("sys.argv", ["plan_search", *arguments.split()])
    plan_search.main()
    text, printed = page.read_text(), capsys.readouterr().out
    assert "old" not in text
    assert text.startswith("Before.\n\n<!-- table: begin -->\n")
    assert text.endswith("<!-- scale: end -->\n\nAfter.\n")
    assert text.count("<!--") == 4
    name, plan = next(iter(CHOSEN[14].items()))
    mean = plan_scores.judge([Field(12, a) for a in plan_scores.EXPONENTS], plan)
    for place in (text, printed):
        assert f"| {name} | {plan_scores.evaluations(plan):.2f} |" in place
        assert place.count(f"{mean:.5f}") >= 2  # in the table, and in the one of sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("table --side 8", "--side is 8; expected at least 12"),
        ("table --budgets 5", "--budgets has [5.0]; expected some of [2, 3, 4, 7, 10, 14]"),
        ("search --budgets 0.5", "--budgets has 0.5; expected at least 1"),
        ("families --steps 2", "--steps is 2; expected at least 3"),
        ("plot", "invalid choice: 'plot'"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan_search", *arguments.split()])
    with pytest.raises(SystemExit):
        plan_search.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "plans.md"
    page.write_text("<!-- table: begin -->\n")
    with pytest.raises(ValueError, match="lacks a part for table"):
        plan_search.write_between_markers(page, "table", ["x"])
    assert page.read_text() == "<!-- table: begin -->\n"


def test_plans_that_are_not_linear_or_unknown_are_refused():
    with pytest.raises(ValueError, match=r"Plan\.activation is 'importance'"):
        fast_linear_map(SMALL, HIT.replace(activation="importance"))
    with pytest.raises(ValueError, match=r"Plan\.microflow_noise is 'fresh'"):
        fast_linear_map(SMALL, HIT.replace(microflow_noise="fresh"))
