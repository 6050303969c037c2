"""`sample(image=, strength=)`, `plan_at_strength` and `denoise(clean=)`."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_runs
from shared_runs import GRID, HEIGHT, PROMPTS, SIZE, WIDTH

import jitjax
from jitjax.denoise import batch_keys, flux_sigmas
from jitjax.sampler.entry import enter_plan, first_step
from jitjax.sampler.plan import PLANS, Plan
from jitjax.sampler.schedule import beta_sigmas

PROMPT = PROMPTS[0]
DENSE = Plan(4, schedule="shifted")
SPARSE = Plan(5, (0.5, 0.75, 1.0), (0.4, 0.6, 1.0))
"""Stages of 2, 1 and 2 steps."""


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("steps", "strength", "kept"),
    # By hand: diffusers keeps steps - int(steps - steps * strength).
    [
        (50, 0.6, 30),
        (4, 0.6, 3),  # int(1.6) = 1 dropped
        (4, 0.25, 1),
        (4, 0.01, 1),
        (4, 0.76, 4),  # int(0.96) = 0 dropped
        (10, 0.6, 6),
        (50, 0.58, 29),  # 50 * 0.58 is below 29 in floating point
        (100, 0.55, 56),  # 100 * 0.55 is above 55
        (7, 1.0, 7),
        (7, 1e-300, 1),
    ],
)
def test_steps_that_are_kept(steps, strength, kept):
    assert steps - first_step(steps, strength) == kept


def test_a_dense_plan_keeps_its_last_sigmas(small):
    # 8 tokens, constant or dynamic shift: what is kept is the tail of the plan's own sigmas.
    whole = flux_sigmas(DENSE, 8, small.config)
    plan = jitjax.plan_at_strength(DENSE, 0.6, grid=(2, 4), config=small.config)
    assert plan.steps == 3
    assert plan.densities == (1.0,)
    np.testing.assert_array_equal(flux_sigmas(plan, 8, small.config), whole[1:])
    assert jitjax.plan_at_strength(DENSE, 1.0, grid=(2, 4), config=small.config) is DENSE


@pytest.mark.parametrize(
    ("strength", "densities", "ends"),
    [
        (0.8, (0.5, 0.75, 1.0), (1, 2, 4)),
        (0.6, (0.75, 1.0), (1, 3)),
        (0.4, (1.0,), (2,)),
        (0.2, (1.0,), (1,)),
    ],
)
def test_stages_before_the_entry_fall_away(small, strength, densities, ends):
    plan = jitjax.plan_at_strength(SPARSE, strength, grid=(4, 4), config=small.config)
    assert plan.densities == densities
    assert plan.stage_steps == ends
    sigmas = np.append(beta_sigmas(5), 0).astype(np.float32)
    np.testing.assert_array_equal(flux_sigmas(plan, 16, small.config), sigmas[5 - plan.steps :])


def test_every_entry_of_every_named_plan(small):
    for plan in PLANS.values():
        sigmas = flux_sigmas(plan, 1024, small.config)
        for steps in range(1, plan.steps + 1):
            entered = enter_plan(plan, sigmas, (steps - 0.5) / plan.steps)  # rounded up
            assert entered.steps == steps
            dropped = plan.steps - steps
            ends = [end - dropped for end in plan.stage_steps if end > dropped]
            assert list(entered.stage_steps) == ends
            assert entered.budgets(1024) == plan.budgets(1024)[-len(ends) :]
            kept = flux_sigmas(entered, 1024, small.config)
            np.testing.assert_array_equal(kept, sigmas[dropped:])


@pytest.mark.parametrize(
    "plan",
    [shared_runs.DENSE, pytest.param(SPARSE, marks=pytest.mark.slow)],
    ids=["dense", "sparse"],
)
def test_strength_1_is_plain_sampling(small, images, plan):
    key = jax.random.key(0)
    expected = jitjax.sample(small, PROMPTS, key=key, plan=plan, **SIZE)
    got = jitjax.sample(small, PROMPTS, key=key, plan=plan, image=images, strength=1.0)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(DENSE, marks=pytest.mark.slow),
        # Without its first step, a step on some of the tokens is left, and two on all.
        shared_runs.SPARSE.replace(steps=4, microflow="blend", microflow_noise="fresh"),
        pytest.param(SPARSE, marks=pytest.mark.slow),
        pytest.param(
            SPARSE.replace(microflow_noise="initial", solver="multistep"), marks=pytest.mark.slow
        ),
    ],
    ids=["dense", "sparse", "three stages", "initial noise"],
)
def test_sample_is_encode_mix_denoise_decode(small, images, plan):
    key, strength = jax.random.key(5), 0.7
    got = jitjax.sample(small, PROMPTS, key=key, plan=plan, image=images, strength=strength)
    noise_keys, denoise_keys = jax.vmap(jax.random.split, out_axes=1)(batch_keys(key, 2))
    noise = jnp.stack([jax.random.normal(noise_key, (8, 64)) for noise_key in noise_keys])
    entered = jitjax.plan_at_strength(plan, strength, grid=GRID, config=small.config)
    assert entered.steps == plan.steps - 1
    sigma = flux_sigmas(plan, 8, small.config)[plan.steps - entered.steps]
    start = (1 - sigma) * jitjax.encode(small, images) + sigma * noise
    tokens = jitjax.denoise(
        small,
        jitjax.encode_prompt(small, PROMPTS),
        start,
        plan=entered,
        grid=GRID,
        key=denoise_keys,
        # "initial" is the noise, and not the first state.
        microflow_noise=noise if plan.microflow_noise == "initial" else None,
    )
    expected = jitjax.decode(small, tokens, grid=GRID)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_the_trace_starts_at_the_picture_and_new_anchors_hit_their_noise(small, images):
    """The micro-flow's target is (1 - sigma) lifted + sigma noise, with the noise itself."""
    plan = SPARSE.replace(microflow="hit", microflow_noise="initial")
    plan = jitjax.plan_at_strength(plan, 0.6, grid=(2, 4), config=small.config)
    assert plan.stage_steps == (1, 3)
    noise, clean = (
        jax.random.normal(jax.random.key(1), (1, 8, 64)),
        jitjax.encode(small, images[:1]),
    )
    tokens, trace = jitjax.denoise(
        small,
        jitjax.encode_prompt(small, PROMPT),
        noise,
        plan=plan,
        grid=(2, 4),
        key=jax.random.key(0),
        clean=clean,
        trace=True,
    )
    assert np.isfinite(tokens).all()
    transition = trace.transitions[0]
    sigma = flux_sigmas(plan, 8, small.config)[1]
    new = np.asarray(transition.new[0])
    expected = (1 - sigma) * transition.lifted[0] + sigma * noise[0]
    np.testing.assert_allclose(transition.target[0], expected[new], rtol=1e-4, atol=1e-4)
    assert trace.evaluations == plan.steps


