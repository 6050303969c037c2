"""`benchmarks.editing`: its cases and its judge; pictures are made by no test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.editing import SIDE, TASKS, case, ground, judge, mask_around
from training.scenes import TOKEN, held_out, render


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("number", range(4))
def test_a_case_is_right_only_when_it_shows_what_is_wanted(task, number):
    wanted = case(task, number)
    assert case(task, number) == wanted
    after, before = (render(scene, SIDE, SIDE) for scene in (wanted.after, wanted.before))
    verdict = judge(after, wanted)
    assert verdict["right"]
    assert verdict["kept"]
    assert verdict["change"] == 0
    assert not judge(before, wanted)["right"]
    # All that changes lies within the mask.
    changed = np.abs(after - before).max(-1) > 0
    assert changed.any()
    assert mask_around(wanted.place)[changed].all()


@pytest.mark.parametrize("task", TASKS)
def test_cases_differ_and_are_of_things_that_training_has_not_seen(task):
    cases = [case(task, number) for number in range(60)]
    assert len({wanted.seed for wanted in cases}) == 60
    for wanted in cases:
        for thing in (wanted.before if task == "recolour" else wanted.after).things:
            texture = "striped" if task == "plain" else thing.texture
            assert held_out(thing.shape, thing.colour, thing.size, texture)


def test_words_of_the_negative_prompt():
    wanted = case("plain", 0)
    assert "striped" in wanted.negative
    assert wanted.negative.replace("striped ", "") == wanted.prompt


def test_ground_that_has_changed_is_not_kept():
    wanted = case("recolour", 0)
    image = render(wanted.after, SIDE, SIDE)
    is_ground = ground((wanted.before, wanted.after))
    brighter = image + 0.04 * is_ground[..., None].astype(np.float32)
    verdict = judge(brighter, wanted)
    assert verdict["right"]
    assert not verdict["kept"]
    np.testing.assert_allclose(verdict["change"], 0.04, rtol=1e-5)


def test_a_thing_that_has_moved_is_not_right():
    wanted = case("recolour", 1)
    thing = wanted.after.things[0]
    moved = replace(wanted.after, things=(replace(thing, x=thing.x + 2 * TOKEN),))
    verdict = judge(render(moved, SIDE, SIDE), wanted)
    assert verdict["colour"]
    assert not verdict["right"]


def test_an_added_thing_may_be_anywhere_that_the_prompt_allows():
    wanted = case("add", 2)
    assert "left of" in wanted.prompt
    first, second = wanted.after.things
    lower = replace(second, y=second.y + 2 * TOKEN)
    assert judge(render(replace(wanted.after, things=(first, lower)), SIDE, SIDE), wanted)["right"]
    moved = replace(first, y=first.y + 2 * TOKEN)
    verdict = judge(render(replace(wanted.after, things=(moved, second)), SIDE, SIDE), wanted)
    assert verdict["relation"]
    assert not verdict["right"]
