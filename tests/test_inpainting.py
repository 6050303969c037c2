"""`sample(image=, mask=)`, `denoise(mask=)`, `jit_solve(known=)` and the anchors of inpainting."""

from __future__ import annotations

import itertools
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_runs

import jitjax
from jitjax.denoise import batch_keys, flux_sigmas
from jitjax.latents import unpack
from jitjax.masks import inpaint_anchors, mask_tokens
from jitjax.sampler.known import Known, anchor_counts, needed_tokens
from jitjax.sampler.plan import PLANS, Plan
from jitjax.sampler.solve import jit_solve
from jitjax.task import check_task, plan_and_inputs

DENSE = Plan(3, schedule="shifted")
SPARSE = Plan(3, (0.25, 0.75, 1.0), (0.4, 0.7, 1.0), pad_to=4)
HEIGHT, WIDTH = 64, 96
GRID = (4, 6)
N = 24
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((1, HEIGHT, WIDTH), np.float32)
    mask[:, top:bottom, left:right] = 1
    return mask


SMALL = rectangle(18, 31, 20, 40)
"""Of tokens (1, 1) and (1, 2); with the ring, 3 x 4 tokens from (0, 0) on."""
LARGE = rectangle(0, 50, 50, 96)
"""Of tokens (0, 3) to (3, 5); with the ring, 4 x 4 tokens from (0, 2) on."""


# The mask of tokens


def test_a_latent_is_as_new_as_the_newest_of_its_pixels(small):
    mask = np.random.default_rng(0).uniform(0, 1, (2, HEIGHT, WIDTH)).astype(np.float32)
    mask[0, 10:50, 3:70] = 0
    tokens = mask_tokens(mask, small.config)
    assert isinstance(tokens, np.ndarray)
    assert tokens.shape == (2, N, 64)
    latents = np.asarray(unpack(jnp.asarray(tokens), GRID))
    for b, i, j in itertools.product(range(2), range(8), range(12)):
        expected = mask[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].max()
        assert (latents[b, i, j] == expected).all()
    np.testing.assert_array_equal(mask_tokens(jnp.asarray(mask), small.config), tokens)


def test_what_is_needed_is_the_mask_and_all_tokens_that_touch_it(small):
    mask = np.concatenate([SMALL, LARGE])
    needed = needed_tokens(mask_tokens(mask, small.config), GRID).reshape(2, *GRID)
    expected = np.zeros((2, *GRID), bool)
    expected[0, 0:3, 0:4] = True
    expected[1, 0:4, 2:6] = True
    np.testing.assert_array_equal(needed, expected)


@pytest.mark.parametrize(
    ("plan", "context"),
    [(SPARSE, 0.25), (SPARSE.replace(context=0.5, fill="dither", first="strided"), 0.5)],
)
def test_anchors_of_masks_of_different_sizes(small, plan, context):
    mask = np.concatenate([SMALL, LARGE])
    tokens = mask_tokens(mask, small.config)
    anchors = np.asarray(inpaint_anchors(tokens, plan=plan, grid=GRID, key=KEY))
    needed = needed_tokens(tokens, GRID)
    counts = [12 + np.ceil(context * 12), 16 + np.ceil(context * 8)]
    assert anchors.shape == (2, max(counts))
    for row, inside, count, alone, key in zip(
        anchors, needed, counts, tokens, batch_keys(KEY, 2), strict=True
    ):
        used = row[row < N]
        assert len(used) == len(set(used)) == count
        assert set(np.flatnonzero(inside)) <= set(used)
        assert (row[len(used) :] == N).all()
        # They do not depend on the rest of the batch.
        one = inpaint_anchors(alone[None], plan=plan, grid=GRID, key=key[None])
        np.testing.assert_array_equal(one[0], used)


