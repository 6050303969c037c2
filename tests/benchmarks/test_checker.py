"""Tests of the image checker on rendered scenes, clean and degraded, and on wrong claims."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import checker
from benchmarks.agreement import DEGRADATIONS, run_checks
from benchmarks.checker import DetectedObject, check, describe
from training.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, random_scene, render


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, np.ndarray]]:
    """Scenes of one thing, and their images."""
    drawn = (random_scene(np.random.default_rng((8, i))) for i in range(24))
    return [(scene, render(scene, 256, 256)) for scene in drawn]


@pytest.fixture(scope="module")
def seen() -> dict[int, tuple[np.ndarray, list[DetectedObject]]]:
    """Images by their `id`, and what is seen in them."""
    return {}


@pytest.fixture
def look_once(monkeypatch, seen) -> None:
    """Let `check` look at each image once, since what is claimed does not change what is seen."""

    def describe_once(image: np.ndarray) -> list[DetectedObject]:
        if id(image) not in seen:
            seen[id(image)] = image, describe(image)
        return seen[id(image)][1]

    monkeypatch.setattr(checker, "describe", describe_once)


@pytest.mark.parametrize(
    ("side", "count"), [(256, 40), pytest.param(512, 40, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_agrees_with_scenes_of_one_thing(side, count, degradation):
    """`python -m benchmarks.agreement` checks thousands of scenes of up to four things."""
    results = [result for _, result in run_checks(1, False, side, degradation, count)]
    assert sum(r["right"] for r in results) >= count - 1
    assert sum(r["texture"] for r in results) >= 0.95 * count


@pytest.mark.parametrize("degradation", DEGRADATIONS)
@pytest.mark.parametrize(("things", "same"), [(2, False), (4, True)])
def test_agrees_with_scenes_of_several_things(things, same, degradation):
    results = [result for _, result in run_checks(things, same, 512, degradation, 12)]
    assert all(r["right"] for r in results)


@pytest.mark.usefixtures("look_once")
@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("colour", tuple(COLOURS)),
        ("shape", SHAPES),
        ("size", tuple(SIZES)),
        ("texture", TEXTURES),
    ],
)
def test_rejects_a_wrong_attribute(scenes, attribute, values):
    for scene, image in scenes:
        actual = getattr(scene.things[0], attribute)
        for value in values:
            claimed = replace(scene, things=(replace(scene.things[0], **{attribute: value}),))
            result = check(image, claimed, mentioned=("colour", "shape", "size", "texture"))
            assert result[attribute] == (value == actual)
            assert not result["right"] or value == actual


def test_rejects_a_wrong_count():
    one = random_scene(np.random.default_rng(1))
    two = random_scene(np.random.default_rng(2), things=2, same=True)
    assert not check(render(two, 256, 256), replace(two, things=two.things[:1]))["right"]
    assert not check(render(one, 256, 256), replace(one, things=one.things * 2))["right"]
    assert not check(np.full((256, 256, 3), 0.5, np.float32), one)["right"]


@pytest.mark.usefixtures("look_once")
def test_relations_and_counts_of_several_things():
    wrong = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    right = 0
    for i in range(40):
        scene = random_scene(np.random.default_rng((9, i)), things=2)
        image = render(scene, 256, 256)
        right += check(image, scene)["right"]
        a, b = scene.things
        if (a.colour, a.shape, a.size) != (b.colour, b.shape, b.size):
            assert not check(image, replace(scene, relation=wrong[scene.relation]))["right"]
    for i in range(40):
        scene = random_scene(np.random.default_rng((10, i)), things=2 + i % 3, same=True)
        right += check(render(scene, 256, 256), scene)["right"]
    assert right >= 79


def test_deformed_shapes_have_no_shape():
    """Half a disc and a disc with a bite match no outline."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    disc = np.hypot(x, y) < 0.4
    for mask in (disc & (y > 0), disc & (np.hypot(x - 0.4, y) > 0.35)):
        image = np.where(mask[..., None], (0.86, 0.1, 0.12), (0.55, 0.55, 0.55))
        assert describe(image.astype(np.float32))[0].shape == ""


def test_position_extent_and_uint8_input():
    scene = random_scene(np.random.default_rng(3))
    thing = scene.things[0]
    for height, width in ((256, 256), (512, 512), (256, 384)):
        detected = describe(render(scene, height, width))
        assert len(detected) == 1
        assert detected[0].x == pytest.approx(thing.x, abs=0.03)
        assert detected[0].extent == pytest.approx(thing.radius, abs=0.02)
    pixels = (render(scene, 256, 256) * 255).round().astype(np.uint8)
    assert describe(pixels)[0].shape == thing.shape


def test_wrong_array_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \[64, 64\]; expected \[height, width, 3\]"):
        describe(np.zeros((64, 64), np.float32))
