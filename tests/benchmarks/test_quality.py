"""Tests of the quality benchmark: prompts, FLOPs, peers, distances, resuming and reports."""

import dataclasses
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from benchmarks import readme, report
from benchmarks.quality import flops, peers, scores
from benchmarks.quality.__main__ import open_results, select_part, unfinished_tasks
from benchmarks.quality.judging import judge_images, similarity
from benchmarks.quality.methods import (
    REFERENCE,
    Runner,
    all_methods,
    modulated_input,
    parse_plan,
)
from benchmarks.quality.prompts import CATEGORIES, prompt, prompts
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


def test_methods_include_matches_of_each_plan():
    config = TransformerConfig()
    methods = all_methods(config, 4096, 512)
    assert {"dense-50", "dense-12", "dense-7", "dense-12-beta", "teacache-12", "taylor-7"} <= set(
        methods
    )
    assert methods["4x:hit-initial"].plan.microflow == "hit"
    assert methods["4x"].plan == jitjax.PLANS["4x"]
    assert [name for name in methods if name.startswith("tuned")] == ["tuned-4x", "tuned-7x"]


def test_parse_plan():
    assert parse_plan("4x") == jitjax.PLANS["4x"]
    actual = parse_plan("4x:lift=linear:steps=12:densities=(0.5, 1.0):stage_ends=(0.25, 1.0)")
    assert actual == jitjax.Plan(12, (0.5, 1.0), (0.25, 1.0), lift="linear")
    with pytest.raises(ValueError, match="unknown plan '5x'"):
        parse_plan("5x:lift=linear")
    with pytest.raises(ValueError, match="changes 'lifter'"):
        parse_plan("4x:lifter=linear")
    with pytest.raises(ValueError, match=r"Plan\.steps is 0"):
        parse_plan("4x:steps=0")


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


def test_indicator_is_the_first_blocks_modulated_input(small):
    """Compares with the transformer's own intermediate values."""
    config = dataclasses.replace(small.config.transformer, num_layers=1, num_single_layers=1)
    params = dict(small.transformer)
    for name in ("double_blocks", "single_blocks"):
        params[name] = jax.tree.map(lambda leaf: leaf[:1], params[name])
    conditioning = jitjax.encode_prompt(small, "a red circle")
    tokens = jax.random.normal(jax.random.key(1), (1, 16, config.in_channels))
    actual = modulated_input(tokens, jnp.float32(0.7), (params, conditioning, jnp.full((1,), 3.5)))
    token_positions = jnp.zeros((1, 16, 3))
    conditions = conditioning.text, conditioning.pooled, 0.7, 3.5
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, state = FluxTransformer(config).apply(
        {"params": params}, tokens, token_positions, *conditions, **capture
    )
    outputs = state["intermediates"].items()
    values = {name: value["__call__"][0] for name, value in outputs if name != "__call__"}
    vector = sum(values[name] for name in ("sigma_in", "pooled_in", "guidance_in"))
    first_block = jax.tree.map(lambda leaf: leaf[0], params["double_blocks"])
    ids = jnp.zeros((1, 16 + conditioning.text.shape[1], 3))
    streams = values["text_in"], values["image_in"]
    _, state = DoubleBlock(config, jnp.float32).apply(
        {"params": first_block},
        streams,
        jax.nn.silu(vector),
        rotary_embedding(ids, config.axes_dims_rope),
        None,
        **capture,
    )
    modulation = state["intermediates"]["image_modulation"]["__call__"][0]  # [b, 6, h]
    image = values["image_in"]
    centred = image - image.mean(-1, keepdims=True)
    normalised = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    expected = normalised * (1 + modulation[:, 1, None]) + modulation[:, 0, None]
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_distances_grow_with_the_difference(small):
    a = np.random.default_rng(0).uniform(0, 1, (2, 64, 64, 3)).astype(np.float32)
    near, far = np.clip(a + 0.02, 0, 1), 1 - a

    def features(image):
        return scores.feature_distance(small, jnp.asarray(image), jnp.asarray(a))

    assert np.allclose(features(a), 0, atol=1e-9)
    assert max(features(near)) < min(features(far))
    assert similarity(a[0], a[0])["ssim"] == pytest.approx(1)
    near_scores, far_scores = similarity(near[0], a[0]), similarity(far[0], a[0])
    assert near_scores["psnr"] > 30 > 15 > far_scores["psnr"]
    assert near_scores["ssim"] > far_scores["ssim"]


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


def test_every_method_runs_on_a_small_model(small):
    grid = (4, 4)
    methods = all_methods(small.config.transformer, 16, small.config.text_length)
    peer_names = [name for name in methods if name.split("-")[0] in ("teacache", "taylor")]
    runner = Runner(small, grid)
    conditioning = jitjax.encode_prompt(small, ["a red circle", "a blue star"])
    keys = jax.random.split(jax.random.key(0), 2)
    noise = jax.random.normal(jax.random.key(1), (2, 16, 64))
    for name in ("4x", "7x:hit-initial", *peer_names):
        tokens, slots = runner(methods[name], conditioning, noise, keys)
        assert tokens.shape == noise.shape
        assert bool(jnp.isfinite(tokens).all())
        expected_count = methods[name].evaluations or methods[name].plan.steps
        assert abs(len(slots) - expected_count) <= (3 if "teacache" in name else 0)


def test_parts_partition_the_tasks():
    tasks = list(range(11))
    assert [task for k in (1, 2, 3) for task in select_part(tasks, f"{k}/3")] == tasks
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(ValueError, match="expected K/N"):
            select_part(tasks, wrong)