def test_the_context_is_the_plans_layout(small):
    """As for first anchors: corners first, then even rows and columns and the border."""
    plan, tokens = SPARSE.replace(context=0.2), mask_tokens(SMALL, small.config)
    for seed in range(5):
        key = jax.random.key(seed)
        anchors = np.asarray(inpaint_anchors(tokens, plan=plan, grid=GRID, key=key))
        assert anchors.shape == (1, 15)
        outside = set(anchors[0].tolist()) - set(np.flatnonzero(needed_tokens(tokens, GRID)[0]))
        assert {5, 18, 23} == outside  # the corners that are not in the ring


def test_a_count_is_not_rounded_up_by_rounding_of_numbers():
    needed = np.zeros((1, 100), bool)
    assert anchor_counts(needed, Plan(3, context=0.35)) == 35
    assert anchor_counts(needed, Plan(3, context=0.351)) == 36
    assert anchor_counts(needed, PLANS["4x"]) == 35
    assert anchor_counts(needed, PLANS["dense"]) == 100


def test_all_tokens_run_if_the_context_is_everything(small):
    tokens = mask_tokens(SMALL, small.config)
    assert inpaint_anchors(tokens, plan=DENSE, grid=GRID) is None
    assert inpaint_anchors(tokens, plan=SPARSE.replace(context=1.0), grid=GRID) is None


def test_the_context_of_a_plan_that_is_entered_later_is_that_of_the_whole(small):
    entered = jitjax.plan_at_strength(PLANS["4x"], 0.1, grid=GRID, config=small.config)
    assert entered.densities == (1.0,)
    assert entered.context_density == 0.35


# The solver


def velocity(tokens, positions, sigma, valid, args):
    place = positions[..., 1:].sum(-1, keepdims=True)
    weights = jnp.ones(tokens.shape[:2]) if valid is None else valid.astype(tokens.dtype)
    mean = jnp.einsum("bm,bmd->bd", weights, tokens) / weights.sum(1, keepdims=True)
    u = jnp.sin(place * args) - tokens + sigma * mean[:, None]
    return u if valid is None else jnp.where(valid[..., None], u, jnp.nan)


SIGMAS = np.array([1, 0.8, 0.5, 0.2, 0], np.float32)


def random_known(batch=2, soft=True) -> tuple[Known, np.ndarray]:
    rng = np.random.default_rng(0)
    clean, noise, start = rng.normal(size=(3, batch, N, 4)).astype(np.float32)
    mask = np.zeros((batch, N, 4), np.float32)
    mask[0, [7, 8]] = [[1, 1, 0.25, 0]] if soft else 1
    mask[-1, [3, 4, 5, 9, 10]] = 1
    return Known(jnp.asarray(clean), jnp.asarray(noise), jnp.asarray(mask)), start


ANCHORS = np.array([[0, 1, 7, 8, 12, 20, N, N], [0, 3, 4, 5, 9, 10, 17, 22]])


def solve(known, start, anchors=ANCHORS, plan=None, args=0.7, **more):
    return jit_solve(
        velocity,
        jnp.asarray(start),
        jnp.asarray(SIGMAS),
        plan=Plan(4, schedule=tuple(SIGMAS[:-1].tolist())) if plan is None else plan,
        grid=GRID,
        first_anchors=None if anchors is None else jnp.asarray(anchors),
        known=known,
        args=jnp.float32(args),
        **more,
    )


def by_numpy(known, start, anchors, midpoint=False) -> np.ndarray:
    """Return the states after every step of a loop in NumPy, [steps, b, n, d]."""
    clean, noise, mask = (np.asarray(x) for x in known)
    rows, columns = np.indices(GRID).reshape(2, -1)

    def field(y, sigma, index):
        index = np.arange(N) if index is None else index[index < N]
        mean = y[index].mean(0)
        u = np.zeros_like(y)
        u[index] = np.sin(0.7 * (rows + columns)[index, None]) - y[index] + sigma * mean
        return u

    def impose(y, sigma):
        return mask * y + (1 - mask) * ((1 - sigma) * clean + sigma * noise)

    y, states = impose(start, SIGMAS[0]), []
    for sigma, end in itertools.pairwise(SIGMAS):
        step = end - sigma
        for b in range(len(y)):
            index = None if anchors is None else anchors[b]
            u = field(y[b], sigma, index)
            if midpoint:
                u = field(y[b] + step / 2 * u, sigma + step / 2, index)
            y[b] = y[b] + step * u
        y = impose(y, end)
        states.append(y.copy())
    return np.stack(states)


