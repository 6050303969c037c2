"""Rules from parameters to mesh axes, and their errors; runs `partitioning_program.py`."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jitjax
from jitjax.checkpoint import abstract_params
from jitjax.config import FluxConfig
from jitjax.models.partitioning import RULES, check_mesh, kinds_of_dimensions, partition_spec
from jitjax.nested import flatten

P = PartitionSpec


def mesh_of(**sizes: int) -> Mesh:
    """A mesh of the wanted shape, on which nothing can run: it is the same device everywhere."""
    return Mesh(np.full(tuple(sizes.values()), jax.devices()[0]), tuple(sizes))


def full_size_shapes(*parts: str) -> dict[str, tuple[int, ...]]:
    abstract = abstract_params(FluxConfig())
    flat: dict = flatten({part: getattr(abstract, part) for part in parts})
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(["fsdp program", "model program"], id="programs"),
        pytest.param(
            [
                "other programs",
                "pictures",
                "all axes",
                "quantised",
                "quantised pictures",
                "gradients",
            ],
            id="other programs, pictures, quantised, gradients",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_over_eight_devices(checks):
    """In a process of its own, because the number of devices is fixed when JAX starts.

    The slow checks share one, with its start and its compiled programs. It prints the name of each
    check that passed.
    """
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it spends its time on compilation
    }
    program = Path(__file__).with_name("partitioning_program.py")
    process = subprocess.run(
        [sys.executable, program, *checks], capture_output=True, text=True, env=environment
    )
    assert process.stdout.strip() == "all equal", process.stdout + process.stderr[-3000:]


@pytest.mark.parametrize(
    ("sizes", "gigabytes"),
    [
        ({"fsdp": 8}, 4.66),
        ({"model": 8}, 4.66),
        ({"data": 2, "fsdp": 2, "model": 2}, 8.82),
    ],
)
def test_bytes_per_device_at_full_size(sizes, gigabytes):
    """FLUX.1-dev and T5-XXL in bfloat16; CLIP and the autoencoder are whole, 0.4 GB."""
    shapes = full_size_shapes("transformer", "t5", "clip", "autoencoder")
    count = whole = 0
    for path, shape in shapes.items():
        axes = [axis for entry in partition_spec(path, shape, sizes) for axis in axes_of(entry)]
        assert len(axes) == len(set(axes)), path
        count += math.prod(shape) // math.prod(sizes[axis] for axis in axes)
        whole += math.prod(shape) if not axes else 0
    assert round(2 * count / 1e9, 2) == gigabytes
    divided_by = math.prod(size for axis, size in sizes.items() if axis != "data")
    total = sum(math.prod(shape) for shape in shapes.values())
    assert count < total / divided_by + whole * 1.01


def axes_of(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def test_every_rule_applies_to_a_parameter():
    kinds = {kinds_of_dimensions(path) for path in full_size_shapes("transformer", "t5")}
    assert kinds == {kinds for _, kinds in RULES} | {()}


@pytest.mark.parametrize(
    ("leaf", "shape", "expected"),
    [
        ("values", (19, 3072, 3, 24, 128), P(None, "fsdp", None, "model", None)),
        ("values", (19, 1536, 3, 24, 128), P(None, "fsdp", None, "model", None)),  # two in a byte
        ("scales", (19, 48, 3, 24, 128), P(None, "fsdp", None, "model", None)),  # per group of 64
        ("scales", (19, 1, 3, 24, 128), P(None, None, None, "model", None)),  # per output
        ("scales", (3, 24, 128), P()),
    ],
)
def test_quantised_kernels_are_divided_as_kernels(leaf, shape, expected):
    path = f"transformer/double_blocks/text_attention/qkv/kernel/{leaf}"
    assert partition_spec(path, shape, {"fsdp": 2, "model": 4}) == expected


def test_when_they_are_used_parameters_are_divided_by_model_alone():
    sizes = {"data": 2, "fsdp": 2, "model": 4}
    out, modulation = "single_blocks/out/kernel", "single_blocks/modulation/kernel"
    for path, shape, expected in (
        (out, (15360, 3072), P(None, "model")),
        (modulation, (3072, 3, 3072), P(None, None, ("model", "fsdp"))),
        ("single_blocks/out/bias", (3072,), P(None)),
    ):
        assert partition_spec(f"transformer/{path}", shape, sizes, gathered=True) == expected


@pytest.mark.parametrize(
    ("sizes", "parts", "message"),
    [
        (
            {"model": 5},
            ("transformer", "t5"),
            "mesh axis 'model' has size 5, which does not divide 24 heads of the transformer and "
            "12288 features of the transformer and 64 heads of t5; expected 1, 2, 4 or 8",
        ),
        (
            {"data": 2, "model": 3},
            ("transformer", "t5"),
            "mesh axis 'model' has size 3, which does not divide 64 heads of t5 and 10240 features "
            "of t5; expected 1, 2, 4 or 8",
        ),
        (
            {"fsdp": 12},
            ("t5",),
            "mesh axis 'fsdp' has size 12, which does not divide 4096 channels of t5; expected 1, "
            "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048 or 4096",
        ),
        (
            {"data": 2, "tensor": 2},
            ("t5",),
            "mesh has the axis 'tensor'; expected axes of data, fsdp, model",
        ),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, parts, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_mesh(mesh_of(**sizes), full_size_shapes(*parts))


def test_sizes_that_divide_what_is_loaded():
    check_mesh(mesh_of(model=8, fsdp=4, data=3), full_size_shapes("transformer", "t5"))
    check_mesh(mesh_of(model=3), full_size_shapes("transformer", "clip", "autoencoder"))


def test_a_mesh_that_does_not_fit_is_refused_before_arrays_are_read(tmp_path, monkeypatch):
    params = jitjax.load("tiny", parts=("transformer",))
    jitjax.save(params, tmp_path / "saved")
    monkeypatch.setattr("jitjax.checkpoint.restoring.read_arrays", None)
    monkeypatch.setattr("jitjax.checkpoint.restoring.read_leaf_metadata", None)
    message = (
        "mesh axis 'model' has size 4, which does not divide 6 heads of the transformer; "
        "expected 1, 2, 3 or 6"
    )
    with pytest.raises(ValueError, match=message):
        jitjax.load(tmp_path / "saved", mesh=mesh_of(model=4), parts=("transformer",))
    with pytest.raises(ValueError, match=message):
        jitjax.load("tiny", mesh=mesh_of(model=4), parts=("transformer",))


def test_arguments_of_load():
    one = mesh_of(data=1)
    for mesh, got in (((2, 2), "tuple"), (one.abstract_mesh, "AbstractMesh")):
        with pytest.raises(TypeError, match=f"mesh has the type {got}; expected a jax.sharding"):
            check_mesh(mesh, {})
    with pytest.raises(ValueError, match="mesh and sharding are both given"):
        jitjax.load("tiny", mesh=one, sharding=NamedSharding(one, P()))
