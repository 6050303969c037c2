"""Solves over meshes of four devices; run by `test_meshes.py` in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden import build
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jitjax

PLAN = jitjax.Plan(3, (0.5, 1.0), (0.4, 1.0), microflow_noise="initial")
SPARSE, DENSE = jitjax.Plan(2, (0.5, 1.0), (0.5, 1.0)), jitjax.Plan(2)
SIZE = {"height": 32, "width": 32}
NOISE = jax.random.normal(jax.random.key(0), (8, 16, 8))
WEIGHT = jax.random.normal(jax.random.key(1), (8, 8)) / 3
FIRST = jnp.broadcast_to(jnp.arange(0, 16, 2), (8, 8))


def velocity(tokens, positions, sigma, valid, args):
    return jnp.sin(tokens @ args)


def solve(noise, weight, first, **more):
    sigmas = jnp.linspace(1, 0, 4)
    return jitjax.jit_solve(
        velocity, noise, sigmas, plan=PLAN, grid=(4, 4), first_anchors=first, args=weight, **more
    )


def loss(weight, noise, first):
    return (solve(noise, weight, first) ** 2).sum()


def check(got, expected, name):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=4e-6, err_msg=str(name))


def check_slope(got, expected, name):
    # A sum over all tokens, whose order depends on the mesh.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=str(name))


def check_mesh(kind: AxisType, in_context: bool, expected, slope) -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))

    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        for batch, params in ((P(), P("d")), (P("d"), P()), (P("d"), P(None, "d"))):
            name = (kind, in_context, batch, params)
            y, w, f = place(NOISE, batch), place(WEIGHT, params), place(FIRST, batch)
            got = solve(y, w, f)
            check(got, expected, name)
            # The result lies where the noise does, so that one can go on with both.
            check(got - y, expected - NOISE, name)
            if batch == P("d"):
                assert got.sharding.spec[0] == "d", name
        check(jax.jit(solve)(y, w, f), expected, (*name, "jit"))
        check(jax.jit(lambda w: solve(y, w, f) - y)(w), expected - NOISE, (*name, "closed over"))
        check_slope(jax.jit(jax.grad(loss))(w, y, f), slope, (*name, "grad"))
        check(jax.vmap(lambda y, f: solve(y[None], w, f[None])[0])(y, f), expected, (*name, "vmap"))
        check(solve(y, w, f, progress=lambda done: None), expected, (*name, "progress"))
        got, trace = solve(y, w, f, trace=True)
        check(trace.states[-1], expected, (*name, "trace"))
        if in_context:
            check_slope(jax.grad(loss)(w, y, f), slope, (*name, "grad outside jit"))
            check(solve(NOISE, WEIGHT, FIRST), expected, (*name, "arrays of one device"))
            check(solve(np.asarray(NOISE), WEIGHT, np.asarray(FIRST)), expected, (*name, "numpy"))
        for check_vma in (True, False):
            specs = P("d"), P(), P("d")
            over_shards = jax.shard_map(
                solve, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma
            )
            check(jax.jit(over_shards)(y, place(WEIGHT, P()), f), expected, (*name, check_vma))


def check_pictures(kind: AxisType) -> None:
    """Conditioning with the batch over the mesh and everything else replicated.

    `check_control` has the same under `jit`.
    """
    with tempfile.TemporaryDirectory() as folder:
        params = build.small_params(Path(folder))
        prompts = ["a large red circle", "a small blue star", "two crosses", "a ring"]
        options = {"key": jax.random.key(0), "plan": SPARSE, **SIZE}
        conditioning = jitjax.encode_prompt(params, prompts)
        expected = jitjax.sample(params, conditioning, **options)
        one_stage = jitjax.sample(params, conditioning, **options | {"plan": DENSE})
        mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            # Arrays of one device; `check_mesh` has stages of them.
            got = jitjax.sample(params, prompts, **options | {"plan": DENSE})
            np.testing.assert_allclose(got, one_stage, atol=1e-4, err_msg=f"{kind} prompts")
            over_batch = jax.device_put(conditioning, NamedSharding(mesh, P("d")))
            got = jitjax.sample(params, over_batch, **options)
            np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f"{kind} sample")
            assert got.sharding.spec[0] == "d" or kind == AxisType.Auto
        pictures = np.random.default_rng(0).uniform(0, 1, (4, 32, 32, 3)).astype(np.float32)
        tokens = jitjax.encode(params, pictures, key=jax.random.key(1))
        options |= {"strength": 0.5, "plan": DENSE}
        expected = jitjax.sample(params, conditioning, image=pictures, **options)
        divided = jax.device_put(pictures, NamedSharding(mesh, P("d")))
        got = jitjax.encode(params, divided, key=jax.random.key(1))
        np.testing.assert_allclose(got, tokens, atol=1e-4, err_msg=f"{kind} encode")
        assert got.sharding.spec[0] == "d" or kind == AxisType.Auto
        with jax.set_mesh(mesh):
            got = jitjax.sample(params, over_batch, image=divided, **options)
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f"{kind} image")


def check_control(kind: AxisType) -> None:
    """Control and reference pictures with the batch over the mesh."""
    with tempfile.TemporaryDirectory() as folder:
        small = build.small_params(Path(folder))
    rng = np.random.default_rng(0)
    pictures = rng.uniform(0, 1, (4, 32, 32, 3)).astype(np.float32)
    text = jitjax.Conditioning(
        jnp.asarray(rng.normal(size=(4, 12, 12)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
    )
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    for name, params, plan, transform in (
        ("control", build.with_input_channels(small, 128), SPARSE, jax.jit),
        ("reference", small, DENSE, lambda function: function),
    ):

        def run(text, given, params=params, plan=plan):
            return jitjax.sample(params, text, key=jax.random.key(0), plan=plan, **SIZE, **given)

        expected = run(text, {name: pictures})
        with jax.set_mesh(mesh):
            divided = jax.device_put((text, {name: pictures}), NamedSharding(mesh, P("d")))
            got = transform(run)(*divided)
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f"{kind} {name}")
        assert got.sharding.spec[0] == "d" or kind == AxisType.Auto


if __name__ == "__main__":
    gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects, few of them in cycles
    expected = solve(NOISE, WEIGHT, FIRST)
    slope = jax.grad(loss)(WEIGHT, NOISE, FIRST)
    for kind in (AxisType.Explicit, AxisType.Auto):
        for in_context in (False, True):
            check_mesh(kind, in_context, expected, slope)
    check_pictures(AxisType.Explicit)
    check_control(AxisType.Explicit)
    with jax.default_device(jax.devices()[1]):
        check(solve(NOISE, WEIGHT, FIRST), expected, "default device")
    print("all equal")
