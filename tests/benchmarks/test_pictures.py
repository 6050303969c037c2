"""Tests of the README's pictures."""

import jax
import numpy as np

import jitjax
from benchmarks import pictures


def test_pictures_are_those_of_seed_0(small):
    plan = jitjax.Plan(2)
    texts = ["a red circle", "a blue star"]
    actual = pictures.sample_all(small, texts, plan)
    expected = jitjax.sample(small, texts[1], key=jax.random.key(0)[None], plan=plan)
    np.testing.assert_array_equal(actual[1], expected[0])
    assert not np.array_equal(actual[0], actual[1])


def test_sheet_has_every_picture_in_its_place():
    shades = np.linspace(0.1, 0.9, 8, dtype=np.float32)
    first = np.ones((8, 32, 32, 3), np.float32) * shades[:, None, None, None]
    rows = {"one": first, "two": 1 - first}
    texts = [f"prompt {i} " * 8 for i in range(8)]
    sheet = np.asarray(pictures.sheet(rows, texts)) / 255
    half = sheet.shape[0] // 2
    step = pictures.SIDE + pictures.GAP
    for i in range(8):
        for row, shade in enumerate((shades[i], 1 - shades[i])):
            top = i // 4 * half + row * step
            left = pictures.MARGIN + i % 4 * step
            picture = sheet[top : top + pictures.SIDE, left : left + pictures.SIDE]
            np.testing.assert_allclose(picture, shade, atol=0.003)  # half a step of 8 bits
        caption = sheet[i // 4 * half + 2 * step :][: 2 * pictures.LINE, left : left + 150]
        assert caption.min() < 0.5  # black on white
