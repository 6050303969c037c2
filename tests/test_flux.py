"""The transformer by itself: sizes, padding, transformations, errors. Parity is in tests/parity."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jitjax.config import TransformerConfig
from jitjax.convert.engine import expected_sources, leaf_shapes
from jitjax.convert.tables import transformer_rules
from jitjax.models.flux import FluxTransformer, abstract_params

CONFIG = TransformerConfig(
    in_channels=4,
    num_layers=2,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
MODEL = FluxTransformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    def init():
        return MODEL.init(jax.random.key(0), **inputs(1))["params"]

    return jax.jit(init)()


def inputs(batch: int, count: int = 5) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(1), 6)
    ids = jnp.stack([jnp.zeros(count), jnp.arange(count) // 2, jnp.arange(count) % 2], axis=-1)
    return {
        "tokens": jax.random.normal(keys[0], (batch, count, 4)),
        "positions": jnp.broadcast_to(ids, (batch, count, 3)),
        "text": jax.random.normal(keys[1], (batch, 3, 6)),
        "pooled": jax.random.normal(keys[2], (batch, 5)),
        "sigma": jax.random.uniform(keys[3], (batch,)),
        "guidance": 1 + 4 * jax.random.uniform(keys[4], (batch,)),
    }


@jax.jit
def forward(params, given):
    return MODEL.apply({"params": params}, **given)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("guidance", "count"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_full_size_parameter_count(guidance: bool, count: int):
    tree = abstract_params(TransformerConfig(guidance_embeds=guidance), jnp.bfloat16)
    leaves = jax.tree.leaves(tree)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_full_size_names_and_shapes():
    """The table asks for exactly the tensors of the published file."""
    published = {}
    for line in (Path(__file__).parent / "data/flux_dev_transformer.txt").read_text().splitlines():
        if not line.startswith("#"):
            blocks, name, *shape = line.split()
            for i in range(int(blocks)):
                published[name.replace("{i}", str(i))] = tuple(map(int, shape))
    config = TransformerConfig()
    wanted = expected_sources(transformer_rules(config), leaf_shapes(abstract_params(config)))
    assert wanted == published


def test_full_size_velocities():
    """19 + 38 blocks at 1024 x 1024 in bfloat16, without a number computed."""
    config = TransformerConfig()
    shapes = [(1, 4096, 64), (1, 4096, 3), (1, 512, 4096), (1, 768), (1,), (1,)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    model = FluxTransformer(config, jnp.bfloat16)
    params = {"params": abstract_params(config, jnp.bfloat16)}
    out = jax.eval_shape(model.apply, params, *arrays)
    assert (out.shape, out.dtype) == ((1, 4096, 64), jnp.float32)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, 1e30])
def test_padding_has_no_influence(params, garbage: float):
    given = inputs(2)
    valid = jnp.asarray([[True] * 5 + [False] * 2] * 2)
    padding = jnp.full((2, 2, 4), garbage)
    places = jnp.full((2, 2, 3), garbage)
    padded = given | {
        "tokens": jnp.concatenate([given["tokens"], padding], axis=1),
        "positions": jnp.concatenate([given["positions"], places], axis=1),
    }
    got = forward(params, padded | {"valid": valid})
    assert_close(got[:, :5], forward(params, given))
    assert not got[:, 5:].any()

    def loss(tokens, positions):
        out = forward(params, padded | {"tokens": tokens, "positions": positions, "valid": valid})
        return jnp.square(out).sum()

    gradients = jax.grad(loss, argnums=(0, 1))(padded["tokens"], padded["positions"])
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        assert not gradient[:, 5:].any()


def test_each_sample_has_its_own_padding(params):
    given = inputs(2)
    valid = jnp.asarray([[True, False, True, True, False], [True, True, False, False, False]])
    together = forward(params, given | {"valid": valid})
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in given.items()}
        for name in ("tokens", "positions"):
            one[name] = one[name][:, valid[i]]
        assert_close(together[i, valid[i]], forward(params, one)[0])


def test_no_mask_without_padding(params):
    given = inputs(1)
    assert_close(forward(params, given | {"valid": jnp.ones((1, 5), bool)}), forward(params, given))
    assert "select_n" not in str(jax.make_jaxpr(forward)(params, given))


def test_order_of_tokens_does_not_matter(params):
    given = inputs(1)
    order = jnp.asarray([3, 0, 4, 1, 2])
    moved = given | {name: given[name][:, order] for name in ("tokens", "positions")}
    assert_close(forward(params, moved), forward(params, given)[:, order])


def test_one_sigma_for_all_equals_one_each(params):
    given = inputs(3)
    scalars = given | {"sigma": 0.25, "guidance": jnp.float32(3.5)}
    vectors = given | {"sigma": jnp.full(3, 0.25), "guidance": jnp.full(3, 3.5)}
    assert_close(forward(params, scalars), forward(params, vectors))


def test_vmap_equals_batch(params):
    given = inputs(3)
    singles = jax.tree.map(lambda x: x[:, None], given)
    got = jax.vmap(forward, in_axes=(None, 0))(params, singles)
    assert_close(got[:, 0], forward(params, given))


def test_gradient_reaches_every_parameter(params):
    def loss(params):
        return jnp.square(forward(params, inputs(1))).sum()

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    assert all(jnp.isfinite(g).all() for _, g in gradients)
    assert not [jax.tree_util.keystr(k) for k, g in gradients if not jnp.abs(g).max() > 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.1), (jnp.float16, 0.02)])
def test_narrow_types(params, dtype, tolerance: float):
    given = inputs(2)
    narrow = jax.tree.map(lambda x: x.astype(dtype), params)
    got = jax.jit(FluxTransformer(CONFIG, dtype).apply)({"params": narrow}, **given)
    assert got.dtype == jnp.float32
    expected = forward(params, given)
    assert jnp.abs(got - expected).max() < tolerance * jnp.abs(expected).max()


def test_sigma_is_embedded_in_float32():
    """A step of sigma that bfloat16 could not see changes a bfloat16 network's velocities."""
    model = FluxTransformer(CONFIG, jnp.bfloat16)
    given = inputs(1)

    def both():
        params = model.init(jax.random.key(0), **given)
        return [model.apply(params, **(given | {"sigma": s})) for s in (0.9000, 0.9005)]

    assert jnp.bfloat16(0.9000) == jnp.bfloat16(0.9005)
    first, second = jax.jit(both)()
    assert jnp.abs(first - second).max() > 0


