"""The Gaussian judge: its field, its velocity and its distances against closed forms."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from benchmarks import gaussian
from benchmarks.gaussian_field import Field, LinearMap, ideal_velocity, score_pictures
from jitjax.sampler.grid import positions
from jitjax.sampler.solvers import MeanVelocitySolver, Multistep

FLUX_MU = 1.15
SMALL = Field(8)


def flux_sigmas(steps: int) -> np.ndarray:
    """Return FLUX's sigmas by another form of their formula."""
    even = np.arange(steps, 0, -1) / steps
    shift = np.exp(FLUX_MU)
    return np.append(shift * even / (1 + (shift - 1) * even), 0)


def euler_factor(variance: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Return what Euler's method makes of noise 1 in a mode of the given variance."""
    factor = np.ones_like(variance)
    for s, end in itertools.pairwise(sigmas):
        rate = (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2)
        factor = factor * (1 + (end - s) * rate)
    return factor


def periodic_variances(field: Field) -> np.ndarray:
    """Return the variance of each Fourier mode of a periodic field, written out."""
    waves = [min(k, field.side - k) for k in range(field.side)]
    spectrum = [(i * i + j * j + 1) ** (-field.exponent / 2) for i in waves for j in waves]
    return np.array(spectrum) / np.mean(spectrum)


def test_field_is_stationary_with_the_given_spectrum():
    field = Field(6, 2.5, period=6)
    expected = np.sort(periodic_variances(field))
    np.testing.assert_allclose(np.linalg.eigvalsh(field.covariance), expected, rtol=1e-10)
    np.testing.assert_allclose(field.covariance.diagonal(), 1)
    np.testing.assert_allclose(field.root @ field.root, field.covariance, atol=1e-12)
    # A window of a longer period is a part of the periodic field.
    whole, window = Field(12, period=12), Field(4, period=12)
    corner = np.arange(144).reshape(12, 12)[3:7, 5:9].ravel()
    np.testing.assert_allclose(window.covariance, whole.covariance[np.ix_(corner, corner)])
    assert Field(4).covariance[0, 15] == Field(4, period=12).covariance[0, 15]


@pytest.mark.parametrize("padded", [False, True])
def test_velocity_is_the_conditional_mean(padded):
    # Brute force: the joint covariance of (eps - x0 on S, x on S), in batch entries of other S.
    sigma, sets = 0.3, np.array([[0, 5, 9, 63, 20], [7, 8, 1, 30, 2]])
    tokens = np.random.default_rng(0).standard_normal((2, 5, 3))
    slots = np.pad(sets, ((0, 0), (0, 2)), constant_values=64) if padded else sets
    valid = jnp.asarray(slots < 64) if padded else None
    given = np.pad(tokens, ((0, 0), (0, 2), (0, 0)), constant_values=7) if padded else tokens
    where = positions(jnp.asarray(slots), SMALL.grid)
    with jax.enable_x64(True):
        inputs = jnp.asarray(given), where, sigma, valid, jnp.asarray(SMALL.offsets)
        velocity = np.asarray(ideal_velocity(*inputs))
    both = np.block(
        [[SMALL.covariance, np.zeros((64, 64))], [np.zeros((64, 64)), np.eye(64)]]
    )  # of (x0, eps) on all tokens
    for x, s, v in zip(tokens, sets, velocity, strict=True):
        pick = np.eye(64)[s]
        state = np.concatenate([(1 - sigma) * pick, sigma * pick], axis=1)
        flow = np.concatenate([-pick, pick], axis=1)
        mean = flow @ both @ state.T @ np.linalg.inv(state @ both @ state.T) @ x
        np.testing.assert_allclose(v[:5], mean, atol=1e-10)


def test_one_token_is_the_product_of_its_steps():
    initial = gaussian.linear_map(Field(1), jitjax.Plan(7, schedule="shifted")).initial
    expected = euler_factor(np.ones(1), flux_sigmas(7))
    np.testing.assert_allclose(initial, expected[:, None], rtol=1e-6)  # sigmas are float32


@pytest.mark.parametrize("exponent", [2.5, 4.0])
def test_dense_steps_of_a_periodic_field(exponent):
    field, plan = Field(8, exponent, period=8), jitjax.Plan(9, schedule="shifted")
    variance = periodic_variances(field)
    factor = euler_factor(variance, flux_sigmas(9))
    sampler = gaussian.linear_map(field, plan)
    basis = np.kron(*(2 * [np.fft.fft(np.eye(8), norm="ortho")]))
    modes = basis @ sampler.initial @ basis.conj().T
    np.testing.assert_allclose(modes, np.diag(factor), atol=1e-5)
    scores = sampler.scores()
    between = ((factor - np.sqrt(variance)) ** 2).mean()
    assert scores.wasserstein == pytest.approx(between, rel=1e-4)
    assert scores.variance == pytest.approx((factor**2).mean(), rel=1e-5)
    # The steps scale the modes of the flow, so that no other coupling is nearer.
    assert scores.distance == pytest.approx(np.sqrt(between), rel=1e-4)


@pytest.mark.slow
def test_many_steps_reach_the_exact_flow():
    coarse, fine = (
        gaussian.linear_map(SMALL, jitjax.Plan(steps, schedule="shifted")).scores().distance
        for steps in (250, 1000)
    )
    assert fine == pytest.approx(coarse / 4, rel=0.05)  # Euler's method has order 1
    assert fine < 0.005


def test_scores_of_known_maps():
    root = SMALL.root
    exact = LinearMap(SMALL, root).scores()
    assert exact.wasserstein == pytest.approx(0, abs=1e-9)
    assert exact.spectral == pytest.approx(0, abs=1e-9)
    assert exact.distance == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(exact.spectrum, 1)
    # Another noise: the same distribution, and pictures that are independent of the converged.
    other = LinearMap(SMALL, np.zeros_like(root), root).scores()
    assert other.wasserstein == pytest.approx(0, abs=1e-9)
    assert other.distance == pytest.approx(np.sqrt(2))
    # A rotation of the noise has the same distribution, half the amplitude a known distance.
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal(root.shape))[0]
    half = LinearMap(SMALL, 0.5 * root @ rotation).scores()
    assert half.wasserstein == pytest.approx(0.25)
    assert half.spectral == pytest.approx(0.25)
    assert half.variance == pytest.approx(0.25)
    # White noise instead of the field: E (1 - sqrt(eigenvalue))^2.
    white = LinearMap(SMALL, np.eye(64)).scores()
    values = np.linalg.eigvalsh(SMALL.covariance)
    assert white.wasserstein == pytest.approx(((1 - np.sqrt(values)) ** 2).mean())
    assert white.spectral < white.wasserstein < white.distance**2 + 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"microflow_noise": "initial"}, marks=pytest.mark.slow),
        {"lift": "none"},
    ],
)
def test_maps_make_the_pictures_of_the_sampler(changes):
    plan = jitjax.PLANS["4x"].replace(activation="grid", **changes)
    sampler = gaussian.linear_map(SMALL, plan, seed=3)
    assert (sampler.fresh is None) == ("microflow_noise" in changes)
    noise, fresh = np.random.default_rng(1).standard_normal((2, 3, 64, 2))
    fresh = None if sampler.fresh is None else fresh
    pictures = gaussian.solve(SMALL, plan, noise, microflow_noise=fresh, seed=3)
    np.testing.assert_allclose(pictures, sampler(noise, fresh), atol=1e-10)


