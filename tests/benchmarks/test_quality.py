"""Tests of the quality benchmark: prompts, methods, FLOPs, peers, distances."""

import dataclasses
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from benchmarks.quality import flops, peers, scores
from benchmarks.quality.judging import judge_images, similarity
from benchmarks.quality.methods import (
    REFERENCE,
    VARIANTS,
    ablations,
    as_dense,
    dense_evaluations,
    label,
    parse_method,
    parse_plan,
    standard,
)
from benchmarks.quality.prompts import CATEGORIES, prompt, prompts
from benchmarks.quality.runner import Runner, modulated_input
from jitjax.config import TransformerConfig
from jitjax.models import param_shapes
from jitjax.models.flux import DoubleBlock, FluxTransformer
from jitjax.models.layers import rotary_embedding
from training.scenes import SIZES, held_out, render

SIGMAS = jnp.linspace(1, 0, 29)
NOISE = jax.random.normal(jax.random.key(0), (2, 5, 3))


def decay(tokens, sigma):
    """A velocity function that is neither constant nor polynomial along the path."""
    return jnp.sin(3 * sigma) + tokens / (1 + sigma)


def euler(velocity, y=NOISE):
    for a, b in itertools.pairwise(SIGMAS):
        y = y + velocity(y, a) * (b - a)
    return y


def test_prompts_are_deterministic_and_held_out():
    short, long = prompts(4), prompts(12)
    assert short == long[: len(short)]
    assert {p.category for p in short} == set(CATEGORIES)
    assert not {p.text for p in prompts(12, "dev")} >= {p.text for p in long}
    for p in long:
        assert len(set(p.seeds)) == 3
        for thing in p.scene.things:
            assert held_out(thing.shape, thing.colour, thing.size, thing.texture)
            assert thing.texture == "plain"
            assert thing.shape in p.text
            assert thing.colour in p.text
        assert any(
            size in p.text.replace("big", "large").replace("little", "small") for size in SIZES
        )
        assert f"{p.scene.background} background" in p.text
        if p.category in ("two", "position", "binding"):
            assert len({thing.shape for thing in p.scene.things}) == 2
        assert p.scene.relation in p.text
        assert bool(p.scene.relation) == (p.category == "position")
    for number, word in enumerate(("two", "three", "four")):
        assert word in prompt("counting", number).text.split()
    with pytest.raises(ValueError, match="category is 'colours'"):
        prompt("colours", 0)
    with pytest.raises(ValueError, match="split is 'train'"):
        prompt("single", 0, "train")


@pytest.mark.parametrize(("tokens", "text"), [(96, 16), (256, 48)])
def test_flops_match_the_matrix_products_of_the_jaxpr(tokens, text):
    config = TransformerConfig(
        num_layers=1, num_single_layers=1, num_attention_heads=8, joint_attention_dim=64
    )
    shapes = {
        "tokens": (1, tokens, config.in_channels),
        "positions": (1, tokens, 3),
        "text": (1, text, 64),
        "pooled": (1, config.pooled_projection_dim),
        "sigma": (1,),
        "guidance": (1,),
    }
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def products(jaxpr):
        """Count the FLOPs of all matrix products in a jaxpr, each iteration of a loop included."""
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
                total += 2 * inner * np.prod(equation.outvars[0].aval.shape)
            times = equation.params.get("length", 1)
            branches = equation.params.get("branches")
            nested = [branches[0]] if branches else [*equation.params.values()]
            for value in nested:
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    total += times * products(value)
        return total

    model = FluxTransformer(config)
    traced = jax.make_jaxpr(lambda p, g: model.apply({"params": p}, **g))(
        param_shapes.transformer(config), inputs
    )
    expected = products(traced.jaxpr)
    # `forward` leaves out the adaLN modulation, one row per sample.
    assert flops.forward(config, tokens, text) == pytest.approx(expected, rel=0.03)
    assert flops.forward(config, tokens, text) < expected


