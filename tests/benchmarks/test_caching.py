"""Steps that lift changes of a prediction, against dense solves and fields with known answers."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from benchmarks import caching
from benchmarks.caching_sampler import CachingPlan, solve, with_steps
from benchmarks.gaussian import linear_map
from benchmarks.gaussian_field import Field, ideal_velocity
from jitjax.sampler.grid import positions
from jitjax.sampler.schedule import beta_sigmas

SMALL = Field(8)
# Compiled as a whole, which takes less time than operation by operation.
jitted_solve = jax.jit(solve, static_argnums=(0, 2), static_argnames="grid")
STEPS = "DsDssDDsD"


@functools.cache
def dense_map(steps: str, solver: str = "multistep") -> np.ndarray:
    """Return the map of dense steps at the same sigmas."""
    return linear_map(SMALL, jitjax.Plan(len(steps), solver=solver)).initial


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compare_with", "solver", "prediction", "forecast"),
    [  # every pair of values
        ("sparse", "euler", "clean", "constant"),
        ("sparse", "multistep", "velocity", "linear"),
        ("dense", "euler", "velocity", "linear"),
        ("dense", "multistep", "clean", "constant"),
        ("kept", "euler", "clean", "linear"),
        ("kept", "multistep", "velocity", "constant"),
    ],
)
def test_all_tokens_as_anchors_are_dense_steps(solver, prediction, compare_with, forecast):
    plan = CachingPlan(
        STEPS,
        density=1.0,
        compare_with=compare_with,
        prediction=prediction,
        forecast=forecast,
        solver=solver,
    )
    ours = caching.field_map(SMALL, plan).initial
    # Sigmas are float32 in `linear_map` and float64 here.
    np.testing.assert_allclose(ours, dense_map(STEPS, solver), atol=2e-6)


@pytest.mark.slow
def test_dense_steps_alone_have_the_scores_of_the_sampler():
    ours = caching.field_map(SMALL, CachingPlan("D" * 7)).scores()
    theirs = linear_map(SMALL, jitjax.Plan(7, solver="multistep")).scores()
    assert ours.wasserstein == pytest.approx(theirs.wasserstein, rel=1e-4)
    assert ours.distance == pytest.approx(theirs.distance, rel=1e-4)


def fading_velocity(x, places, sigma, valid, args):
    """Compute the velocity to a clean picture: details of each token, and a level that fades in."""
    details, columns = args
    clean = details[places[..., 1] * columns + places[..., 2]] + 4 * (1 - sigma)
    return (x - clean[..., None]) / sigma


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lift", "compare_with", "prediction"),
    [  # every lift with every comparison and with every prediction
        ("blur", "sparse", "clean"),
        ("blur", "dense", "velocity"),
        ("linear", "sparse", "velocity"),
        ("linear", "dense", "clean"),
        ("nearest", "sparse", "clean"),
        ("nearest", "dense", "velocity"),
    ],
)
def test_a_change_that_the_lifter_reproduces_is_exact(compare_with, prediction, lift):
    # The details stay, and what changes is a constant. The last step is sparse, since a dense one
    # would end at the same picture from any state.
    random = np.random.default_rng(0)
    plan = CachingPlan(
        "DsDss", 0.4, compare_with=compare_with, prediction=prediction, lift=lift, solver="euler"
    )
    with jax.enable_x64(True):
        inputs = {
            "grid": (8, 8),
            "anchors": caching.draw_anchors(plan, (8, 8), 2, seed=1),
            "args": (jnp.asarray(random.standard_normal(64)), 8),
        }
        noise = jnp.asarray(random.standard_normal((2, 64, 1)))
        sparse, dense, constant = (
            np.asarray(jitted_solve(fading_velocity, noise, p, **inputs))
            for p in (
                plan,
                CachingPlan("DDDDD", solver="euler"),
                dataclasses.replace(plan, lift="none"),
            )
        )
    # The weights of "linear" are float32, and far outside the anchors larger than 1.
    np.testing.assert_allclose(sparse, dense, atol=1e-4)
    assert np.abs(constant - dense).max() > 0.5


@pytest.mark.slow
def test_dense_comparison_keeps_the_anchors_own_answer():
    # One sparse step, with Euler's method, written out.
    plan = CachingPlan("Ds", density=0.4, compare_with="dense", lift="nearest", solver="euler")
    index = np.asarray(caching.draw_anchors(plan, (8, 8), 1, seed=0))[0]
    first, second = beta_sigmas(2)
    identity = np.eye(64)
    with jax.enable_x64(True):
        offsets = jnp.asarray(SMALL.offsets)
        velocity = jax.jit(ideal_velocity)

        def answer(x: np.ndarray, tokens: np.ndarray, sigma: float) -> np.ndarray:
            places = positions(jnp.asarray(tokens), (8, 8))[None]
            return np.asarray(velocity(jnp.asarray(x)[None], places, sigma, None, offsets))[0]

        v = answer(identity, np.arange(64), first)
        y = identity + (second - first) * v
        clean = identity - first * v
        u = answer(y[index], index, second)
    anchors_clean = y[index] - second * u
    expected = anchors_clean  # the step to sigma 0 ends at the prediction
    result = caching.field_map(SMALL, plan).initial
    np.testing.assert_allclose(result[index], expected, atol=1e-10)
    # The other tokens have the change of their nearest anchor.
    rows, columns = np.indices((8, 8)).reshape(2, -1)
    other = next(t for t in range(64) if t not in index)
    squared = (rows[index] - rows[other]) ** 2 + (columns[index] - columns[other]) ** 2
    near = int(np.argmin(squared))
    change = anchors_clean[near] - clean[index[near]]
    np.testing.assert_allclose(result[other], clean[other] + change, atol=1e-10)


@pytest.mark.slow
def test_one_sigma_for_all_tokens_is_the_ideal_velocity():
    with jax.enable_x64(True):
        offsets, covariance = jnp.asarray(SMALL.offsets), jnp.asarray(SMALL.covariance)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 3)))
        places = jnp.broadcast_to(positions(jnp.arange(64), (8, 8)), (2, 64, 3))
        sigma = jnp.asarray(0.4)
        args = (offsets, covariance)
        mixed = caching.field_velocity(x, places, jnp.full((2, 64, 1), sigma), None, args)
        expected = ideal_velocity(x, places, sigma, None, offsets)
    np.testing.assert_allclose(mixed, expected, atol=1e-10)


@pytest.mark.slow
def test_map_makes_the_pictures_of_the_sampler():
    plan = CachingPlan(STEPS, density=0.3)
    sampler = caching.field_map(SMALL, plan, seed=3)
    with jax.enable_x64(True):
        noise = np.random.default_rng(1).standard_normal((3, 64, 2))
        pictures = jitted_solve(
            caching.field_velocity,
            jnp.asarray(noise),
            plan,
            grid=SMALL.grid,
            anchors=caching.draw_anchors(plan, SMALL.grid, 3, seed=3),
            args=(jnp.asarray(SMALL.offsets), jnp.asarray(SMALL.covariance)),
        )
    np.testing.assert_allclose(pictures, sampler(noise), atol=1e-10)


@pytest.mark.parametrize(
    ("compare_with", "anchors"),
    [pytest.param("sparse", 4 + 3, marks=pytest.mark.slow), ("dense", 4), ("kept", 4)],
)
def test_slots_are_what_the_network_runs_on(compare_with, anchors):
    plan = CachingPlan(STEPS, density=0.25, compare_with=compare_with)
    counts = []

    def velocity(x, places, sigma, valid, args):
        counts.append(x.shape[1])
        return x

    anchors_drawn = caching.draw_anchors(plan, (8, 8), 1, seed=0)
    # The shapes alone.
    jax.eval_shape(
        lambda noise: solve(velocity, noise, plan, grid=(8, 8), anchors=anchors_drawn),
        jnp.ones((1, 64, 1)),
    )
    assert sorted(plan.slots(64)) == sorted([64] * 5 + [16] * anchors)
    if compare_with != "kept":  # where the other tokens' keys and values would be kept
        assert sorted(counts) == sorted(plan.slots(64))


def test_steps_of_a_stage_change_and_its_sigmas_stay():
    plan, original = jitjax.PLANS["4x"], beta_sigmas(18)

    def sigmas(plan: jitjax.Plan) -> np.ndarray:
        return np.array(plan.schedule, float)

    same = with_steps(plan, (7, 4, 7))
    np.testing.assert_allclose(sigmas(same), original, rtol=1e-12)
    assert same.stage_steps == plan.stage_steps
    fewer = with_steps(plan, (2, 3, 9))
    assert fewer.stage_steps == (2, 5, 14)
    np.testing.assert_allclose(sigmas(fewer)[[0, 2, 5]], original[[0, 7, 11]])
    earlier = with_steps(plan, (2, 3, 9), share=0.5)
    assert sigmas(earlier)[5] > sigmas(fewer)[5]


@pytest.mark.slow
def test_command_writes_its_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = f"--field-side 12 --groups 7 --tried change --out {out}"
    monkeypatch.setattr("sys.argv", ["caching", *arguments.split()])
    kept = [
        row for row in caching.rows() if row.name.startswith(("dense 7", "DsDsDDDD", "DsDsDsDDD"))
    ]
    monkeypatch.setattr(caching, "rows", lambda: iter(kept))
    caching.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == [
        "dense 7",
        "DsDsDsDDD, 0.25, sparse - sparse, clean",
    ]
    assert rows[0]["cost"] == 7
    assert rows[1]["cost"] == 7.5
    assert f"{rows[1]['wasserstein']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_checkpoint_judges_every_kind_of_plan(small):
    judge = caching.PictureJudge(small, 6, "dev", 64, 6, seed=0)
    dense = caching.Row(7, "dense", "dense 2", jitjax.Plan(2, solver="multistep"))
    change = caching.Row(7, "change", "all tokens", CachingPlan("Ds", density=1.0))
    first, second = judge(dense), judge(change)
    assert first["against"] == [0, 0, 0]
    assert first["cost"] == 2
    assert second["cost"] == 3  # one evaluation to compare with
    # All tokens are anchors, so these are the pictures of the dense plan.
    np.testing.assert_allclose(second["psnrs"], first["psnrs"], rtol=1e-3)
    assert 0 <= second["right"] <= second["of"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompts 8", "--prompts is 8; expected a multiple of 6"),
        ("--prompts 18", "--batch is 4; expected a divisor of 18 prompts"),
        ("--out /no/such/folder/rows", "expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["caching", *arguments.split()])
    with pytest.raises(SystemExit):
        caching.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("changes", [{"steps": "sD"}, {"steps": "DxD"}, {"compare_with": "none"}])
def test_wrong_plans_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        CachingPlan(**{"steps": "DsD", **changes})