def test_transport_moves_the_pictures_to_the_field():
    plan = jitjax.PLANS["7x"].replace(activation="grid")
    sampler = gaussian.linear_map(SMALL, plan)
    moved = sampler.transport @ sampler.both
    np.testing.assert_allclose(moved @ moved.T, SMALL.covariance, atol=1e-9)
    cost = ((moved - sampler.both) ** 2).sum() / 64
    assert sampler.scores().wasserstein == pytest.approx(cost, rel=1e-9)


@pytest.mark.slow
def test_pictures_of_another_linear_map():
    # Estimated beside the fixed grid, and known exactly.
    plan = jitjax.PLANS["7x"].replace(activation="grid")
    reference = gaussian.linear_map(SMALL, plan)
    other = gaussian.linear_map(SMALL, plan.replace(activation="random"))
    noise, fresh = np.random.default_rng(0).standard_normal((2, 64, 64, 16))
    scores, half_widths = score_pictures(reference, other(noise, fresh), noise, fresh)
    exact = other.scores()
    for name, half_width in half_widths.items():
        # Twice the 95 % interval: 1 of 10 000 draws is outside.
        assert abs(getattr(scores, name) - getattr(exact, name)) < 2 * half_width
        assert 0 < half_width < 0.01
        assert getattr(exact, name) != getattr(reference.scores(), name)
    same, none = score_pictures(reference, reference(noise, fresh), noise, fresh)
    assert same == reference.scores()
    assert set(none.values()) == {0}


