"""`sample(reference=)` and `denoise(reference=)`: reference tokens beside the anchors (Kontext)."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build
from shared_runs import DENSE, GRID, PROMPTS, SIZE, SPARSE

import jitjax
from jitjax.denoise import batch_keys
from jitjax.models.flux import FluxTransformer
from jitjax.sampler.grid import positions
from jitjax.sampler.plan import Plan
from jitjax.task import check_task
from jitjax.velocity import FluxVelocity, VelocityInputs

OWN = (3, 2)
ONE_STEP = Plan(1)
"""For gradients, whose compilation takes long."""
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def text(small):
    return jitjax.encode_prompt(small, PROMPTS)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(1), (2, 8, 64))


@pytest.fixture(scope="module")
def reference():
    return jax.random.normal(jax.random.key(2), (2, 6, 64))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (2, 48, 32, 3)).astype(np.float32)


def denoise(small, text, noise, reference, plan, **options) -> Any:
    given: Any = {"key": KEY} | options
    return jitjax.denoise(
        small,
        text,
        noise,
        plan=plan,
        grid=GRID,
        reference=reference,
        reference_grid=OWN,
        **given,
    )


ANCHORS = np.array([[7, 0, 2], [7, 0, 2]])


@pytest.fixture(scope="module")
def velocity_of_anchors(small, text, noise, reference) -> np.ndarray:
    """Reference tokens are at (1, row, column) of their own grid."""
    own = np.array([[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1], [1, 2, 0], [1, 2, 1]])
    where = np.concatenate([positions(jnp.asarray(ANCHORS), GRID), [own, own]], axis=1)
    # Before the anchors in `FluxVelocity`, and here in the other order.
    tokens = np.concatenate([np.asarray(noise)[:, ANCHORS[0]], reference], axis=1)

    @jax.jit
    def forward(tokens, where):
        inputs = text.text, text.pooled, jnp.full(2, 0.5), jnp.full(2, 3.5)
        model = FluxTransformer(small.config.transformer)
        return model.apply({"params": small.transformer}, tokens, where, *inputs)

    return np.asarray(forward(tokens, where))[:, :3]


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_network_runs_on_both_and_returns_the_anchors(
    small, text, noise, reference, velocity_of_anchors, padded
):
    where = np.asarray(positions(jnp.asarray(ANCHORS), GRID))
    tokens, valid = np.asarray(noise)[:, ANCHORS[0]], None
    if padded:
        tokens = np.pad(tokens, ((0, 0), (0, 2), (0, 0)), constant_values=np.nan)
        where = np.pad(where, ((0, 0), (0, 2), (0, 0)), constant_values=9)
        valid = np.broadcast_to(np.arange(5) < 3, (2, 5))
    inputs = VelocityInputs(
        small.transformer, text, jnp.full(2, 3.5), reference=reference.reshape(2, *OWN, 64)
    )
    velocity = jax.jit(FluxVelocity(small.config.transformer))
    got = np.asarray(velocity(tokens, where, jnp.asarray(0.5), valid, inputs))
    assert got.shape == tokens.shape
    np.testing.assert_allclose(got[:, :3], velocity_of_anchors, rtol=1e-4, atol=1e-5)


def test_padding_stays_last(small, text, noise, reference, monkeypatch):
    """As cuDNN's attention needs it; its rows differ, as those of inpainting's anchors do."""
    seen = {}

    def apply(self, variables, tokens, positions, *rest):
        seen["valid"] = rest[-1]
        return tokens

    monkeypatch.setattr(FluxTransformer, "apply", apply)
    valid = jnp.array([[True, True, False], [True, False, False]])
    inputs = VelocityInputs(small.transformer, text, None, reference=reference.reshape(2, 3, 2, 64))
    where = jnp.zeros((2, 3, 3), jnp.int32)
    got = FluxVelocity(small.config.transformer)(
        noise[:, :3], where, jnp.asarray(0.5), valid, inputs
    )
    np.testing.assert_array_equal(got, noise[:, :3])
    assert seen["valid"].tolist() == [[True] * 8 + [False], [True] * 7 + [False] * 2]


def test_all_tokens_as_anchors_give_the_dense_result(small, text, noise, reference):
    plan = DENSE.replace(densities=(0.9, 1.0), stage_ends=(0.5, 1.0), pad_to=16, spare="anchors")
    # 12 of text, 6 of the reference and 7 anchors are 25, so that all 8 run.
    assert plan.budgets(8, 18)[0] == 8
    dense = denoise(small, text, noise, reference, DENSE)
    np.testing.assert_allclose(
        denoise(small, text, noise, reference, plan), dense, rtol=1e-5, atol=1e-5
    )
    without = jitjax.denoise(small, text, noise, plan=DENSE, grid=GRID)
    assert np.abs(dense - without).max() > 0.1


@pytest.mark.slow
def test_padding_counts_the_reference_and_changes_nothing(small, text, noise, reference):
    got = denoise(small, text, noise, reference, SPARSE)
    seen = []
    velocity = FluxVelocity.__call__

    def record(self, tokens, positions, sigma, valid, args):
        seen.append((tokens.shape[1], valid is None))
        return velocity(self, tokens, positions, sigma, valid, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FluxVelocity, "__call__", record)
        padded = denoise(small, text, noise, reference, SPARSE.replace(pad_to=8))
    # 12 of text, 6 of the reference and 5 anchors are 23, padded to 24.
    assert (6, False) in seen
    np.testing.assert_allclose(padded, got, rtol=1e-4, atol=1e-4)


def test_a_reference_of_the_same_size_needs_no_grid(small, text, noise):
    options: Any = {"plan": DENSE, "grid": GRID, "reference": noise[:, ::-1], "trace": True}

    def program(**more):
        return jax.make_jaxpr(lambda: jitjax.denoise(small, text, noise, **options, **more))()

    without, given = program(), program(reference_grid=GRID)
    assert str(without) == str(given)
    assert (2, 2, 8, 64) in [x.aval.shape for x in given.jaxpr.outvars]  # no reference in states


def test_sample_encodes_the_reference_on_its_own_grid(small, text, pictures):
    got = jitjax.sample(small, text, key=KEY, plan=DENSE, reference=pictures, **SIZE)
    keys = [jax.random.split(key) for key in batch_keys(KEY, 2)]
    tokens = jitjax.denoise(
        small,
        text,
        jnp.stack([jax.random.normal(noise_key, (8, 64)) for noise_key, _ in keys]),
        plan=DENSE,
        grid=GRID,
        reference=jitjax.encode(small, pictures),
        reference_grid=OWN,
    )
    np.testing.assert_allclose(got, jitjax.decode(small, tokens, grid=GRID), atol=1e-4)


def test_without_a_size_the_result_has_the_references(small):
    size = {"reference": np.zeros((1, 48, 32, 3), np.float32)}
    assert check_task(size, None, None, small.config)[1] == (48, 32)
    assert check_task(size, 64, None, small.config)[1] == (64, 32)
    image = {"image": np.zeros((1, 16, 16, 3), np.float32)}
    assert check_task(size | image, None, None, small.config)[1] == (16, 16)


@pytest.mark.slow
def test_batches_chunks_and_progress(small, pictures):
    calls: list[int] = []
    options: Any = {"key": KEY, "plan": DENSE, **SIZE}
    shared = np.asarray(jitjax.sample(small, PROMPTS, reference=pictures[:1], **options))
    chunked = jitjax.sample(
        small, PROMPTS, reference=pictures, chunk=1, progress=calls.append, **options
    )
    assert calls == [1] * 4
    # Each batch size compiles to its own program, which rounds differently.
    np.testing.assert_allclose(chunked[0], shared[0], atol=1e-4)
    assert np.abs(chunked[1] - shared[1]).max() > 0.01


@pytest.mark.slow
def test_jit_vmap_and_grad(small, text, noise, reference):
    keys = batch_keys(KEY, 2)

    def run(reference, noise, key, text, pooled):
        one = jitjax.Conditioning(text[None], pooled[None])
        tokens = denoise(small, one, noise[None], reference[None], ONE_STEP, key=key[None])
        return (tokens**2).mean(), tokens[0]

    mapped = jax.jit(jax.vmap(jax.grad(run, has_aux=True)))
    gradients, got = mapped(reference, noise, keys, text.text, text.pooled)
    expected = denoise(small, text, noise, reference, ONE_STEP, key=keys)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(gradients).all()
    assert (np.abs(gradients) > 0).mean() > 0.9


def fail(*arguments, **options):
    raise AssertionError("a model runs")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reference": "cat.png"}, TypeError, "reference is str; expected an array"),
        ({"reference": np.zeros((1, 40, 32, 3))}, ValueError, "reference has 40 rows .* 48 rows"),
        ({"reference": np.zeros((3, 32, 32, 3))}, ValueError, "expected a batch of 1 or 2"),
        ({"reference": np.full((1, 32, 32, 3), 2.0)}, ValueError, "reference has values from 2"),
        ({"reference": np.full((1, 32, 32, 3), np.nan)}, ValueError, "reference has 3072 values"),
        ({"strength": 0.5}, ValueError, "strength is 0.5, but image is None"),
    ],
)
def test_errors_before_any_model_runs(small, pictures, monkeypatch, change, error, message):
    for module, name in (("task", "encode"), ("sample", "denoise"), ("sample", "encode_both")):
        monkeypatch.setattr(sys.modules[f"jitjax.{module}"], name, fail)
    arguments = {"reference": pictures, "key": KEY} | change
    with pytest.raises(error, match=message):
        jitjax.sample(small, PROMPTS, **arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_grid": None}, r"reference has shape \[2, 6, 64\]; expected \[2, 8, 64\] for "
                                   "a grid of 2 x 4 tokens .pass `reference_grid`"),
        ({"reference_grid": (3, 3)}, r"expected \[2, 9, 64\] for a grid of 3 x 3"),
        ({"reference_grid": 3}, r"grid is 3; expected \(rows, columns\)"),
        ({"reference": None}, r"reference_grid is \(3, 2\), but reference is None"),
        ({"reference": np.full((2, 6, 64), np.nan, np.float32)}, "reference has 768 values"),
        ({"reference": np.zeros((1, 6, 64), np.float32)}, r"expected \[2, 6, 64\]"),
    ],
)  # fmt: skip
def test_denoise_checks_the_reference(small, text, noise, reference, monkeypatch, change, message):
    monkeypatch.setattr(FluxVelocity, "__call__", fail)
    arguments = {"reference": reference, "reference_grid": OWN} | change
    with pytest.raises(ValueError, match=message):
        jitjax.denoise(small, text, noise, plan=DENSE, grid=GRID, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_models_with_further_channels_take_no_reference(small, text, noise, reference, pictures):
    canny = build.with_input_channels(small, 128)
    with pytest.raises(ValueError, match="there is reference, but the model takes a control pict"):
        jitjax.sample(canny, PROMPTS[0], key=KEY, control=pictures[:1], reference=pictures[:1])
    with pytest.raises(ValueError, match="reference is given, but the model takes a control pict"):
        denoise(canny, text, noise, reference, DENSE, control=noise)


def test_without_a_reference_kontext_makes_pictures_of_prompts(small, text, noise):
    known = dataclasses.replace(small.config, uses_reference=True)
    kontext = dataclasses.replace(small, config=known)
    options: Any = {"plan": DENSE, "grid": GRID}
    expected = jitjax.denoise(small, text, noise, **options)
    np.testing.assert_array_equal(jitjax.denoise(kontext, text, noise, **options), expected)