def test_flops_at_full_size():
    """At 1024 px: 74 TFLOP per evaluation; the plans need 4.14 and 6.96 times fewer in all."""
    config = TransformerConfig()
    assert flops.forward(config, 4096, 512) == pytest.approx(74e12, rel=0.01)
    dense = flops.run(config, [4096] * 50, 512)
    for name, ratio in (("4x", 4.14), ("7x", 6.96)):
        plan = jitjax.PLANS[name]
        slots = flops.slots(plan, 4096, 512)
        assert len(slots) == plan.steps
        assert dense / flops.run(config, slots, 512) == pytest.approx(ratio, rel=0.01)
    padded = flops.slots(jitjax.PLANS["4x"].replace(pad_to=128), 4096, 512)
    assert [(k + 512) % 128 for k in padded] == [0] * 18


def test_slots_count_every_evaluation_of_a_step():
    plan = jitjax.PLANS["7x"]
    once = flops.slots(plan, 256, 48)
    assert flops.slots(plan.replace(solver="multistep"), 256, 48) == once
    twice = flops.slots(plan.replace(solver=diffrax.Heun()), 256, 48)
    assert twice == [slots for slots in once for _ in range(2)]
    # An implicit solver evaluates until its root finder is content.
    implicit = diffrax.ImplicitEuler(root_finder=diffrax.VeryChord(1e-3, 1e-3))
    with pytest.raises(ValueError, match=r"Plan\.solver is ImplicitEuler.*are known"):
        flops.slots(plan.replace(solver=implicit), 256, 48)


def test_standard_methods():
    names = standard()
    rivals = {"dense-5-beta-multistep", "dense-3-beta-multistep"}  # of jit-10x and jit-14x
    assert names[0] == REFERENCE
    assert set(names) == {REFERENCE, *jitjax.PLANS, *rivals} - {"dense"}  # which is `REFERENCE`
    assert len(names) == len(set(names)) == 9


def test_standard_methods_have_all_plans_and_dense_multistep_of_equal_cost(monkeypatch):
    config = TransformerConfig()
    # PLANS will change; so here are plans of every sort.
    added = {
        "quick": jitjax.Plan(13, (0.35, 1.0), (0.5, 1.0), schedule=("beta", 1.0, 0.3)),
        "plain": jitjax.Plan(9, schedule="shifted"),
        "same": jitjax.Plan(3, solver="multistep"),
        "heun": jitjax.Plan(9, solver=diffrax.Heun()),
    }
    for name, plan in added.items():
        monkeypatch.setitem(jitjax.PLANS, name, plan)
    names = standard()
    methods = [parse_method(name) for name in names]
    assert len(set(methods)) == len(methods)
    assert {parse_method(name) for name in jitjax.PLANS} <= set(methods)
    # "plain" and "heun" have as many steps as "quick" costs, but by other solvers.
    assert dense_evaluations(config, added["quick"], 4096, 512) == pytest.approx(9.2, abs=0.1)
    # "multistep-12" and "multistep-7" cost what 4x and 7x do, and "same" what jit-14x does.
    assert {name for name in names if name.startswith("dense-")} == {
        REFERENCE,
        "dense-5-beta-multistep",
        "dense-9-beta-multistep",
    }
    for plan in jitjax.PLANS.values():
        if plan.densities != (1.0,):
            cost = dense_evaluations(config, plan, 4096, 512)
            costs = [m.plan.steps for m in methods if m.is_dense_multistep]
            assert min(abs(np.log(steps / cost)) for steps in costs) < 0.15


def test_dense_steps_have_the_sigmas_of_a_plan():
    sigmas = (1.0, 0.95, 0.8, 0.6, 0.3, 0.1)
    plan = jitjax.Plan(6, (0.5, 1.0), (0.5, 1.0), schedule=sigmas, solver="multistep")
    assert as_dense(plan, 6).schedule == pytest.approx(sigmas)
    double = as_dense(plan, 12)
    assert double.schedule[::2] == pytest.approx(sigmas)
    assert 0 < double.schedule[-1] < 0.1
    assert (double.densities, double.solver) == ((1.0,), "multistep")
    assert as_dense(jitjax.PLANS["4x"], 7) == jitjax.Plan(7)


def test_ablations_change_one_choice_of_the_papers_plans():
    names = ablations()
    assert names[0] == "4x"
    for name in names:
        plan, _, variant = name.partition(":")
        changes = VARIANTS[variant][1] if variant else {}
        assert parse_plan(name) == jitjax.PLANS[plan].replace(**changes)
    assert len({parse_method(name) for name in names}) == len(names) == 18