ALL_OF_ONE = np.stack([np.append(ANCHORS[0], [N] * 16), np.arange(N)])


@pytest.mark.parametrize(
    "anchors", [None, ANCHORS, ALL_OF_ONE], ids=["all tokens", "anchors", "all of one sample"]
)
@pytest.mark.parametrize(
    "midpoint", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["Euler", "midpoint"]
)
def test_the_state_is_imposed_before_and_after_every_step(anchors, midpoint):
    known, start = random_known()
    expected = by_numpy(known, start, anchors, midpoint)
    solver = diffrax.Midpoint() if midpoint else None
    got, trace = solve(known, start, anchors, trace=True, solver=solver)
    np.testing.assert_allclose(trace.states, expected, atol=1e-5)
    np.testing.assert_array_equal(got, trace.states[-1])
    kept = np.asarray(known.mask) == 0
    np.testing.assert_array_equal(np.asarray(got)[kept], np.asarray(known.clean)[kept])
    # One stage, whose tokens the trace tells.
    assert len(trace.anchors) == 1
    assert trace.transitions == ()
    assert trace.slots == (8 if anchors is ANCHORS else N,) * 4
    if anchors is not None:
        np.testing.assert_array_equal(trace.anchors[0], anchors)


@pytest.mark.parametrize(
    "solver",
    ["multistep", pytest.param(diffrax.Tsit5(), marks=pytest.mark.slow)],
    ids=["multistep", "Tsit5"],
)
def test_solvers_with_a_memory(solver):
    """With a mask of ones nothing is imposed; and step by step is as in one call."""
    known, start = random_known()
    free = known._replace(mask=jnp.ones_like(known.mask))
    plain = solve(None, start, None, solver=solver)
    np.testing.assert_allclose(solve(free, start, None, solver=solver), plain, atol=1e-5)
    calls: list[int] = []
    whole = solve(known, start, solver=solver)
    steps = solve(known, start, solver=solver, progress=calls.append, check_finite=True)
    np.testing.assert_allclose(steps, whole, atol=1e-6)
    assert calls == [1] * 4


def test_a_solver_that_reuses_a_velocity_takes_that_of_the_imposed_state():
    """Tsit5 starts a step with the last velocity of the step before, unless the state has jumped.

    So the third step is that of a solve that begins there.
    """
    known, start = random_known(soft=False)
    states = solve(known, start, None, solver=diffrax.Tsit5(), trace=True)[1].states
    plan = Plan(1, schedule=(float(SIGMAS[2]),))
    last = jit_solve(
        velocity,
        states[1],
        jnp.asarray(SIGMAS[2:4]),
        plan=plan,
        grid=GRID,
        known=known,
        args=jnp.float32(0.7),
        solver=diffrax.Tsit5(),
    )
    np.testing.assert_allclose(last, states[2], atol=1e-5)


@pytest.mark.parametrize("pad_to", [8, 16])
def test_padding_and_stages_do_not_change_the_result(pad_to):
    known, start = random_known()
    stages = Plan(4, (0.25, 1.0), (0.5, 1.0), pad_to=pad_to)
    padded = solve(known, start, plan=stages, text_tokens=5)
    np.testing.assert_allclose(padded, solve(known, start), atol=1e-6)


