"""Models with more input channels: `control=` (Canny, Depth), and `image=`, `mask=` for Fill."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build
from shared_runs import DENSE, GRID, HEIGHT, PROMPTS, SPARSE, WIDTH

import jitjax
from jitjax.denoise import batch_keys
from jitjax.fill import fill_tokens, masked_pictures, with_mask
from jitjax.models.flux import FluxTransformer
from jitjax.sampler.grid import positions
from jitjax.sampler.plan import Plan
from jitjax.velocity import FluxVelocity, VelocityInputs

PROMPT = PROMPTS[0]
ONE_STEP = Plan(1)
"""For gradients, whose compilation takes long."""
KEY = jax.random.key(0)
MASK = np.zeros((1, HEIGHT, WIDTH), np.float32)
MASK[:, 5:20, 30:47] = 1


@pytest.fixture(scope="module")
def canny(small):
    return build.with_input_channels(small, 128)


@pytest.fixture(scope="module")
def fill(small):
    return build.with_input_channels(small, 384)


@pytest.fixture(scope="module")
def text(small):
    return jitjax.encode_prompt(small, PROMPTS)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(1), (2, 8, 64))


@pytest.fixture(scope="module")
def control():
    return jax.random.normal(jax.random.key(2), (2, 8, 64))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)


ANCHORS = np.array([[7, 0, 2], [1, 6, 3]])
SAMPLES = np.arange(2)[:, None]


@pytest.fixture(scope="module")
def velocity_of_anchors(canny, text, noise, control) -> np.ndarray:
    """Of `ANCHORS`, whose rows of `control` are put together here."""
    where = positions(jnp.asarray(ANCHORS), GRID)

    @jax.jit
    def forward(tokens):
        inputs = text.text, text.pooled, jnp.full(2, 0.5), jnp.full(2, 3.5)
        model = FluxTransformer(canny.config.transformer)
        return model.apply({"params": canny.transformer}, tokens, where, *inputs)

    return np.asarray(forward(np.concatenate([noise, control], axis=2)[SAMPLES, ANCHORS]))


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_anchors_get_their_own_rows(canny, text, noise, control, velocity_of_anchors, padded):
    where = np.asarray(positions(jnp.asarray(ANCHORS), GRID))
    tokens, valid = np.asarray(noise)[SAMPLES, ANCHORS], None
    if padded:
        tokens = np.pad(tokens, ((0, 0), (0, 2), (0, 0)), constant_values=np.nan)
        # What `positions` gives for the index 8, that of padded slots.
        last = np.asarray(positions(jnp.array([8, 8]), GRID))
        where = np.concatenate([where, last[None].repeat(2, axis=0)], axis=1)
        valid = np.broadcast_to(np.arange(5) < 3, (2, 5))
    inputs = VelocityInputs(
        canny.transformer, text, jnp.full(2, 3.5), control=control.reshape(2, *GRID, 64)
    )
    velocity = jax.jit(FluxVelocity(canny.config.transformer))
    got = np.asarray(velocity(tokens, where, jnp.asarray(0.5), valid, inputs))
    assert got.shape == tokens.shape
    np.testing.assert_allclose(got[:, :3], velocity_of_anchors, rtol=1e-4, atol=1e-5)


def test_all_tokens_as_anchors_give_the_dense_result(canny, text, noise, control):
    plan = DENSE.replace(densities=(0.9, 1.0), stage_ends=(0.5, 1.0), pad_to=20, spare="anchors")
    assert plan.budgets(8, 12)[0] == 8
    options: Any = {"grid": GRID, "key": KEY}
    dense = jitjax.denoise(canny, text, noise, plan=DENSE, control=control, **options)
    got = jitjax.denoise(canny, text, noise, plan=plan, control=control, **options)
    np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-5)
    other = jitjax.denoise(canny, text, noise, plan=DENSE, control=control[:, ::-1], **options)
    assert np.abs(dense - other).max() > 0.1


def test_sample_encodes_the_control_picture(canny, text, pictures):
    got = jitjax.sample(canny, text, key=KEY, plan=DENSE, control=pictures)
    assert got.shape == pictures.shape
    keys = [jax.random.split(key) for key in batch_keys(KEY, 2)]
    tokens = jitjax.denoise(
        canny,
        text,
        jnp.stack([jax.random.normal(noise_key, (8, 64)) for noise_key, _ in keys]),
        plan=DENSE,
        grid=GRID,
        control=jitjax.encode(canny, pictures),
    )
    np.testing.assert_allclose(got, jitjax.decode(canny, tokens, grid=GRID), atol=1e-4)


@pytest.mark.slow
def test_a_picture_for_all_prompts_and_chunks_under_jit(canny, text, pictures):
    options: Any = {"key": KEY, "plan": SPARSE, "image": pictures[1:], "strength": 0.5}
    shared = np.asarray(jitjax.sample(canny, text, control=pictures[:1], **options))
    assert shared.shape == (2, 32, 64, 3)
    run = jax.jit(lambda control: jitjax.sample(canny, text, control=control, chunk=1, **options))
    chunked = np.asarray(run(pictures))
    # Each batch size compiles to its own program, which rounds differently.
    np.testing.assert_allclose(chunked[0], shared[0], atol=1e-4)
    assert np.abs(chunked[1] - shared[1]).max() > 0.01


@pytest.mark.slow
def test_jit_vmap_and_grad(canny, text, noise, control):
    def run(control, noise, text, pooled):
        one = jitjax.Conditioning(text[None], pooled[None])
        options: Any = {"plan": ONE_STEP, "grid": GRID, "control": control[None]}
        tokens = jitjax.denoise(canny, one, noise[None], **options)[0]
        return (tokens**2).mean(), tokens

    mapped = jax.jit(jax.vmap(jax.grad(run, has_aux=True)))
    gradients, got = mapped(control, noise, text.text, text.pooled)
    expected = jitjax.denoise(canny, text, noise, plan=ONE_STEP, grid=GRID, control=control)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(gradients).all()
    assert (np.abs(gradients) > 0).mean() > 0.9


def test_channels_of_a_mask(small):
    """Token (r, c), channel 64 + 4 (8 i + j) + 2 p + q: pixel 16 r + 8 p + i, 16 c + 8 q + j."""
    mask = np.random.default_rng(0).uniform(0, 1, (1, 32, 48)).astype(np.float32)
    mask[0, 0, 0] = 0.5  # covers
    got = np.asarray(with_mask(jnp.zeros((1, 6, 64)), mask, small.config))
    assert got.shape == (1, 6, 320)
    for y, x in np.ndindex(32, 48):
        (row, p, i), (column, q, j) = ((z // 16, z % 16 // 8, z % 8) for z in (y, x))
        channel = 64 + 4 * (8 * i + j) + 2 * p + q
        assert got[0, 3 * row + column, channel] == (mask[0, y, x] >= 0.5)


def test_covered_pixels_are_grey(pictures):
    got = masked_pictures(pictures, MASK)
    assert isinstance(got, np.ndarray)
    assert (got[:, 5:20, 30:47] == 0.5).all()
    np.testing.assert_array_equal(got[:, :5], pictures[:, :5])
    np.testing.assert_array_equal(masked_pictures(jnp.asarray(pictures), MASK), got)


def test_fill_keeps_what_is_outside_the_mask(fill, text, pictures):
    """It runs on the tokens of the plan, as without a mask; pixels are composited."""
    soft = np.minimum(MASK, 1)
    soft[:, 20:24, 30:47] = 0.25  # is not covered, but mixed
    got = jitjax.sample(fill, text, key=KEY, plan=DENSE, image=pictures, mask=soft)
    outside = soft[0] == 0
    np.testing.assert_array_equal(got[:, outside], pictures[:, outside])
    keys = [jax.random.split(key) for key in batch_keys(KEY, 2)]
    tokens = jitjax.denoise(
        fill,
        text,
        jnp.stack([jax.random.normal(noise_key, (8, 64)) for noise_key, _ in keys]),
        plan=DENSE,
        grid=GRID,
        control=fill_tokens(fill, pictures, MASK.repeat(2, axis=0)),
    )
    made = jitjax.decode(fill, tokens, grid=GRID)
    weight = soft[..., None]
    np.testing.assert_allclose(got, weight * made + (1 - weight) * pictures, atol=1e-4)


@pytest.mark.slow
def test_fill_in_chunks_with_a_mask_for_all(fill, pictures):
    options: Any = {"key": KEY, "plan": DENSE, "strength": 0.5}
    shared = jitjax.sample(fill, PROMPTS, image=pictures[:1], mask=MASK > 0, **options)
    masks = MASK.repeat(2, axis=0)
    chunked = jitjax.sample(fill, PROMPTS, image=pictures, mask=masks, chunk=1, **options)
    np.testing.assert_allclose(chunked[0], shared[0], atol=1e-4)
    np.testing.assert_array_equal(chunked[1][MASK[0] == 0], pictures[1][MASK[0] == 0])
    # A mask that is 1 everywhere is allowed: the model is shown nothing of the picture.
    everything = jitjax.sample(
        fill,
        [PROMPT] * 2,
        image=pictures,
        mask=np.ones_like(MASK),
        key=jnp.stack([KEY, KEY]),
        plan=ONE_STEP,
    )
    everything = np.asarray(everything)
    np.testing.assert_allclose(everything[0], everything[1], atol=1e-4)


@pytest.mark.slow
def test_fill_with_a_traced_mask_and_gradients(fill, text, pictures):
    """Gradients reach the picture, and the mask by what is composited."""
    one = jax.tree.map(lambda leaf: leaf[:1], text)
    image, mask = jnp.asarray(pictures[:1]), jnp.asarray(0.75 * MASK)

    def run(image, mask):
        made = jitjax.sample(fill, one, key=KEY, plan=ONE_STEP, image=image, mask=mask)
        return (made**2).mean(), made

    gradients, made = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(image, mask)
    outside = MASK == 0
    np.testing.assert_array_equal(made[outside], image[outside])
    assert np.abs(made - image)[~outside].max() > 0.1
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (jnp.abs(gradient) > 0).mean() > 0.9


def fail(*arguments, **options):
    raise AssertionError("a model runs")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("canny", (), r"takes a control picture, as FLUX.1 Canny and Depth \(in_channels is 128\), "
                      "and there is no control; expected control"),
        ("canny", ("image",), "there is no control"),
        ("fill", (), "takes a masked picture, as FLUX.1 Fill .in_channels is 384., and there is "
                     "no image and no mask; expected image and mask"),
        ("fill", ("image",), "there is no mask; expected image and mask"),
        ("fill", ("image", "mask", "control"), "there is control, but the model takes a masked"),
        ("small", ("control",), r"there is control, but the model takes no control picture "
                                r"\(in_channels is 64\); expected no control"),
    ],
)  # fmt: skip
def test_a_model_that_needs_pictures_and_the_reverse(
    request, pictures, monkeypatch, model, arguments, message
):
    for module, name in (("task", "encode"), ("sample", "denoise"), ("sample", "encode_both")):
        monkeypatch.setattr(sys.modules[f"jitjax.{module}"], name, fail)
    given = {"image": pictures[:1], "control": pictures[:1], "mask": MASK}
    with pytest.raises(ValueError, match=message):
        jitjax.sample(
            request.getfixturevalue(model), PROMPT, key=KEY, **{k: given[k] for k in arguments}
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": np.zeros((1, 32, 48, 3), np.float32)},
         "image's width is 64; expected 48, that of control"),
        ({"height": 64}, "height is 64; expected 32, that of image"),
        ({"image": None, "strength": None, "height": 64}, "expected 32, that of control"),
        ({"control": np.zeros((3, 32, 64, 3), np.float32)}, "expected a batch of 1 or 2"),
        ({"control": np.full((1, 32, 64, 3), -1.0)}, "control has values from -1 to -1"),
    ],
)  # fmt: skip
def test_control_pictures_that_do_not_fit(canny, pictures, monkeypatch, change, message):
    monkeypatch.setattr(sys.modules["jitjax.task"], "encode", fail)
    arguments = {"image": pictures, "control": pictures, "strength": 0.5, "key": KEY} | change
    with pytest.raises(ValueError, match=message):
        jitjax.sample(canny, [PROMPT] * 2, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_denoise_and_compile_check_the_model(small, canny, fill, text, noise, control, monkeypatch):
    monkeypatch.setattr(FluxVelocity, "__call__", fail)
    for params, given, message in (
        (canny, None, r"control is None; expected \[2, 8, 64\]"),
        (fill, None, r"takes a masked picture, .* control is None; expected \[2, 8, 320\]"),
        (fill, control, r"control has shape \[2, 8, 64\]; expected \[2, 8, 320\]"),
        (canny, control[:1], r"control has shape \[1, 8, 64\]"),
        (canny, jnp.full_like(control, jnp.nan), "control has 1024 values that are not finite"),
        (small, control, "control is given, but the model takes no control picture"),
    ):
        with pytest.raises(ValueError, match=message):
            jitjax.denoise(params, text, noise, plan=DENSE, grid=GRID, control=given)
    monkeypatch.setattr(sys.modules["jitjax.compiled"], "tokenize", fail)
    with pytest.raises(ValueError, match="`compile` is for prompts alone; expected `sample`"):
        jitjax.compile(canny)