@pytest.mark.slow
def test_trained_model_keeps_more_of_the_picture_at_lower_strength():
    params = jitjax.load("tiny")
    plan = Plan(10)
    picture = jitjax.sample(
        params, "a large red circle", key=jax.random.key(0), plan=plan, height=128, width=128
    )
    distances = []
    for strength in (0.2, 1.0):
        made = jitjax.sample(
            params,
            "a small blue star",
            key=jax.random.key(1),
            plan=plan,
            image=picture,
            strength=strength,
        )
        distances.append(float(((made - picture) ** 2).mean()))
    assert distances[0] < 0.2 * distances[1]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.slow
def test_keys_chunks_and_progress(small, images, shared):
    prompts, key = [PROMPT, "a small blue square", PROMPT], jax.random.key(3)
    pictures = images[:1] if shared else images[[0, 1, 0]]
    steps = 2 if shared else 3  # of the last stage, or of the last two
    options = {"plan": SPARSE, "strength": steps / SPARSE.steps}
    # Alone they run by programs that other tests compile, too.
    expected = [
        jitjax.sample(small, prompt, key=one_key[None], image=picture[None], **options)[0]
        for prompt, one_key, picture in zip(
            prompts, batch_keys(key, 3), images[[0, 0 if shared else 1, 0]], strict=True
        )
    ]
    calls: list[int] = []
    chunked = jitjax.sample(
        small, prompts, key=key, image=pictures, chunk=2, progress=calls.append, **options
    )
    # Each batch size compiles to its own program, which rounds differently.
    np.testing.assert_allclose(chunked, expected, atol=1e-4)
    assert calls == [1] * 2 * steps  # in two chunks
    if shared:  # it has to be repeated under `jit`
        run = jax.jit(lambda *x: jitjax.sample(small, prompts, key=x[0], image=x[1], **options))
        np.testing.assert_allclose(run(key, pictures), expected, atol=1e-4)


