"""The benchmark of speed: its counts of FLOPs, its turns, and a run of every row in small."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.build import random_tree

import jitjax
from benchmarks import solver_loop, speed, speed_models, timing
from benchmarks.flop_count import xla_flops
from benchmarks.quality import flops
from jitjax.config import TransformerConfig
from jitjax.models import param_shapes
from jitjax.sampler.solve import jit_solve
from jitjax.velocity import FluxVelocity

SMALL = TransformerConfig(
    num_layers=1,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=48,
    pooled_projection_dim=768,
    axes_dims_rope=(8, 12, 12),
)


def abstract_inputs(config: TransformerConfig, tokens: int, text: int, dtype=jnp.float32):
    """Tokens, positions and arguments of `FluxVelocity`, without values."""

    def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    # Arrays, since the types of `Conditioning` are checked in tests.
    conditioning = jitjax.Conditioning(
        jnp.zeros((1, text, config.joint_attention_dim)),
        jnp.zeros((1, config.pooled_projection_dim)),
    )
    args = (param_shapes.transformer(config, dtype), conditioning, array(1))
    return array(1, tokens, config.in_channels), array(1, tokens, 3, dtype=jnp.int32), args


def test_loops_count_as_often_as_they_run():
    weights, x = jnp.ones((7, 16, 16)), jnp.ones((4, 16))

    def loops(x, weights):
        def outer(x, w):
            return jax.lax.map(lambda row: jnp.tanh(row[None] @ w)[0], x), None

        return jax.lax.scan(outer, x, weights)[0]

    assert xla_flops(loops, x, weights) == pytest.approx(7 * 4 * 2 * 16 * 16, rel=0.01)
    once = jax.jit(loops).lower(x, weights).cost_analysis()
    assert once is not None
    assert once["flops"] < 2 * 2 * 16 * 16  # why `xla_flops` exists


def test_only_the_branch_of_this_platform_counts():
    def by_platform(x):
        return jax.lax.platform_dependent(
            x,
            cuda=lambda x: x @ x @ x,
            default=lambda x: jax.lax.map(lambda row: row[None] @ x, x)[:, 0],
        )

    x = jnp.ones((8, 8))
    assert xla_flops(by_platform, x) == pytest.approx(2 * 8**3, rel=0.02)


def test_loops_of_unknown_length_are_refused():
    def unknown(x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while loop"):
        xla_flops(unknown, jnp.eye(2))
    with pytest.raises(ValueError, match="conditional"):
        xla_flops(
            lambda x: jax.lax.cond(x[0] > 0, lambda x: jax.lax.map(jnp.sin, x), lambda x: x, x),
            jnp.ones(3),
        )


@pytest.mark.parametrize(
    ("config", "tokens", "text"),
    [
        pytest.param(SMALL, 256, 32, id="small"),
        pytest.param(SMALL, 1500, 100, id="small, attention in blocks"),
        pytest.param(speed_models.MODELS["middle"], 4096, 512, id="middle"),
        pytest.param(TransformerConfig(), 4096, 512, id="flux-dev"),
        pytest.param(TransformerConfig(), 1433, 512, id="flux-dev, few tokens"),
    ],
)
def test_the_formula_agrees_with_xla(config, tokens, text):
    """XLA counts all operations, and the adaLN modulation; the formula neither."""
    y, positions, args = abstract_inputs(config, tokens, text)
    velocity = FluxVelocity(config, "xla")
    counted = xla_flops(
        lambda y, p, args: velocity(y, p, jnp.float32(0.9), None, args), y, positions, args
    )
    ratio = counted / flops.forward(config, tokens, text)
    print(f"XLA over formula: {ratio:.4f}")
    assert 0.999 < ratio < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "7x"])
def test_the_formula_of_a_plan_agrees_with_xla(name):
    """The whole solve: every step of every stage, with the lifter and the transitions."""
    plan, grid, text = jitjax.PLANS[name], (24, 24), 32
    tokens = grid[0] * grid[1]
    y, _, args = abstract_inputs(SMALL, tokens, text)
    budget = plan.budgets(tokens, text)[0]
    anchors = jnp.arange(budget)[None] if budget < tokens else None

    def solve(noise, sigmas, args):
        return jit_solve(
            FluxVelocity(SMALL, "xla"), noise, sigmas, plan=plan, grid=grid, args=args,
            first_anchors=anchors, microflow_noise=noise, text_tokens=text,
        )  # fmt: skip

    counted = xla_flops(solve, y, jax.ShapeDtypeStruct((plan.steps + 1,), jnp.float32), args)
    ratio = counted / flops.run(SMALL, flops.slots(plan, tokens, text), text)
    print(f"XLA over formula: {ratio:.4f}")
    assert 0.999 < ratio < 1.05


def test_turns_end_in_time_but_one():
    calls = []
    two = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert timing.measure_in_turns(two, 3).shape == (3, 2)
    assert calls == ["a", "b"] * 3
    assert timing.measure_in_turns(two, 3, most_seconds=0).shape == (1, 2)


def test_random_weights_have_their_mean_and_deviation():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    params = timing.random_params({"in": {"kernel": shape, "scale": shape}})["in"]
    for name, mean in (("kernel", 0), ("scale", 1)):
        assert params[name].dtype == jnp.bfloat16
        values = np.asarray(params[name], np.float32)
        # Five standard errors of 4096 values, and the rounding of 1 + x to 8 bits.
        assert values.mean() == pytest.approx(mean, abs=5 * 0.02 / 64)
        assert values.std() == pytest.approx(0.02, rel=5 / 64 / np.sqrt(2))
    assert (np.asarray(params["kernel"]) != np.asarray(params["scale"]) - 1).any()


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setitem(speed_models.MODELS, "middle", SMALL)
    # By NumPy: JAX compiles a program for each of 29 shapes.
    monkeypatch.setattr(speed_models, "random_params", lambda abstract: random_tree(abstract, 0))


@pytest.mark.slow
def test_the_linear_plan_is_the_plan_with_another_velocity(small_model):
    """Only the velocity differs: dense, the linear map's solution is known."""
    bench = speed_models.Bench("middle", 64, 8, "float32", "auto")
    plan = jitjax.PLANS["dense"].replace(steps=4)
    factor = np.prod(1 + 0.1 * np.diff(np.asarray(bench.sigmas(plan))))
    expected = factor * np.asarray(bench.noise)
    np.testing.assert_allclose(bench.linear_plan(plan)(), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("linear", "pad_to"), [(False, 16), (True, 1)])
