"""Files of encoded prompts: what they keep, and which are refused."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_runs
from safetensors.numpy import load_file, save_file

import jitjax
from jitjax import files
from jitjax.conditioning import Conditioning, read_conditioning

PROMPTS = ["a red circle", 'with "quotes",\nlines and an emoji \N{ARTIST PALETTE}']


def conditioning(dtype=jnp.float32):
    text, pooled = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.arange(10.0).reshape(2, 5)
    return Conditioning(text.astype(dtype), pooled.astype(dtype))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.safetensors"
    conditioning().save(path, prompts=PROMPTS)
    return path


def test_a_file_keeps_values_and_prompts(file):
    got, prompts = read_conditioning(file)
    for name in ("text", "pooled"):
        np.testing.assert_array_equal(getattr(got, name), getattr(conditioning(), name))
        assert getattr(got, name).dtype == jnp.float32
    assert prompts == PROMPTS
    assert os.listdir(file.parent) == [file.name]
    np.testing.assert_array_equal(Conditioning.load(str(file)).text, got.text)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_embeddings_are_widened_exactly(tmp_path, dtype):
    narrow = conditioning(dtype)
    narrow.save(tmp_path / "a.safetensors")
    got, prompts = read_conditioning(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(got.text, narrow.text.astype(jnp.float32))
    assert prompts == []


def test_a_picture_of_a_file_is_that_of_its_prompts(small, tmp_path):
    settings = {"key": jax.random.key(0), "plan": shared_runs.DENSE, **shared_runs.SIZE}
    encoded = jitjax.encode_prompt(small, ["a red circle", "blue"])
    encoded.save(tmp_path / "a.safetensors")
    loaded = Conditioning.load(tmp_path / "a.safetensors")
    expected = jitjax.sample(small, ["a red circle", "blue"], **settings)
    np.testing.assert_array_equal(jitjax.sample(small, loaded, **settings), expected)


def test_nothing_is_replaced_unless_asked(file):
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        conditioning().save(file)
    assert file.read_bytes() == before
    conditioning().save(file, overwrite=True)
    assert read_conditioning(file)[1] == []
    assert os.listdir(file.parent) == [file.name]


def test_a_write_that_fails_leaves_nothing(file, monkeypatch):
    before = file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*prompts\.safetensors"):
        conditioning().save(file, overwrite=True)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "no safetensors file, or an incomplete one"),
        (lambda data: b"", "no safetensors file, or an incomplete one"),
        (lambda data: b"\x89PNG" * 100, "no safetensors file, or an incomplete one"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 64]), "is damaged: its values differ"),
        (lambda data: data.replace(b'version":"1', b'version":"2'), "has version '2'; expected 1"),
    ],
)
def test_damaged_files_are_refused(file, change, message):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        Conditioning.load(file)


def test_foreign_files_are_refused(tmp_path, file):
    other = tmp_path / "weights.safetensors"
    save_file({"text": np.ones((1, 2, 3), np.float32)}, other)
    with pytest.raises(ValueError, match="a safetensors file of something else"):
        Conditioning.load(other)
    metadata = {"format": "jitjax conditioning", "version": "1"}
    save_file(load_file(file) | {"more": np.ones(2)}, other, metadata)
    with pytest.raises(ValueError, match=r"has the tensors \['more', 'pooled', 'text'\]; expected"):
        Conditioning.load(other)
    with pytest.raises(ValueError, match="is no file"):
        Conditioning.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no encoded prompts at"):
        Conditioning.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "pooled", "prompts", "message"),
    [
        (np.ones((2, 3, 4)), np.ones((1, 5)), (), "pooled has batch size 1; expected 2"),
        (np.ones((3, 4)), np.ones((1, 5)), (), r"text has shape \[3, 4\]; expected 3 dimensions"),
        (np.full((1, 3, 4), np.nan), np.ones((1, 5)), (), "text has values that are not finite"),
        (np.ones((1, 3, 4)), np.ones((1, 5)), ["a", "b"], "prompts is 2 strings; expected none or"),
        (np.ones((1, 3, 4)), np.ones((1, 5)), "a", "prompts is 'a'; expected none or 1"),
    ],
)
def test_what_cannot_be_saved(tmp_path, unchecked, text, pooled, prompts, message):
    with pytest.raises(ValueError, match=message):
        Conditioning(text, pooled).save(tmp_path / "a.safetensors", prompts=prompts)
    assert not list(tmp_path.iterdir())
