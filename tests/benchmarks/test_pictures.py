"""Tests of the README's pictures."""

import jax
import numpy as np

import jitjax
from benchmarks import pictures


def test_pictures_are_those_of_seed_0(small, monkeypatch):
    plan = jitjax.Plan(2)
    texts = ["a red circle", "a blue star"]

    def sample(params, text, *, key, plan):
        asked.append((params, text, plan))
        assert np.array_equal(jax.random.key_data(key), [[0, 0]])
        return np.full((1, 2, 2, 3), texts.index(text), np.float32)

    asked: list[tuple] = []
    monkeypatch.setattr(jitjax, "sample", sample)
    actual = pictures.sample_all(small, texts, plan)
    assert asked == [(small, text, plan) for text in texts]
    np.testing.assert_array_equal(actual, np.stack([np.zeros((2, 2, 3)), np.ones((2, 2, 3))]))


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