def test_guidance_is_ignored_by_a_model_without_it():
    model = FluxTransformer(TransformerConfig(**(vars(CONFIG) | {"guidance_embeds": False})))
    given = inputs(1)

    def both():
        params = model.init(jax.random.key(0), **given)
        return [model.apply(params, **(given | {"guidance": g})) for g in (None, 7.0)]

    first, second = jax.jit(both)()
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros((2, 5, 3))}, r"tokens has shape \(2, 5, 3\), expected \(2, 5, 4\)"),
        ({"tokens": jnp.zeros((5, 4))}, "tokens has shape"),
        ({"positions": jnp.zeros((5, 3))}, "positions has shape"),
        ({"text": jnp.zeros((2, 3, 7))}, r"text has shape \(2, 3, 7\), expected \(2, 3, 6\)"),
        ({"text": jnp.zeros((1, 3, 6))}, "text has shape"),
        ({"pooled": jnp.zeros((2, 6))}, "pooled has shape"),
        ({"sigma": jnp.zeros(3)}, r"sigma has shape \(3,\), expected \(\) or \(2,\)"),
        ({"guidance": jnp.zeros((2, 1))}, "guidance has shape"),
        ({"guidance": None}, "guidance is None"),
        ({"valid": jnp.ones((2, 4), bool)}, "valid has shape"),
        ({"valid": jnp.ones((2, 5))}, "valid has dtype float32"),
    ],
)
def test_wrong_inputs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), **(inputs(2) | change)))


def test_all_wrong_inputs_are_named_at_once():
    change = {"pooled": jnp.zeros((2, 6)), "sigma": jnp.zeros(3), "guidance": None}
    with pytest.raises(ValueError, match=r"pooled.*guidance.*sigma"):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), **(inputs(2) | change)))