def test_solve_under_vmap_jit_and_grad():
    known, start = random_known()
    expected = solve(known, start)

    def loss(known, start, anchors):
        made = solve(known, start, anchors)
        return (made**2).sum(), made

    inputs = jax.tree.map(lambda x: np.asarray(x)[:, None], (known, start, ANCHORS))
    gradients, mapped = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(*inputs)
    np.testing.assert_allclose(mapped[:, 0], expected, atol=1e-5)

    known = jax.tree.map(np.asarray, known)
    direction = jax.tree.map(lambda x: np.cos(np.arange(x.size).reshape(x.shape)), known)
    soft = (known.mask > 0) & (known.mask < 1)
    direction = direction._replace(mask=soft * direction.mask)
    slopes = jax.tree.map(lambda g, d: (np.asarray(g)[:, 0] * d).sum(), gradients, direction)

    def loss_at(step):
        moved = jax.tree.map(lambda x, d: (x + step * d).astype(np.float32), known, direction)
        return (np.asarray(solve(moved, start)) ** 2).sum()

    change = (loss_at(0.01) - loss_at(-0.01)) / 0.02
    # The loss is nearly quadratic. Rounding: 1e-7 of the loss, some hundreds, over 2e-2.
    np.testing.assert_allclose(sum(slopes), change, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": jnp.zeros((2, N, 3))}, r"known.mask has shape \[2, 24, 3\]; expected that of n"),
        ({"clean": jnp.full((2, N, 4), jnp.nan)}, "known.clean has 192 values that are not finite"),
        ({"mask": jnp.full((2, N, 4), 1.5)}, "known.mask has values from 1.5 to 1.5"),
        ({"anchors": ANCHORS[:1]}, r"first_anchors has shape \[1, 8\]; expected \[2, 1 to 24\]"),
        ({"anchors": ANCHORS * 1.0}, "first_anchors has dtype float32"),
        ({"anchors": ANCHORS + 3}, "first_anchors has indices from 3 to 27; expected 0 to 23, or"),
        ({"anchors": ANCHORS[:, ::-1]}, "unused slots before used ones"),
        ({"anchors": np.where(ANCHORS == 0, 1, ANCHORS)}, "duplicate indices"),
        ({"anchors": np.where(ANCHORS == 8, 9, ANCHORS)}, "leaves out 1 tokens of the mask"),
    ],
)
def test_solve_names_what_does_not_fit(change, message):
    known, start = random_known()
    anchors = change.pop("anchors", ANCHORS)
    with pytest.raises(ValueError, match=message):
        solve(known._replace(**change), start, anchors)


# Pictures


MASKS = np.concatenate([LARGE, SMALL])
MASKS[1, 18:22, 20:40] = 0.5  # a soft edge
JIT = SPARSE.replace(solver="multistep")


@pytest.fixture(scope="module")
def texts(small) -> jitjax.Conditioning:
    return jitjax.encode_prompt(small, shared_runs.PROMPTS)


def one_of(texts: jitjax.Conditioning, i: int) -> jitjax.Conditioning:
    return jax.tree.map(lambda x: x[i : i + 1], texts)


@pytest.mark.parametrize("plan", [DENSE, JIT], ids=["dense", "jit"])
def test_outside_the_mask_is_the_given_picture(small, images, texts, plan):
    options = {"key": KEY, "plan": plan, "image": images, "mask": MASKS, "strength": 0.7}
    got = np.asarray(jitjax.sample(small, texts, **options))
    np.testing.assert_array_equal(got[MASKS == 0], images[MASKS == 0])
    assert (got[MASKS == 1] != images[MASKS == 1]).mean() > 0.9
    # By hand: encode, denoise, decode, composite.
    noise_keys, keys = jax.vmap(jax.random.split, out_axes=1)(batch_keys(KEY, 2))
    clean, mask = jitjax.encode(small, images), mask_tokens(MASKS, small.config)
    tokens = jitjax.denoise(
        small,
        texts,
        jax.vmap(lambda key: jax.random.normal(key, (N, 64)))(noise_keys),
        plan=jitjax.plan_at_strength(plan, 0.7, grid=GRID, config=small.config),
        grid=GRID,
        key=keys,
        clean=clean,
        mask=mask,
    )
    np.testing.assert_array_equal(np.asarray(tokens)[mask == 0], np.asarray(clean)[mask == 0])
    made, weight = np.asarray(jitjax.decode(small, tokens, grid=GRID)), MASKS[..., None]
    np.testing.assert_allclose(got, weight * made + (1 - weight) * images, atol=1e-4)


