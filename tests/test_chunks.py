"""`sample(chunk=)`: any number of pictures in the memory of one chunk."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_runs

import jitjax
from jitjax.sampler.progress import STEPS_AHEAD

sample_module = importlib.import_module("jitjax.sample")  # the package has a function of this name

PROMPTS = ["a large red circle", "a small blue square", "a ring", "two stars", "a cross"]
PLAN = shared_runs.SPARSE.replace(microflow_noise="fresh")
OPTIONS = {**shared_runs.SIZE, "plan": PLAN}
KEY = jax.random.key(3)
ROUNDING = 1e-4
"""Programs of other batch sizes round differently, as in `test_api.py`."""


@pytest.fixture(scope="module")
def expected(small):
    return np.asarray(jitjax.sample(small, PROMPTS, key=KEY, **OPTIONS))


@pytest.mark.slow
def test_chunks_give_the_pictures_of_one_batch(small, expected, monkeypatch):
    """The last chunk is padded, so that programs for one batch size alone are compiled."""
    sizes = set()
    denoise = sample_module.denoise

    def record(params, conditioning, noise, **options):
        sizes.add(len(noise))
        return denoise(params, conditioning, noise, **options)

    monkeypatch.setattr(sample_module, "denoise", record)
    got = jitjax.sample(small, PROMPTS, key=KEY, chunk=2, **OPTIONS)
    assert sizes == {2}
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=ROUNDING)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_chunks_that_are_no_smaller_change_nothing(small):
    expected = jitjax.sample(small, PROMPTS[:2], key=KEY, **OPTIONS)
    for chunk in (2, 99):
        got = jitjax.sample(small, PROMPTS[:2], key=KEY, chunk=chunk, **OPTIONS)
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(got, expected)


def test_keys_guidance_and_conditioning_of_every_picture(small):
    keys = jax.random.split(KEY, 5)
    guidance = jnp.array([1.0, 2.0, 3.0, 4.0, 50.0])
    conditioning = jitjax.encode_prompt(small, PROMPTS)
    on_host = jax.tree.map(np.asarray, conditioning)

    def two(rows, guidance=guidance):
        of_both = jax.tree.map(lambda x: x[rows], (on_host, keys, guidance))
        return jitjax.sample(small, of_both[0], key=of_both[1], guidance=of_both[2], **OPTIONS)

    pairs = np.array([[0, 3], [1, 4], [2, 0]])  # of no chunk
    expected = [two(rows) for rows in pairs]
    for given in (conditioning, on_host):
        got = jitjax.sample(small, given, key=keys, guidance=guidance, chunk=2, **OPTIONS)
        np.testing.assert_allclose(got[pairs], expected, atol=ROUNDING)
    other = two(pairs[1], jnp.full(5, 2.0))
    assert np.abs(other[1] - got[4]).max() > 10 * ROUNDING  # else it proves nothing


@pytest.mark.slow
def test_under_transformations(small, expected):
    """One chunk after another in one program, whose result is on the device."""
    conditioning = jitjax.encode_prompt(small, PROMPTS)

    def chunked(conditioning, key):
        return jitjax.sample(small, conditioning, key=key, chunk=2, **OPTIONS)

    got = jax.jit(chunked)(conditioning, KEY)
    assert isinstance(got, jax.Array)
    np.testing.assert_allclose(got, expected, atol=ROUNDING)
    # Nothing that is given is traced, but all that is computed is.
    closed_over = lambda: jitjax.sample(small, PROMPTS, key=KEY, chunk=2, **OPTIONS)  # noqa: E731
    assert jax.eval_shape(closed_over).shape == expected.shape


@pytest.mark.slow
def test_memory_is_that_of_one_chunk(small):
    """All arrays on the device, at every step: no more bytes for 24 prompts than for 6."""

    def most_bytes(count: int) -> int:
        sizes = []
        jitjax.sample(
            small,
            (PROMPTS * 5)[:count],
            key=KEY,
            chunk=2,
            progress=lambda _: sizes.append(sum(array.nbytes for array in jax.live_arrays())),
            **OPTIONS,
        )
        assert len(sizes) == count // 2 * PLAN.steps
        return max(sizes)

    picture = OPTIONS["height"] * OPTIONS["width"] * 3 * 4
    tokens = picture // 12  # 64 channels for 16 x 16 pixels of 3
    # How many steps are dispatched and not yet reported, or whether the chunk is decoded already,
    # depends on the time. The keys and the guidance of a picture have a few bytes.
    ahead = 2 * (picture + STEPS_AHEAD * tokens)
    assert most_bytes(24) - most_bytes(6) < ahead + 18 * 64 < 18 * picture / 2


def test_one_progress_bar_over_all_chunks(small, capsys):
    options = OPTIONS | {"plan": shared_runs.DENSE}
    jitjax.sample(small, PROMPTS, key=KEY, chunk=2, progress=True, **options)
    error = capsys.readouterr().err
    assert "6/6" in error
    assert "2/2" not in error


def test_errors(small, unchecked):
    for chunk in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"chunk is .*; expected a positive integer, or None"):
            jitjax.sample(small, PROMPTS, key=KEY, chunk=chunk, **OPTIONS)
    with pytest.raises(ValueError, match="expected a positive integer"):  # it must be static
        jax.jit(lambda n: jitjax.sample(small, PROMPTS, key=KEY, chunk=n, **OPTIONS))(2)
    keys = jax.random.split(KEY, 4)
    with pytest.raises(ValueError, match=r"key has shape \[4\]; expected \[\] or \[5\]"):
        jitjax.sample(small, PROMPTS, key=keys, chunk=2, **OPTIONS)
    conditioning = jitjax.encode_prompt(small, PROMPTS)
    text = conditioning.text.at[4, 0, 0].set(jnp.nan)
    damaged = jitjax.Conditioning(text, conditioning.pooled)
    steps: list[int] = []
    with pytest.raises(ValueError, match=r"Conditioning\.text has 1 values that are not finite"):
        jitjax.sample(small, damaged, key=KEY, chunk=2, progress=steps.append, **OPTIONS)
    assert steps == []  # before the first chunk is made


def test_long_prompts_are_told_by_their_place_in_the_whole(small):
    prompts = [*PROMPTS[:3], "a star " * 200]
    with pytest.warns(UserWarning, match=r"^prompt\[3\] has more than") as warned:
        jitjax.sample(small, prompts, key=KEY, chunk=2, **OPTIONS)
    assert len(warned) == 2  # T5 and CLIP
