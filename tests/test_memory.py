"""The estimate of memory against XLA's own account of the compiled programs."""

from __future__ import annotations

import dataclasses
import sys

import jax
import pytest

import jitjax
from benchmarks.memory import (
    FULL,
    MIDDLE,
    account,
    lower_decoder,
    lower_encoders,
    lower_image_encoder,
    lower_stage,
)
from jitjax import memory
from jitjax.memory import check, estimate_memory, programs, weights
from jitjax.models import strips
from jitjax.sampler.plan import get_plan


def compare(program, lowered, temporaries):
    """Each program within 10 %; its arguments and results nearly exactly.

    `temporaries` is the largest relative error of that part, which hides behind the weights.
    """
    arguments, used, results = account(lowered)
    assert program.total == pytest.approx(arguments + used + results, rel=0.1)
    assert program.weights + program.inputs == pytest.approx(arguments, rel=2e-3)
    assert program.outputs == pytest.approx(results, rel=2e-3)
    assert program.temporaries == pytest.approx(used, rel=temporaries)


def transformer_programs(estimate):
    return [p for p in estimate.programs if p.name.startswith("transformer")]


def test_full_size_transformer():
    """48 GB of weights; what is beside them is within 10 % too."""
    estimate = estimate_memory("flux-dev", batch=4, plan="4x", platform="cpu")
    compare(transformer_programs(estimate)[1], lower_stage(FULL, 1024, 4, "4x", 1, "float32"), 0.1)


@pytest.mark.parametrize(
    ("side", "batch", "plan", "number"),
    [
        pytest.param(512, 4, "jit-10x", 0, marks=pytest.mark.slow),
        pytest.param(512, 2, "7x", 2, marks=pytest.mark.slow),
        pytest.param(256, 16, "dense", 0, marks=pytest.mark.slow),
    ],
)
def test_middle_size_transformer(side, batch, plan, number):
    """Of a model this small the activations are most of it."""
    estimate = estimate_memory(MIDDLE, height=side, width=side, batch=batch, plan=plan,
                               platform="cpu")  # fmt: skip
    lowered = lower_stage(MIDDLE, side, batch, plan, number, "float32")
    compare(transformer_programs(estimate)[number], lowered, 0.15)


@pytest.mark.parametrize("side", [512, pytest.param(2048, marks=pytest.mark.slow)])
def test_middle_size_decoder(side):
    estimate = estimate_memory(MIDDLE, height=side, width=side, platform="cpu")
    compare(estimate.programs[-1], lower_decoder(MIDDLE, side, 1, "float32"), 0.1)


@pytest.mark.parametrize(
    ("side", "batch"), [(512, 2), pytest.param(2048, 1, marks=pytest.mark.slow)]
)
def test_middle_size_image_encoder(side, batch):
    estimate = estimate_memory(
        MIDDLE, height=side, width=side, batch=batch, platform="cpu", image=True
    )
    program = next(p for p in estimate.programs if p.name == "image encoder")
    compare(program, lower_image_encoder(MIDDLE, side, batch, "float32"), 0.05)


@pytest.mark.parametrize(
    ("plan", "number"), [("7x", 0), pytest.param("dense", 0, marks=pytest.mark.slow)]
)
def test_negative_prompts(plan, number):
    """Two passes take little more than one: a batch of two would take twice the temporaries."""
    options = {"height": 512, "width": 512, "batch": 4, "plan": plan, "platform": "cpu"}
    one = transformer_programs(estimate_memory(MIDDLE, **options))[number]
    both = transformer_programs(estimate_memory(MIDDLE, **options, negative=True))[number]
    compare(both, lower_stage(MIDDLE, 512, 4, plan, number, "float32", negative=True), 0.15)
    assert one.temporaries < both.temporaries < 1.3 * one.temporaries


def test_middle_size_text_encoders():
    estimate = estimate_memory(MIDDLE, batch=8, platform="cpu")
    compare(estimate.programs[0], lower_encoders(MIDDLE, 8, "float32"), 0.15)


def test_the_constants_are_those_of_the_decoder():
    for name in ("WHOLE_PIXELS", "STRIP_PIXELS", "STRIPPED_LEVELS", "LEAST_ROWS"):
        assert getattr(programs, name) == getattr(strips, name)


def test_peak_measured_on_an_h200():
    """docs/performance: 24.163 GB at most while `dense` ran, beside nothing but the transformer."""
    estimate = estimate_memory("flux-dev", plan="dense", parts=("transformer",))
    assert estimate.device == pytest.approx(24.163e9, rel=0.01)
    beside = estimate.device - estimate.parts["transformer"]
    assert beside == pytest.approx(24.163e9 - estimate.parts["transformer"], rel=0.1)