@pytest.mark.slow
def test_keys_chunks_and_progress(small, images, texts):
    """A picture does not depend on the others of its batch, whose masks have other sizes."""
    options = {"plan": JIT, "strength": 0.7}
    both = {"key": KEY, "image": images, "mask": MASKS, **options}
    batch = jitjax.sample(small, texts, **both)
    key = batch_keys(KEY, 2)[1:]
    alone = jitjax.sample(
        small, one_of(texts, 1), key=key, image=images[1:], mask=MASKS[1:], **options
    )
    # Each batch size compiles to its own program, which rounds differently.
    np.testing.assert_allclose(alone[0], batch[1], atol=1e-4)
    calls: list[int] = []
    chunked = jitjax.sample(small, texts, chunk=1, progress=calls.append, **both)
    np.testing.assert_allclose(chunked, batch, atol=1e-4)
    assert calls == [1] * 6


@pytest.mark.slow
def test_a_known_mask_under_jit_runs_on_its_anchors(small, images, texts):
    """The mask is closed over; the picture and the key are traced. One of each for all prompts."""

    def run(image, key):
        options = {"plan": JIT, "mask": MASKS[1:], "strength": 0.7, "chunk": 1}
        return jitjax.sample(small, texts, key=key, image=image, **options)

    got = jax.jit(run)(images[:1], KEY)
    np.testing.assert_allclose(got, run(images[:1], KEY), atol=1e-4)