@pytest.mark.slow
def test_image_to_image_under_vmap_and_grad(small, images):
    text = jitjax.encode_prompt(small, PROMPT)

    def run(image, key):
        # Of the last stage, because the compilation of gradients takes long.
        options = {"plan": SPARSE, "strength": 0.4}
        return jitjax.sample(small, text, key=key, image=image[None], **options)[0]

    def loss(image, key):
        made = run(image, key)
        return (made**2).mean(), made

    keys = jax.random.split(jax.random.key(0), 2)
    gradients, mapped = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(jnp.asarray(images), keys)
    expected = [run(*pair) for pair in zip(images, keys, strict=True)]
    np.testing.assert_allclose(mapped, expected, atol=1e-4)
    assert np.isfinite(gradients).all()
    assert (np.abs(gradients).max(-1) > 0).mean() > 0.9


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strength": 0}, ValueError, r"strength is 0; expected a number in \(0, 1\]"),
        ({"strength": -0.5}, ValueError, "strength is -0.5"),
        ({"strength": 1.01}, ValueError, "strength is 1.01"),
        ({"strength": float("nan")}, ValueError, "strength is nan"),
        ({"strength": "0.6"}, TypeError, "strength is str"),
        ({"strength": True}, TypeError, "strength is bool"),
        ({"strenght": 0.5}, TypeError, "unexpected keyword argument 'strenght'"),
        ({"image": None, "strength": 0.6}, ValueError, "strength is 0.6, but image is None"),
        ({"height": 64}, ValueError, "height is 64; expected 32, that of image"),
        ({"width": 32}, ValueError, "width is 32; expected 64"),
        ({"image": np.zeros((1, 40, 60, 3))}, ValueError, "image has .* 48 rows and 64 columns"),
        ({"image": np.zeros((3, 32, 32, 3))}, ValueError, "expected a batch of 1 or 2"),
        ({"image": np.zeros((1, 32, 32, 3), np.uint8)}, TypeError, "image has dtype uint8"),
        ({"image": np.full((1, 32, 32, 3), 2.0), "strength": 1}, ValueError, "from 2 to 2"),
    ],
)
def test_errors_before_any_model_runs(small, images, monkeypatch, change, error, message):
    def fail(*arguments, **options):
        raise AssertionError("a model runs")

    for module, name in (("task", "encode"), ("sample", "denoise"), ("sample", "encode_both")):
        monkeypatch.setattr(sys.modules[f"jitjax.{module}"], name, fail)
    arguments = {"image": images, "key": jax.random.key(0)} | change
    with pytest.raises(error, match=message):
        jitjax.sample(small, [PROMPT] * 2, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_denoise_rejects_clean_tokens_of_another_shape(small):
    text, noise = jitjax.encode_prompt(small, PROMPT), jnp.zeros((1, 16, 64))
    with pytest.raises(ValueError, match=r"clean has shape \[1, 8, 64\]; expected that of noise"):
        jitjax.denoise(small, text, noise, plan=DENSE, clean=jnp.zeros((1, 8, 64)))
    with pytest.raises(ValueError, match="clean has 1024 values that are not finite"):
        jitjax.denoise(small, text, noise, plan=DENSE, clean=jnp.full((1, 16, 64), jnp.nan))