def test_parse_method():
    assert parse_method("dense-50") == parse_method("dense")
    assert parse_plan("4x") == jitjax.PLANS["4x"]
    actual = parse_plan("4x:lift=linear:steps=12:densities=(0.5, 1.0):stage_ends=(0.25, 1.0)")
    assert actual == jitjax.Plan(12, (0.5, 1.0), (0.25, 1.0), lift="linear")
    multistep = parse_plan("7x:hit-initial:multistep")
    facts = multistep.microflow, multistep.microflow_noise, multistep.solver
    assert facts == ("hit", "initial", "multistep")
    assert parse_method("dense-11-beta").plan == jitjax.Plan(11)
    for name, message in {
        "5x:lift=linear": "unknown plan '5x'",
        "4x:lifter=linear": "changes 'lifter'",
        "4x:hit": "changes 'hit'; expected one of",
        "4x:steps=0": r"Plan\.steps is 0",
        "teacache-2": "'teacache-2' has 2 evaluations; expected 3 to 28",
        "taylor-29": "29 evaluations",
        "dense-11-gamma": "unknown plan",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_method(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dense-50", "50 dense steps, FLUX's sigmas, Euler"),
        ("dense-7-beta-multistep", "7 dense steps, Beta sigmas, multistep"),
        ("4x", "**`4x`**"),
        ("multistep-12", "**`multistep-12`**: 12 dense steps, Beta(0.6, 0.25) sigmas, multistep"),
        ("7x:hit-initial:multistep", "`7x`, hit, initial noise, multistep"),
        ("7x:relax=2.0", "`7x`, `relax=2.0`"),
        ("teacache-11", "TeaCache, 11 of 28 steps"),
    ],
)
def test_labels(name, words):
    assert label(name) == words


@pytest.mark.parametrize("evaluations", [3, 7, 12, 28])
def test_taylor_evaluates_the_requested_number_of_times(evaluations):
    steps = peers.evaluated_steps(28, evaluations)
    assert len(steps) == len(set(steps)) == evaluations
    assert steps[:2] == (0, 1)
    assert steps[-1] < 28
    evaluated_sigmas = []

    def counted(tokens, sigma):
        evaluated_sigmas.append(float(sigma))
        return decay(tokens, sigma)

    _, count = peers.taylor(counted, NOISE, SIGMAS, steps)
    assert len(evaluated_sigmas) == count == evaluations


def test_taylor_at_all_steps_is_euler_and_forecasts_linear_velocities():
    dense = peers.taylor(decay, NOISE, SIGMAS, range(28))[0]
    np.testing.assert_allclose(dense, euler(decay), rtol=1e-5)

    def linear(tokens, sigma):
        return jnp.ones_like(tokens) * (2 - 3 * sigma)

    # The second difference amplifies the rounding of the sigmas.
    sparse = peers.taylor(linear, NOISE, SIGMAS, peers.evaluated_steps(28, 7))[0]
    np.testing.assert_allclose(sparse, euler(linear), atol=1e-4)
    order_0 = peers.taylor(linear, NOISE, SIGMAS, peers.evaluated_steps(28, 7), order=0)[0]
    assert float(jnp.abs(order_0 - euler(linear)).max()) > 0.05
    with pytest.raises(ValueError, match="evaluations is 2"):
        peers.evaluated_steps(28, 2)


def test_teacache_without_reuse_is_euler_and_threshold_meets_the_count():
    def indicate(tokens, sigma):
        return tokens * (1 + sigma)

    inputs = decay, indicate, NOISE, SIGMAS
    rescale = peers.calibrate(*peers.relative_changes(*inputs))
    for target in (7, 12):
        threshold = peers.find_threshold(
            lambda threshold: peers.teacache(*inputs, rescale, threshold)[1], target, 10.0
        )
        # The count may change by two at one threshold, so that some counts do not occur.
        assert abs(peers.teacache(*inputs, rescale, threshold)[1] - target) <= 1
    full, count = peers.teacache(*inputs, rescale, -np.inf)
    assert count == 28
    np.testing.assert_allclose(full, euler(decay), rtol=1e-5)