@pytest.mark.slow
def test_inpainting_under_vmap_and_grad(small, images, texts):
    """A traced mask runs on all tokens; gradients reach the picture and the soft edge."""

    def run(image, mask, key, texts):
        options = {"plan": SPARSE.replace(context=1.0), "strength": 0.7}
        return jitjax.sample(small, texts, key=key, image=image, mask=mask, **options)

    def loss(image, mask, key, text):
        text = jax.tree.map(lambda x: x[None], text)
        made = run(image[None], mask[None], key[None], text)[0]
        return (made**2).mean(), made

    inputs = jnp.asarray(images), jnp.asarray(MASKS), batch_keys(KEY, 2), texts
    transformed = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1), has_aux=True)))
    gradients, mapped = jax.tree.map(np.asarray, transformed(*inputs))
    np.testing.assert_allclose(mapped, run(*inputs), atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (np.abs(gradients[0]).max(-1) > 0).mean() > 0.9
    assert (gradients[1][MASKS == 0.5] != 0).all()


def test_a_mask_of_ones_is_sampling_without_one(small, images, texts):
    images = images[:, : shared_runs.HEIGHT, : shared_runs.WIDTH]
    ones = np.ones((*images.shape[:3], 1), bool)
    options = {"key": KEY, "plan": shared_runs.DENSE}
    plain = jitjax.sample(small, texts, **shared_runs.SIZE, **options)
    got = jitjax.sample(small, texts, image=images, mask=ones, **options)
    np.testing.assert_array_equal(got, plain)  # the strength is 1 by default

    def prepared(**task):
        given = check_task(task, None, None, small.config)[0]
        return plan_and_inputs(given, SPARSE, shared_runs.GRID, 2, small.config)

    task = {"image": images, "strength": 0.7}
    assert prepared(**task, mask=ones) == prepared(**task)


@pytest.mark.slow
def test_a_jit_plan_with_all_context_is_the_dense_plan(small, texts):
    """And with less it is not; and its anchors may be given, which are its own under `jit`."""
    noise, clean = jax.random.normal(KEY, (2, 2, N, 64))
    mask = mask_tokens(SMALL.repeat(2, axis=0), small.config)
    sigmas = tuple(flux_sigmas(DENSE, N, small.config)[:-1].tolist())
    sparse = SPARSE.replace(schedule=sigmas)

    def run(plan, mask=mask, **more):
        options = {"plan": plan, "grid": GRID, "clean": clean, "mask": mask}
        return jitjax.denoise(small, texts, noise, **options, **more)

    dense = np.asarray(run(DENSE))
    np.testing.assert_array_equal(run(sparse.replace(context=1.0)), dense)
    less, trace = run(sparse, key=KEY, trace=True)
    assert np.abs(less - dense).max() > 1e-3
    anchors = inpaint_anchors(mask, plan=sparse, grid=GRID, key=KEY)
    np.testing.assert_array_equal(trace.anchors[0], anchors)
    assert trace.slots[0] == 28 - 12  # 15 anchors and 12 text tokens, padded to 4
    got = jax.jit(lambda mask, anchors: run(sparse, mask, first_anchors=anchors))(mask, anchors)
    np.testing.assert_allclose(got, less, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": None}, ValueError, "mask is given, but image is None; expected both or neither"),
        ({"mask": SMALL[:, :32]}, ValueError, "mask has 32 rows and 96 columns .* expected 64 and"),
        ({"mask": SMALL[0]}, ValueError, r"mask has shape \[64, 96\]; .* mask\[None\] is a batch"),
        ({"mask": SMALL[[0, 0, 0]]}, ValueError, "mask has shape .* expected a batch of 1 or 2"),
        ({"mask": 0 * SMALL}, ValueError, "mask is 0 everywhere, so there is nothing to do"),
        (
            {"mask": np.concatenate([SMALL, 0 * SMALL])},
            ValueError,
            "mask of picture 1 is 0 everywhere",
        ),
        ({"mask": 1.5 * SMALL}, ValueError, r"mask has values from 0 to 1.5; expected \[0, 1\]"),
        ({"mask": SMALL - 1}, ValueError, "mask has values from -1 to 0"),
        ({"mask": SMALL * np.nan}, ValueError, "mask has 6144 values that are not finite"),
        ({"mask": SMALL.astype(np.uint8)}, TypeError, "mask has dtype uint8; .* / 255"),
        ({"mask": "mask.png"}, TypeError, "mask is str; expected an array"),
        ({"mask": SMALL, "strength": 0}, ValueError, "strength is 0"),
    ],
)
def test_errors_before_any_model_runs(small, images, monkeypatch, change, error, message):
    def fail(*arguments, **options):
        raise AssertionError("a model runs")

    for module, name in (("task", "encode"), ("sample", "denoise"), ("sample", "encode_both")):
        monkeypatch.setattr(sys.modules[f"jitjax.{module}"], name, fail)
    arguments = {"image": images, "mask": SMALL, "key": jax.random.key(0)} | change
    with pytest.raises(error, match=message):
        jitjax.sample(small, shared_runs.PROMPTS, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_denoise_names_what_does_not_fit(small, images):
    text, noise = jitjax.encode_prompt(small, "a star"), jnp.zeros((1, N, 64))
    mask = mask_tokens(SMALL, small.config)
    with pytest.raises(ValueError, match="mask is given, but clean is None"):
        jitjax.denoise(small, text, noise, plan=DENSE, grid=GRID, mask=mask)
    options = {"plan": SPARSE, "grid": GRID, "clean": noise}
    with pytest.raises(ValueError, match=r"mask has shape \[1, 24, 3\]; expected that of noise"):
        jitjax.denoise(small, text, noise, mask=mask[..., :3], **options)
    with pytest.raises(ValueError, match="mask has values from 0 to 2"):
        jitjax.denoise(small, text, noise, mask=2 * mask, **options)
    with pytest.raises(ValueError, match="key is None; expected a key, which inpainting needs"):
        jitjax.denoise(small, text, noise, mask=mask, **options)
    with pytest.raises(ValueError, match="mask is traced; expected known values"):
        jax.jit(lambda mask: inpaint_anchors(mask, plan=SPARSE, grid=GRID, key=KEY))(mask)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("context", [0, 1.1, -0.5, float("nan"), "all", True])
def test_plans_name_a_context_that_is_none(context):
    with pytest.raises(ValueError, match=r"Plan.context is .*; expected a number in \(0, 1\]"):
        Plan(3, context=context)
