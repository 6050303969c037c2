"""The FLUX transformer: parameter counts, shapes, padding, transformations and errors.

`tests/parity` compares its outputs with diffusers.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.build import random_tree
from jaxtyping import config as jaxtyping_config

from jitjax.config import TransformerConfig
from jitjax.convert.tables.engine import expected_sources, leaf_shapes
from jitjax.convert.tables.transformer import transformer_rules
from jitjax.models import param_shapes
from jitjax.models.flux import FluxTransformer

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
    return random_tree(param_shapes.transformer(CONFIG), seed=0)


def random_inputs(batch: int, count: int = 5) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    ids = np.stack([np.zeros(count), np.arange(count) // 2, np.arange(count) % 2], axis=-1)
    arrays = {
        "tokens": rng.standard_normal((batch, count, 4)),
        "positions": np.broadcast_to(ids, (batch, count, 3)),
        "text": rng.standard_normal((batch, 3, 6)),
        "pooled": rng.standard_normal((batch, 5)),
        "sigma": rng.uniform(size=batch),
        "guidance": rng.uniform(1, 5, size=batch),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


@jax.jit
def forward(params, inputs):
    return MODEL.apply({"params": params}, **inputs)


@jax.jit
def gradients(params, inputs):
    """Gradients of the sum of squared velocities by parameters and inputs."""
    valid = inputs.pop("valid", None)

    def loss(params, inputs):
        return jnp.square(MODEL.apply({"params": params}, **inputs, valid=valid)).sum()

    return jax.grad(loss, argnums=(0, 1))(params, inputs)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("guidance", "count"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_full_size_parameter_count(guidance: bool, count: int):
    tree = param_shapes.transformer(TransformerConfig(guidance_embeds=guidance), jnp.bfloat16)
    leaves = jax.tree.leaves(tree)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_full_size_names_and_shapes():
    """The rule table expects exactly the tensors of the published checkpoint."""
    published = {}
    file = Path(__file__).parents[1] / "data/flux_dev_transformer.txt"
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            blocks, name, *shape = line.split()
            for i in range(int(blocks)):
                published[name.replace("{i}", str(i))] = tuple(map(int, shape))
    config = TransformerConfig()
    expected = expected_sources(
        transformer_rules(config), leaf_shapes(param_shapes.transformer(config))
    )
    assert expected == published


def test_full_size_velocities():
    """Shapes and dtypes of 19 + 38 blocks at 1024 x 1024 in bfloat16, by `jax.eval_shape`."""
    config = TransformerConfig()
    shapes = [(1, 4096, 64), (1, 4096, 3), (1, 512, 4096), (1, 768), (1,), (1,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    model = FluxTransformer(config, jnp.bfloat16)
    params = {"params": param_shapes.transformer(config, jnp.bfloat16)}
    out = jax.eval_shape(model.apply, params, *arrays)
    assert (out.shape, out.dtype) == ((1, 4096, 64), jnp.float32)


def padded_inputs(garbage: float) -> dict[str, jax.Array]:
    """Return `random_inputs(2)` with two slots of padding at the end."""
    padded = random_inputs(2)
    for name, width in (("tokens", 4), ("positions", 3)):
        padding = np.full((2, 2, width), garbage, np.float32)
        padded[name] = jnp.asarray(np.concatenate([padded[name], padding], axis=1))
    return padded | {"valid": jnp.asarray([[True] * 5 + [False] * 2] * 2)}


GARBAGE = (jnp.nan, jnp.inf, 1e30)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_does_not_change_velocities(params, garbage: float):
    got = np.asarray(forward(params, padded_inputs(garbage)))
    assert_close(got[:, :5], forward(params, random_inputs(2)))
    assert not got[:, 5:].any()


@pytest.mark.slow
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_has_no_gradients(params, garbage: float):
    _, input_gradients = gradients(params, padded_inputs(garbage))
    for gradient in (input_gradients["tokens"], input_gradients["positions"]):
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[:, 5:].any()


def test_each_sample_has_its_own_padding(params):
    inputs = random_inputs(2)
    valid = jnp.asarray([[True, False, True, True, False], [True, False, True, False, True]])
    batched = np.asarray(forward(params, inputs | {"valid": valid}))
    for i in range(2):
        single = {name: value[i : i + 1] for name, value in inputs.items()}
        for name in ("tokens", "positions"):
            single[name] = single[name][:, np.asarray(valid[i])]
        assert_close(batched[i, np.asarray(valid[i])], forward(params, single)[0])


def test_no_mask_without_padding(params):
    inputs = random_inputs(2)
    assert_close(
        forward(params, inputs | {"valid": jnp.ones((2, 5), bool)}), forward(params, inputs)
    )
    assert "select_n" not in str(jax.make_jaxpr(forward)(params, inputs))


def test_order_of_tokens_does_not_matter(params):
    inputs = random_inputs(2)
    order = np.asarray([3, 0, 4, 1, 2])
    permuted = inputs | {name: inputs[name][:, order] for name in ("tokens", "positions")}
    assert_close(forward(params, permuted), forward(params, inputs)[:, order])


@pytest.mark.slow
def test_scalar_sigma_equals_one_sigma_per_sample(params):
    inputs = random_inputs(2)
    scalars = inputs | {"sigma": 0.25, "guidance": jnp.float32(3.5)}
    vectors = inputs | {"sigma": jnp.full(2, 0.25), "guidance": jnp.full(2, 3.5)}
    assert_close(forward(params, scalars), forward(params, vectors))


def test_vmap_equals_batch(params):
    inputs = random_inputs(2)
    singles = jax.tree.map(lambda x: x[:, None], inputs)
    got = jax.jit(jax.vmap(forward, in_axes=(None, 0)))(params, singles)
    assert_close(got[:, 0], forward(params, inputs))


@pytest.mark.slow
def test_gradient_reaches_every_parameter(params):
    leaves = jax.tree_util.tree_leaves_with_path(gradients(params, padded_inputs(0.0))[0])
    largest = {jax.tree_util.keystr(path): np.abs(leaf).max() for path, leaf in leaves}
    assert not [name for name, value in largest.items() if not 0 < value < np.inf]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.bfloat16, 0.1), pytest.param(jnp.float16, 0.02, marks=pytest.mark.slow)],
)
def test_narrow_dtypes(params, dtype, tolerance: float):
    inputs = random_inputs(2)
    narrow = {"params": jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)}
    apply = jax.jit(FluxTransformer(CONFIG, dtype).apply)
    got = apply(narrow, **inputs)
    assert got.dtype == jnp.float32
    expected = forward(params, inputs)
    assert jnp.abs(got - expected).max() < tolerance * jnp.abs(expected).max()
    # Sigma is embedded in float32: a change too small for the dtype changes the velocities.
    first, second = (jnp.full(2, sigma, jnp.float32) for sigma in (0.9, 0.90005))
    np.testing.assert_array_equal(first.astype(dtype), second.astype(dtype))
    velocities = [apply(narrow, **(inputs | {"sigma": sigma})) for sigma in (first, second)]
    assert jnp.abs(velocities[0] - velocities[1]).max() > 0


def test_guidance_is_ignored_by_a_model_without_it(params):
    config = TransformerConfig(**(vars(CONFIG) | {"guidance_embeds": False}))
    tree = {"params": {k: v for k, v in params.items() if k != "guidance_in"}}
    inputs = random_inputs(2)

    def program(guidance):
        apply = FluxTransformer(config).apply
        return str(jax.make_jaxpr(lambda p: apply(p, **(inputs | {"guidance": guidance})))(tree))

    assert program(None) == program(7.0)


@pytest.fixture
def unchecked():
    """Disable the tests' shape checks, which would raise before the model's own checks."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
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
def test_invalid_inputs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), **(random_inputs(2) | change)))


@pytest.mark.usefixtures("unchecked")
def test_one_error_lists_all_invalid_inputs():
    change = {"pooled": jnp.zeros((2, 6)), "sigma": jnp.zeros(3), "guidance": None}
    with pytest.raises(ValueError, match=r"pooled.*guidance.*sigma"):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), **(random_inputs(2) | change)))
