"""What `denoise` chooses for the device: attention, compiler options and padding."""

from __future__ import annotations

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jitjax
from jitjax.config import FluxConfig, TransformerConfig
from jitjax.denoise import plan_for_device
from jitjax.models import devices, param_shapes
from jitjax.sampler.plan import Plan
from jitjax.sampler.solve import jit_solve
from jitjax.velocity import FluxVelocity

denoise_module = importlib.import_module("jitjax.denoise")  # `jitjax.denoise` is the function
PLAN = Plan(3, (0.5, 0.75, 1.0), (0.34, 0.67, 1.0), microflow="hit", microflow_noise="initial")


@pytest.fixture
def nvidia(monkeypatch):
    """Let the project believe that the default device is an NVIDIA GPU."""
    for module in (devices, denoise_module):
        monkeypatch.setattr(module, "on_nvidia_gpu", lambda: True)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))


def test_no_compiler_options_and_no_padding_on_a_cpu():
    assert not devices.on_nvidia_gpu()
    assert devices.compiler_options() == {}
    assert plan_for_device(PLAN, jnp.bfloat16) == PLAN


def test_compiler_options_on_nvidia_gpus_leave_the_users_flags_alone(nvidia, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": True}
    assert devices.compiler_options() == options
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_gpu_autotune_level=0")
    assert devices.compiler_options() == {"xla_gpu_enable_dynamic_slice_fusion": True}


def test_no_compiler_options_before_jax_0_11(nvidia, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert devices.compiler_options() == {}


def test_16_bit_models_are_padded_on_nvidia_gpus(nvidia):
    assert plan_for_device(PLAN, jnp.bfloat16).pad_to == 8
    assert plan_for_device(PLAN, "float16").pad_to == 8
    assert plan_for_device(PLAN, jnp.float32) == PLAN
    assert plan_for_device(PLAN.replace(pad_to=6), jnp.bfloat16).pad_to == 6


def test_denoise_uses_what_the_device_wants(nvidia, monkeypatch):
    params = jitjax.load("tiny", dtype=jnp.bfloat16, parts=["transformer"])
    config = params.config
    text = jnp.zeros((1, config.text_length, config.transformer.joint_attention_dim))
    pooled = jnp.zeros((1, config.transformer.pooled_projection_dim))
    noise = jax.random.normal(jax.random.key(0), (1, 64, 64))
    received = {}

    def record(velocity, *args, **kwargs):
        received.update(kwargs, velocity=velocity)
        return args[0]

    monkeypatch.setattr("jitjax.sampler.solve.jit_solve", record)
    conditioning = jitjax.Conditioning(text, pooled)
    jitjax.denoise(params, conditioning, noise, plan=PLAN, key=jax.random.key(0), attention="xla")
    assert received["compiler_options"] == devices.compiler_options()
    assert received["plan"].pad_to == 8
    assert received["velocity"] == FluxVelocity(config.transformer, "xla")


def test_unknown_attention_is_refused_at_once(small):
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of auto, xla"):
        jitjax.sample(small, "a", key=jax.random.key(0), attention="flash")
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of auto, xla"):
        FluxVelocity(TransformerConfig(), "flash")


def linear(tokens, positions, sigma, valid, args):
    return -tokens * sigma


def solve(**kwargs):
    noise = jax.random.normal(jax.random.key(0), (1, 16, 8))
    plan = Plan(3, schedule="shifted")
    return jit_solve(linear, noise, jnp.linspace(1, 0, 4), plan=plan, grid=(4, 4), **kwargs)


def test_compiler_options_reach_xla_and_are_ignored_under_jit():
    unknown = {"xla_no_such_option": True}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        solve(compiler_options=unknown)
    expected = solve()
    known = {"xla_cpu_enable_fast_math": False}
    np.testing.assert_allclose(solve(compiler_options=known), expected, rtol=1e-6)
    under_jit = jax.jit(lambda: solve(compiler_options=unknown))()  # all inputs are concrete
    np.testing.assert_allclose(under_jit, expected, rtol=1e-6)


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow)])
def test_each_full_size_stage_exports_from_a_cpu(platform):
    """All of `4x`, with abstract weights, where there is neither a GPU nor a TPU."""
    config = FluxConfig()
    velocity = FluxVelocity(config.transformer)
    params = param_shapes.transformer(config.transformer, jnp.bfloat16)
    text = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    pooled = jax.ShapeDtypeStruct((1, 768), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 4096, 64), jnp.float32)
    plan = jitjax.PLANS["4x"]
    first = jax.ShapeDtypeStruct((1, plan.budgets(4096, 512)[0]), jnp.int32)
    guidance = jax.ShapeDtypeStruct((1,), jnp.float32)

    def run(params, text, pooled, noise, first, microflow_noise, guidance):
        return jit_solve(
            velocity,
            noise,
            jnp.linspace(1, 0, plan.steps + 1),
            plan=plan,
            grid=(64, 64),
            first_anchors=first,
            microflow_noise=microflow_noise,
            args=(params, jitjax.Conditioning(text, pooled), guidance),
            text_tokens=512,
        )

    exported = jax.export.export(jax.jit(run), platforms=[platform])(
        params, text, pooled, noise, first, noise, guidance
    )
    program = exported.mlir_module()
    assert exported.out_avals[0].shape == (1, 4096, 64)
    assert "4608x4608" not in program  # no array of all logits
    # The products of blocks keep their bias apart on NVIDIA GPUs alone: three stages, two scans.
    barriers = len(re.findall("optimization_barrier", program))
    assert barriers >= 3 * 14 if platform == "cuda" else barriers < 14
