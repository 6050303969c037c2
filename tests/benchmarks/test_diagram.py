"""Tests of the drawing of how Just-in-Time works."""

import numpy as np
import pytest

import jitjax

GRID = (6, 6)
PLAN = jitjax.Plan(4, (0.4, 0.7, 1.0), (0.25, 0.5, 1.0), microflow="hit")


@pytest.fixture(scope="module")
def diagram():
    pytest.importorskip("matplotlib").use("Agg")
    from benchmarks import diagram

    return diagram


def test_masked_keeps_the_tokens_alone(diagram):
    picture = np.full((4, 6, 3), 0.5, np.float32)
    tokens = np.array([[True, False, False], [False, False, True]])
    expected = np.full((2, 3), diagram.EMPTY, np.float32)
    expected[tokens] = 0.5
    actual = diagram.masked(picture, tokens)
    assert actual.shape == picture.shape
    np.testing.assert_array_equal(actual[::2, ::2, 0], expected)
    np.testing.assert_array_equal(actual[1::2, 1::2, 2], expected)
    dimmed = diagram.masked(picture, tokens, dim=0.2)
    np.testing.assert_allclose(dimmed[::2, ::2, 0], np.where(tokens, 0.5, 0.1))


@pytest.mark.slow
def test_panels_are_those_of_the_run(diagram, small):
    run = diagram.sample_run(small, "a red circle", plan=PLAN, seed=0, grid=GRID)
    # 0.4 and 0.7 of 36 tokens, rounded down; a stage has all tokens of the one before.
    assert run.counts == [14, 25, 36]
    assert [int(new.sum()) for new in run.new] == [11, 11]
    assert run.steps == (1, 1, 2)
    pixels = run.stages[0][1].reshape(6, 16, 6, 16, 3)
    assert (pixels == diagram.EMPTY).all((1, 3, 4)).sum() == 36 - 14
    assert not (run.stages[2][2] == diagram.EMPTY).any((0, 1, 2))
    figure = diagram.draw(run)
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 3 * (3 + 2)
    scores = run.transitions[0][2]  # after the panels of the stages
    np.testing.assert_array_equal(panels[9 + 2].images[0].get_array(), scores)