def test_the_loop_by_hand_is_the_first_stage(small_model, linear, pad_to):
    bench = speed_models.Bench("middle", 128, 8, "float32", "auto")
    by_diffrax, by_hand = solver_loop.stage_pair(
        bench, jitjax.PLANS["7x"].replace(pad_to=pad_to), linear
    )
    assert not np.allclose(by_hand(), bench.noise, atol=1e-3)
    np.testing.assert_allclose(by_hand(), by_diffrax(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_row(small_model, monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = "--model middle --json --size 64 --text 8 --rounds 2 --matmul 64"
    plans = ["--plans", "dense", "jit-14x"]
    monkeypatch.setattr("sys.argv", ["speed", *arguments.split(), *plans, "--out", str(out)])
    speed.main()
    lines = out.read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    rows = [json.loads(line) for line in lines]
    kinds = [row["row"] for row in rows]
    assert kinds == ["matmul", *["forward"] * 2, "plan", "plan", "speed-up", "solver"]
    plan = jitjax.PLANS["jit-14x"]
    for row in rows[1:5]:
        assert 0 < row["lowest"] <= row["seconds"] <= row["highest"]
        assert 1 <= row["agreement"] < 1.2  # so few tokens: the modulation counts
        expected = row["tflop"] / row["seconds"] / rows[0]["tflops_per_second"]
        assert row["share"] == pytest.approx(expected)
    sparse, dense = rows[3:5]
    assert [sparse["plan"], dense["plan"]] == ["jit-14x", "dense"]  # few steps first
    assert len(sparse["stage_seconds"]) == len(sparse["step_seconds"]) == len(plan.densities)
    steps = np.diff([0, *plan.stage_steps])
    np.testing.assert_allclose(sparse["stage_seconds"], steps * sparse["step_seconds"])
    assert 0 < sparse["outside"] < 1
    assert rows[5]["speedup"] == pytest.approx(dense["seconds"] / sparse["seconds"])
    assert rows[5]["bound"] == pytest.approx(dense["tflop"] / sparse["tflop"])


@pytest.mark.slow
def test_no_row_starts_after_the_time(small_model, monkeypatch, capsys):
    arguments = "--model middle --size 64 --matmul 64 --minutes 0"
    monkeypatch.setattr("sys.argv", ["speed", *arguments.split()])
    speed.main()
    assert "matmul" in capsys.readouterr().out.splitlines()[-2]