def test_parameters_by_dtype_and_quantisation():
    parts = {q: estimate_memory("flux-dev", quantise=q).parts for q in (None, "int8", "int4")}
    kernels = sum(
        n * k for stack, n in (("double_blocks", 19), ("single_blocks", 38))
        for k in weights.block_kernels(FULL, "transformer", stack).values()
    )  # fmt: skip
    saved = {q: parts[None]["transformer"] - parts[q]["transformer"] for q in parts}
    assert saved["int8"] == pytest.approx(kernels, rel=2e-3)  # of 2 bytes each; less the scales
    assert saved["int4"] == pytest.approx(kernels * (1.5 - 2 / 64), rel=1e-6)
    for name in ("clip", "autoencoder"):
        assert parts["int8"][name] == parts[None][name]
    wide = estimate_memory("flux-dev", dtype="float32").parts
    assert wide == {name: 2 * n for name, n in parts[None].items()}
    dev, schnell = (estimate_memory(name).parts for name in ("flux-dev", "flux-schnell"))
    assert dev["transformer"] > schnell["transformer"]


def test_a_mesh_divides_kernels_and_batch():
    one = estimate_memory("flux-dev", batch=8, mesh=None)
    assert estimate_memory("flux-dev", batch=8, mesh={"data": 4}).parts == one.parts
    model = estimate_memory("flux-dev", batch=8, mesh={"model": 4})
    fsdp = estimate_memory("flux-dev", batch=8, mesh="1x4x1")
    assert model.parts == pytest.approx(fsdp.parts, rel=1e-3)  # heads of the bias
    assert model.parts["transformer"] == pytest.approx(one.parts["transformer"] / 4, rel=0.02)
    assert model.parts["clip"] == one.parts["clip"]
    assert fsdp.settings.batch == 2
    assert fsdp.programs[-1].temporaries == one.programs[-1].temporaries / 4
    assert model.programs[-1].temporaries == one.programs[-1].temporaries
    assert model.disk == one.disk


def test_one_part_at_a_time():
    estimate = estimate_memory("flux-dev")
    together = {p.name.split(",")[0]: p for p in estimate.programs}
    transformer = together["transformer"]
    assert estimate.low_memory == transformer.total
    assert estimate.device == sum(estimate.parts.values()) + together["decoder"].beside_weights
    assert not estimate.fits(24, low_memory=True)
    assert estimate.fits(40)
    assert estimate_memory("flux-dev", quantise="int8").fits(16, low_memory=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platform": "npu"}, "platform is 'npu'; expected one of gpu, cpu"),
        ({"quantise": "int3"}, "quantise is 'int3'; expected one of int8, int4, float8"),
        ({"attention": "fast"}, "attention is 'fast'; expected one of auto, cudnn, xla"),
        ({"dtype": "int8"}, "dtype is int8; expected one of bfloat16, float16, float32"),
        ({"dtype": "bf17"}, "dtype is 'bf17'; expected one of"),
        ({"batch": 0}, "batch is 0; expected 1 or more"),
        ({"height": 100}, "height is 100 pixels; expected a multiple of 16"),
        ({"plan": "9x"}, "unknown plan '9x'"),
        ({"mesh": "2"}, "mesh is '2'; expected DATAxMODEL"),
        ({"mesh": "2x0"}, "mesh is '2x0'; expected DATAxMODEL"),
        ({"mesh": {"tensor": 2}}, "mesh has the axis 'tensor'; expected data, fsdp, model"),
        ({"parts": ("t5",)}, "expected some of .*, one of them the transformer"),
    ],
)
def test_errors(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory("flux-dev", **arguments)


def test_no_such_model(unchecked):
    with pytest.raises(FileNotFoundError, match=r"expected a folder .* or one of flux-dev"):
        estimate_memory("flux-pro")
    with pytest.raises(ValueError, match="model is 3; expected a FluxConfig, a folder or a name"):
        memory.estimate_memory(3)


class Refused(Exception):
    pass


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_batch_that_cannot_fit_is_refused_before_compiling(small, monkeypatch, factor):
    """With the estimate and what would fit; and no sooner than it must be."""
    estimate = estimate_memory(small.config, batch=1000, dtype="float32")
    extra = max(p.beside_weights for p in estimate.programs)
    statistics = {"bytes_limit": 10**9 + round(factor * extra), "bytes_in_use": 10**9}
    monkeypatch.setattr(check, "memory_statistics", lambda device: statistics)

    def stop(*_, **__):
        raise Refused

    monkeypatch.setattr(sys.modules["jitjax.sample"], "tokenize", stop)
    statistics["bytes_limit"] = 10**9 + round(factor * check.UNAVOIDABLE * extra)
    expected = pytest.raises(Refused)
    if factor < 1:
        expected = pytest.raises(
            ValueError,
            match=r"a batch of 1000 at 64 x 64 pixels does not fit the device: it needs about .* "
            r"GB beside the 1\.0 GB in use, .*; expected less, such as a batch of \d+, or "
            r"quantised weights, or jitjax\.load\(path, low_memory=True\)",
        )
    with expected:
        jitjax.sample(small, ["a"] * 1000, key=jax.random.key(0))


def test_nothing_is_refused_where_the_memory_is_not_known(small):
    grid, plan = (64, 64), get_plan("dense")
    check.check_fits(small, grid, 10**9, plan, encode=True)  # a CPU
    jax.eval_shape(lambda p: check.check_fits(p, grid, 10**9, plan, encode=True), small)
    empty = dataclasses.replace(small, transformer={}, t5={}, clip={}, autoencoder={})
    check.check_fits(empty, grid, 10**9, plan, encode=True)