def test_existing_results_are_resumed(tmp_path):
    path, settings = tmp_path / "lines.jsonl", {"split": "test", "side": 512}
    assert open_results(path, settings, {"command": "one"}) == {}
    row = json.dumps({"method": "4x", "prompt": 3, "seed": 5})
    path.write_text(path.read_text() + row + '\n{"method": "dense-')
    for command in ("one", "two", "two", "one"):
        assert open_results(path, settings, {"command": command}) == {(3, 5): {"4x"}}
    head, *rest = path.read_text().splitlines()
    assert json.loads(head) == settings | {"command": "one && two"}
    assert rest == [row]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"'side': 512}; expected .*256"):
        open_results(path, settings | {"side": 256}, {"command": "one"})
    path.write_text("{")
    with pytest.raises(ValueError, match="no complete line"):
        open_results(path, settings, {"command": "one"})


def test_unfinished_tasks_lack_some_method():
    first, second = prompts(1)[:2]
    tasks = [(n, p, seed) for n, p in enumerate((first, second)) for seed in p.seeds]
    first_task = (0, first.seeds[0])
    done = {first_task: {"dense-50", "4x"}, (1, second.seeds[0]): {"dense-50"}}
    pending = unfinished_tasks(tasks, {"dense-50", "4x"}, done)
    assert pending == [task for task in tasks if (task[0], task[2]) != first_task]
    assert unfinished_tasks(tasks, {"dense-50"}, done) == [
        task for task in tasks if task[2] in (*first.seeds[1:], *second.seeds[1:])
    ]


def test_report(tmp_path):
    def make_row(method, number, seed, right, tflops):
        row = {"method": method, "prompt": number, "seed": seed, "category": "single"}
        row |= {"verdict": {"right": right, "shape": right}, "tflops": tflops, "evaluations": 5}
        row |= {"seconds": tflops / 10, "dense": 1.0}
        return row | {} if method == REFERENCE else row | dict.fromkeys(report.METRICS, 0.5)

    rows = [make_row(REFERENCE, n, s, n % 2 == 0, 10.0) for n in range(20) for s in (1, 2)]
    rows += [make_row("4x", n, s, n % 4 == 0, 2.5) for n in range(20) for s in (1, 2)]
    rows += [make_row("dense-11", n, s, n % 5 == 0, 2.3) for n in range(20) for s in (1, 2)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"split": "test"}, *rows]) + "\n")
    with path.open("a") as file:  # a run that was killed while writing
        file.write('{"method": "4x", "pro')
    settings, lines = report.merge([path])
    assert settings == {"split": "test"}
    rows = report.summarise(lines)
    actual = rows["4x"]
    assert actual["right"] == pytest.approx(0.25)
    assert actual["against_dense"] == pytest.approx(-0.25)
    assert actual["against_dense_interval"][0] < -0.25 < actual["against_dense_interval"][1]
    assert actual["fewer_flops"] == pytest.approx(4)
    assert actual["faster"] == pytest.approx(4)
    assert actual["pictures"] == 40
    assert actual["wrong"] == {"shape": 30}
    comparisons = report.match_methods(lines, rows)
    assert set(comparisons) == {"4x"}
    assert set(comparisons["4x"]) == {"dense-11"}  # REFERENCE has four times the FLOPs
    assert comparisons["4x"]["dense-11"]["difference"] == pytest.approx(0.05)
    low, high = comparisons["4x"]["dense-11"]["interval"]
    assert low < 0.05 < high
    assert "| `dense-11` | +5.0% (" in report.markdown_matched(comparisons)
    other = tmp_path / "more.jsonl"
    more_rows = [make_row(m, 20, 1, True, 5.0) for m in lines] + [make_row("4x", 21, 1, True, 5.0)]
    other.write_text("\n".join(json.dumps(row) for row in [{"split": "test"}, *more_rows]) + "\n")
    combined = report.merge([path, other])[1]
    assert {name: len(own_rows) for name, own_rows in combined.items()} == dict.fromkeys(lines, 41)
    other.write_text(json.dumps({"split": "dev"}) + "\n")
    with pytest.raises(ValueError, match="split 'dev'; expected 'test'"):
        report.merge([path, other])
    settings_text, table = report.markdown(rows, settings).split("\n\n")
    assert settings_text == "split: `test`  "
    assert table.count("\n") == 5
    assert "`4x`" in table


def test_readme_has_the_figures_of_the_json_files():
    root = Path(__file__).parents[2]
    figures, dense = (
        json.loads((root / f"docs/{name}.json").read_text()) for name in ("quality", "dense")
    )
    rows = figures["methods"]
    text = (root / "README.md").read_text()
    assert readme.fill_tables(text, figures, dense) == text
    incomplete = figures | {"methods": {n: row for n, row in rows.items() if n != "7x:grid"}}
    with pytest.raises(ValueError, match=r"no results for 7x:grid; expected"):
        readme.fill_tables(text, incomplete, dense)
    rows["4x"]["right"] += 0.02
    assert readme.fill_tables(text, figures, dense) != text
    rows["4x"]["right"] -= 0.02
    figures["matched"]["tuned-7x"]["7x"]["difference"] += 0.02
    assert readme.fill_tables(text, figures, dense) != text
    figures["matched"]["tuned-7x"]["7x"]["difference"] -= 0.02
    dense["methods"][REFERENCE]["categories"]["two"]["right"] += 0.02
    assert readme.fill_tables(text, figures, dense) != text
    header = next(iter(readme.TABLE_ROWS))
    with pytest.raises(ValueError, match="README has 0 lines"):
        readme.fill_tables(text.replace(header, ""), figures, dense)