@pytest.mark.slow
def test_indicator_is_the_first_blocks_modulated_input(small):
    """Compares with the transformer's own intermediate values."""
    config = dataclasses.replace(small.config.transformer, num_layers=1, num_single_layers=1)
    params = dict(small.transformer)
    for name in ("double_blocks", "single_blocks"):
        params[name] = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], params[name])
    conditioning = jitjax.encode_prompt(small, "a red circle")
    noise = np.random.default_rng(1).standard_normal((1, 16, config.in_channels))
    tokens, sigma, guidance = jnp.asarray(noise, jnp.float32), jnp.full(1, 0.7), jnp.full(1, 3.5)
    actual = jax.jit(modulated_input)(tokens, sigma[0], (params, conditioning, guidance))
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}

    @jax.jit
    def intermediate_values(params, tokens, conditioning, sigma, guidance):
        """Return what the transformer's layers return, and what its first block's do."""
        _, state = FluxTransformer(config).apply(
            {"params": params}, tokens, jnp.zeros((1, 16, 3)), conditioning.text,
            conditioning.pooled, sigma, guidance, **capture,
        )  # fmt: skip
        outputs = state["intermediates"].items()
        values = {name: value["__call__"][0] for name, value in outputs if name != "__call__"}
        vector = sum(values[name] for name in ("sigma_in", "pooled_in", "guidance_in"))
        first_block = jax.tree.map(lambda leaf: leaf[0], params["double_blocks"])
        ids = jnp.zeros((1, 16 + conditioning.text.shape[1], 3))
        _, state = DoubleBlock(config, jnp.float32).apply(
            {"params": first_block},
            (values["text_in"], values["image_in"]),
            jax.nn.silu(vector),
            rotary_embedding(ids, config.axes_dims_rope),
            None,
            **capture,
        )
        return values["image_in"], state["intermediates"]["image_modulation"]["__call__"][0]

    outputs = intermediate_values(params, tokens, conditioning, sigma, guidance)
    image, modulation = map(np.asarray, outputs)  # [b, n, h] and [b, 6, h]
    centred = image - image.mean(-1, keepdims=True)
    normalised = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    expected = normalised * (1 + modulation[:, 1, None]) + modulation[:, 0, None]
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_similarity_falls_with_the_difference():
    a = np.random.default_rng(0).uniform(0, 1, (64, 64, 3)).astype(np.float32)
    near_scores = similarity(np.clip(a + 0.02, 0, 1), a)
    far_scores = similarity(1 - a, a)
    assert similarity(a, a)["ssim"] == pytest.approx(1)
    assert near_scores["psnr"] > 30 > 15 > far_scores["psnr"]
    assert near_scores["ssim"] > far_scores["ssim"]


@pytest.mark.slow
def test_judging_in_other_processes_gives_the_same_results():
    batch_prompts = prompts(1, seeds=1)[:2]
    scenes = [render(prompt.scene, 64, 64).astype(np.float32) for prompt in batch_prompts]
    inputs = (batch_prompts, scenes, [{"a": scenes[0], "b": scenes[1]}] * 2)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parallel = list(pool.map(judge_images, *inputs))
    serial = list(map(judge_images, *inputs))
    assert parallel == serial
    assert np.isinf(serial[0]["a"]["psnr"])
    assert serial[1]["a"]["psnr"] < 40


def test_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        low, high = scores.interval(rng.uniform(size=40) < 0.4, seed=i)
        covered += low <= 0.4 <= high
    assert 0.89 < covered / 200 < 0.99
    assert scores.interval(np.ones(5)) == (1.0, 1.0)


@pytest.mark.slow
def test_methods_run_on_a_small_model(small):
    runner = Runner(small, (4, 4))
    # As many pictures as TeaCache is fitted on, so that all run the same programs.
    conditioning = jitjax.encode_prompt(small, ["a red circle", "a blue star"] * 2)
    keys = jax.random.split(jax.random.key(0), 4)
    noise = jax.random.normal(jax.random.key(1), (4, 16, 64))
    plans = ("4x", "jit-10x", "dense-7-beta-multistep")
    for name in (*plans, "teacache-11", "teacache-7", "taylor-7"):
        method = parse_method(name)
        tokens, slots = runner(method, conditioning, noise, keys)
        assert tokens.shape == noise.shape
        assert bool(jnp.isfinite(tokens).all())
        expected_count = method.evaluations or method.plan.steps
        assert abs(len(slots) - expected_count) <= (3 if "teacache" in name else 0)
