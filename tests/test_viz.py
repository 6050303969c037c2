"""`jitjax.viz`: figures and animations of a run."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import viz
from jitjax.sampler.plan import Plan

mpl.use("Agg")
GRID = (4, 6)
PLAN = Plan(5, (0.5, 0.75, 1.0), (0.4, 0.6, 1.0))
"""Stages of 2, 1 and 2 steps, with 12, 18 and 24 tokens."""


def wave(tokens, positions, sigma, valid, args):
    """A velocity that differs between tokens and steps, and compiles sooner than a transformer."""
    place = positions[..., 1:].sum(-1, keepdims=True)
    return tokens - jnp.sin(place + 5 * sigma)


def solve(noise, plan):
    """Return clean tokens and the trace of a run from noise."""
    tokens = noise.shape[1]
    first = np.stack([np.arange(0, tokens, 2), np.arange(1, tokens, 2)])
    return jitjax.jit_solve(
        wave, jnp.asarray(noise), jnp.linspace(1, 0, plan.steps + 1), plan=plan, grid=GRID,
        first_anchors=jnp.asarray(first), microflow_noise=jnp.asarray(noise), trace=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    noise = np.random.default_rng(1).standard_normal((2, 24, 64)).astype(np.float32)
    return solve(noise, PLAN)


@pytest.mark.slow
def test_predictions_are_those_of_the_velocity():
    """For the velocity y - c the clean prediction of every Euler step is y - sigma (y - c)."""
    target = jnp.linspace(-1, 1, 24)[None, :, None] * jnp.ones((1, 1, 3))

    def velocity(y, positions, sigma, valid, args):
        index = positions[..., 1] * GRID[1] + positions[..., 2]
        return y - target[0][index]

    noise = jax.random.normal(jax.random.key(0), (1, 24, 3))
    sigmas = jnp.linspace(1, 0, 6)
    plan = PLAN.replace(microflow="hit", microflow_noise="initial", lift="nearest")
    _, trace = jitjax.jit_solve(
        velocity, noise, sigmas, plan=plan, grid=GRID, first_anchors=jnp.arange(0, 24, 2)[None],
        trace=True,
    )  # fmt: skip
    predictions = np.asarray(trace.predictions())
    trace, noise, sigmas, target = jax.tree.map(np.asarray, (trace, noise, sigmas, target))
    before = [noise, trace.states[0], trace.transitions[0].after, trace.transitions[1].after]
    before += [trace.states[3]]
    stages = (0, 0, 1, 2, 2)
    assert trace.stage_steps == (2, 1, 2)
    for step, (y, stage) in enumerate(zip(before, stages, strict=True)):
        anchors = trace.anchors[stage][0]
        expected = y - sigmas[step] * (y - target)
        np.testing.assert_allclose(
            predictions[step, 0, anchors], expected[0, anchors], rtol=1e-4, atol=1e-5
        )
    # At the end of a stage it is that of the record.
    for step, stage in ((1, 0), (2, 1), (4, 2)):
        np.testing.assert_allclose(predictions[step], trace.clean[stage], rtol=1e-4, atol=1e-5)


def test_anchors_of_each_stage_are_bright_and_all_others_dark(run):
    _, trace = run
    figure = viz.show_anchors(trace, GRID, sample=1)
    assert len(figure.axes) == 3
    for axis, anchors, count in zip(figure.axes, trace.anchors, (12, 18, 24), strict=True):
        shown = np.asarray(axis.images[0].get_array())[..., 0].reshape(-1)
        assert sorted(np.flatnonzero(shown == 1)) == sorted(np.asarray(anchors[1]))
        assert f"{count} of 24 tokens" in axis.get_title()


def test_slots_without_a_token_are_not_drawn(small, run):
    """As where masks of one batch differ in size: n stands in slots that a sample does not use."""
    _, trace = run
    anchors = jnp.array([[0, 5, 24, 24], [1, 2, 3, 4]])
    trace = trace._replace(anchors=(anchors,), stage_steps=(5,), transitions=())
    axis = viz.show_anchors(trace, GRID).axes[0]
    shown = np.asarray(axis.images[0].get_array())[..., 0].reshape(-1)
    assert list(np.flatnonzero(shown == 1)) == [0, 5]
    assert axis.get_title() == "steps 1 to 5: 2 of 24 tokens"
    assert len(viz.frames(small, trace, GRID)) == 6


def test_a_run_has_clean_predictions_importance_and_bars(small, run):
    _, trace = run
    figure = viz.show_trace(small, trace, GRID)
    *panels, bars = figure.axes
    assert len(panels) == 6
    scores = np.asarray(panels[3].images[0].get_array())
    np.testing.assert_array_equal(scores.reshape(-1), trace.transitions[0].scores[0])
    assert [bar.get_height() for bar in bars.patches] == [12, 12, 18, 24, 24]
    dense = solve(np.asarray(trace.start), Plan(2))[1]
    assert len(viz.show_trace(small, dense, GRID).axes) == 3


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_an_animation_has_a_frame_for_every_step_and_the_picture(small, run, tmp_path, suffix):
    tokens, trace = run
    pictures = viz.frames(small, trace, GRID)
    assert len(pictures) == PLAN.steps + 1
    assert {picture.shape for picture in pictures} == {(384, 576, 3)}
    clean = np.concatenate([trace.predictions()[:, 0], tokens[:1]])
    shown = [0, 2, 4, 5]  # as many as are decoded at once
    expected = jitjax.decode(small, jnp.asarray(clean[shown]), grid=GRID)
    inner = np.stack(pictures)[shown, 3::6, 3::6]  # where no outline is
    np.testing.assert_allclose(inner, np.clip(expected, 0, 1), atol=1e-5)
    # A dense stage has no outline; a sparse one has.
    np.testing.assert_array_equal(pictures[-2][::6, ::6], pictures[-2][3::6, 3::6])
    assert (pictures[0][::6, ::6] != pictures[0][5::6, 5::6]).any()
    path = viz.animate(small, trace, GRID, tmp_path / f"run{suffix}")
    with Image.open(path) as image:
        # Equal frames are merged.
        assert 4 <= image.n_frames <= PLAN.steps + 1
        assert image.size == (576, 384)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_compare_shows_the_distance_to_the_reference():
    image = np.full((16, 16, 3), 0.5, np.float32)
    figure = viz.compare(
        {"dense": image, "4x": image + 0.1, "same": image[None]}, reference="dense"
    )
    titles = [axis.get_title() for axis in figure.axes]
    # 10 log10(1 / 0.1^2) = 20.
    assert titles == ["dense\nreference", "4x\n20.0 dB", "same\ninf dB"]


@pytest.mark.usefixtures("unchecked")
def test_errors(small, run, tmp_path):
    _, trace = run
    with pytest.raises(ValueError, match=r"grid is \(4, 4\); expected 24 tokens"):
        viz.show_anchors(trace, (4, 4))
    with pytest.raises(ValueError, match="sample is 2; expected 0 to 1"):
        viz.show_trace(small, trace, GRID, sample=2)
    with pytest.raises(ValueError, match=r"image has shape \[30, 30, 3\]; expected a multiple"):
        viz.show_anchors(trace, GRID, image=np.zeros((30, 30, 3)))
    with pytest.raises(ValueError, match=r"a has shape \[4, 4\]; expected \[height, width, 3\]"):
        viz.compare({"a": np.zeros((4, 4))})
    with pytest.raises(ValueError, match="images is empty"):
        viz.compare({})
    with pytest.raises(ValueError, match="reference is 'b'; expected one of"):
        viz.compare({"a": np.zeros((4, 4, 3))}, reference="b")
    with pytest.raises(ValueError, match=r"expected a name that ends in .webp or .gif"):
        viz.animate(small, trace, GRID, tmp_path / "run.mp4")
    with pytest.raises(FileNotFoundError):
        viz.animate(small, trace, GRID, tmp_path / "none" / "run.webp")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None
import numpy as np, jitjax
assert "PIL" not in sys.modules
try:
    jitjax.viz.compare({"a": np.zeros((4, 4, 3), np.float32)})
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == 'jitjax.viz needs matplotlib: pip install "jitjax[viz]"'