@pytest.mark.slow
def test_importance_is_judged_by_pictures():
    plan = jitjax.PLANS["4x"]
    with pytest.raises(ValueError, match="importance"):
        gaussian.linear_map(SMALL, plan)
    scores, half_widths = gaussian.judge_by_pictures(SMALL, plan, pictures=8)
    # Only the new anchors differ from those of the fixed grid.
    exact = gaussian.linear_map(SMALL, plan.replace(activation="grid")).scores()
    for name, half_width in half_widths.items():
        assert half_width > 0
        assert getattr(scores, name) == pytest.approx(getattr(exact, name), rel=0.2)
        assert getattr(scores, name) != getattr(exact, name)


PUBLISHED = {
    "dense 7, FLUX's sigmas": {"euler": 0.0765, "multistep": 0.0481},
    "dense 7, Beta sigmas": {"euler": 0.0701, "multistep": 0.0097},
    "7x, blend + fresh (as released)": {"euler": 0.1291},
    "7x, blend + initial": {"euler": 0.0720},
    "7x, hit": {"euler": 0.0470},
    "7x, no micro-flow": {"euler": 0.0855},
    "7x, blend + fresh, no lift": {"euler": 0.1821},
}
"""Squared Wasserstein distances of the issue that asked for this judge."""


@pytest.mark.slow
def test_figures_that_were_published():
    figures = {name: PUBLISHED[name] for name, _ in gaussian.plans() if name in PUBLISHED}
    assert figures.keys() == PUBLISHED.keys()
    for name, plan in gaussian.plans():
        for solver, expected in figures.get(name, {}).items():
            distance = (
                gaussian.linear_map(Field(), plan.replace(solver=solver)).scores().wasserstein
            )
            # The random fill of the first anchors differs; dense figures are rounded.
            tolerance = 0.02 if "7x" in name else 0.006
            assert distance == pytest.approx(expected, rel=tolerance), (name, solver)


@pytest.mark.slow
def test_history_that_is_kept_over_transitions_pays():
    plan = dict(gaussian.plans())["7x, hit"]
    kept, restarted = (
        gaussian.linear_map(Field(), plan.replace(solver=solver)).scores().wasserstein
        for solver in ("multistep", MeanVelocitySolver(Multistep()))
    )
    assert kept < restarted / 2
    assert kept < 0.0072  # published


def test_noise_of_a_target_that_is_hit():
    # New tokens depend on no noise but their target's, so any noise gives the same distribution.
    plan = jitjax.PLANS["4x"].replace(activation="grid", microflow="hit")
    fresh, initial = (
        gaussian.linear_map(SMALL, plan.replace(microflow_noise=noise)).scores()
        for noise in ("fresh", "initial")
    )
    assert fresh.wasserstein == pytest.approx(initial.wasserstein, rel=1e-6)
    np.testing.assert_allclose(fresh.spectrum, initial.spectrum, rtol=1e-6)
    assert fresh.distance > 1.5 * initial.distance


@pytest.mark.slow
def test_command_writes_its_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    few = [row for row in gaussian.plans() if row[0] in ("dense 7, Beta sigmas", "7x, hit")]
    monkeypatch.setattr(gaussian, "plans", lambda: iter(few))
    arguments = f"--side 12 --exponents 2.5 --pictures 2 --solvers euler --out {out}"
    monkeypatch.setattr("sys.argv", ["gaussian", *arguments.split()])
    gaussian.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["plan"] for row in rows] == [
        "dense 7, Beta sigmas",
        "7x, hit",
        "7x, hit, importance",
    ]
    assert rows[0]["tokens"] == 7
    assert rows[1]["half_widths"] == {}
    assert set(rows[2]["half_widths"]) == {"wasserstein", "variance", "distance"}
    printed = capsys.readouterr().out
    assert "7x, hit, importance" in printed
    assert f"{rows[0]['wasserstein']:.4f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--side 8", "--side is 8; expected at least 12"),
        ("--pictures 1", "--pictures is 1; expected 0, or 2 or more"),
        ("--exponents 9", "exponent is 9.0; expected 0 to 8"),
        ("--out /no/such/folder/rows", "expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gaussian", *arguments.split()])
    with pytest.raises(SystemExit):
        gaussian.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
