"""The transformer against diffusers' `FluxTransformer2DModel`, with weights by the rule table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from common import TOLERANCE, numpy_state, randomised, relative_error  # noqa: E402

from jitjax.config import TransformerConfig  # noqa: E402
from jitjax.convert.components import COMPONENTS, from_state  # noqa: E402
from jitjax.convert.sources.diffusers_folder import weight_files  # noqa: E402
from jitjax.convert.sources.tensors import Weights, scan_all  # noqa: E402
from jitjax.convert.tables.engine import expected_sources, leaf_shapes  # noqa: E402
from jitjax.convert.tables.text import canonical_names  # noqa: E402
from jitjax.convert.tables.transformer import transformer_rules  # noqa: E402
from jitjax.convert.targets.diffusers_folder import write_folder  # noqa: E402
from jitjax.models import param_shapes  # noqa: E402
from jitjax.models.flux import FluxTransformer  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    "guidance": TransformerConfig(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    "no guidance": TransformerConfig(
        in_channels=12,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=40,
        pooled_projection_dim=9,
        guidance_embeds=False,
        axes_dims_rope=(4, 12, 16),
    ),
    "more double blocks": TransformerConfig(
        in_channels=4,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=5,
        pooled_projection_dim=7,
        guidance_embeds=True,
        axes_dims_rope=(0, 4, 4),
    ),
}
CONFIGS |= {  # FLUX.1 Canny and Depth, and Fill
    "picture": dataclasses.replace(CONFIGS["guidance"], in_channels=128, out_channels=64),
    "fill": dataclasses.replace(CONFIGS["guidance"], in_channels=384, out_channels=64),
}


def reference(config: TransformerConfig, seed: int):
    return randomised(diffusers.FluxTransformer2DModel(**dataclasses.asdict(config)), seed)


def random_inputs(
    config: TransformerConfig, batch: int, grid: tuple[int, int], words: int, seed: int
):
    rng = np.random.default_rng(seed)
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    ids = np.stack([0 * row, row, column], axis=-1).astype(np.float32)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "tokens": normal(batch, rows * columns, config.in_channels),
        "positions": np.broadcast_to(ids, (batch, *ids.shape)),
        "text": normal(batch, words, config.joint_attention_dim),
        "pooled": normal(batch, config.pooled_projection_dim),
        "sigma": rng.uniform(0, 1, batch).astype(np.float32),
        "guidance": rng.uniform(1, 5, batch).astype(np.float32),
    }


def run_reference(model, config: TransformerConfig, inputs: dict) -> np.ndarray:
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    with torch.no_grad():
        out = model(
            hidden_states=inputs["tokens"],
            encoder_hidden_states=inputs["text"],
            pooled_projections=inputs["pooled"],
            timestep=inputs["sigma"],
            img_ids=inputs["positions"][0],
            txt_ids=torch.zeros(inputs["text"].shape[1], 3),
            guidance=inputs["guidance"] if config.guidance_embeds else None,
            return_dict=False,
        )[0]
    return out.numpy()


def run(config: TransformerConfig, params, inputs: dict, **more) -> np.ndarray:
    inputs = {name: jnp.asarray(value) for name, value in (inputs | more).items()}
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(FluxTransformer(config).apply)
        return np.asarray(apply({"params": params}, **inputs))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "grid", "words"),
    [
        ("guidance", (3, 5), 7), ("no guidance", (5, 3), 4), ("more double blocks", (2, 70), 1),
        ("picture", (3, 4), 5), ("fill", (4, 3), 5),
    ],
)  # fmt: skip
def test_equals_diffusers(name: str, grid: tuple[int, int], words: int, batch: int):
    config = CONFIGS[name]
    model = reference(config, seed=1)
    inputs = random_inputs(config, batch, grid, words, seed=2)
    expected = run_reference(model, config, inputs)
    got = run(config, from_state("transformer", numpy_state(model), config), inputs)
    assert got.shape == (batch, grid[0] * grid[1], config.out_channels)
    error = relative_error(got, expected)
    print(f"{name}, batch {batch}: relative error {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("garbage", [np.nan, 7.0])
def test_padding_equals_diffusers_without_it(garbage: float):
    config = CONFIGS["guidance"]
    model = reference(config, seed=3)
    inputs = random_inputs(config, 3, (3, 5), 7, seed=4)
    expected = run_reference(model, config, inputs)
    # Padding in the middle and at the end: only the mask marks it, not the position.
    token_index = np.setdiff1d(np.arange(20), [3, 11, 17, 18, 19])
    valid = np.zeros((3, 20), bool)
    valid[:, token_index] = True
    padded = {}
    for key in ("tokens", "positions"):
        padded[key] = np.full((3, 20, inputs[key].shape[-1]), garbage, np.float32)
        padded[key][:, token_index] = inputs[key]
    got = run(
        config, from_state("transformer", numpy_state(model), config), inputs | padded, valid=valid
    )
    error = relative_error(got[:, token_index], expected)
    print(f"padding of {garbage}: relative error {error:.1e}")
    assert error < TOLERANCE
    assert not got[~valid].any()


@pytest.mark.parametrize("guidance", [True, False])
def test_full_size_names_and_shapes(guidance: bool):
    config = TransformerConfig(guidance_embeds=guidance)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=guidance)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = leaf_shapes(param_shapes.transformer(config))
    assert expected_sources(transformer_rules(config), shapes) == expected
    count = 11_901_408_320 if guidance else 11_891_178_560
    assert sum(value.numel() for value in model.parameters()) == count


def test_diffusers_loads_written_folders(small, tmp_path):
    """The tensors that diffusers' pipeline loads from a written folder equal ours bit for bit."""
    write_folder(small, tmp_path / "folder", shard_bytes=100_000)
    # The tokenizers are copied unchanged, and transformers' classes reject the small ones.
    pipeline = diffusers.FluxPipeline.from_pretrained(
        tmp_path / "folder", tokenizer=None, tokenizer_2=None
    )
    assert pipeline.scheduler.config.base_shift == small.config.base_shift
    for component in COMPONENTS:
        files = weight_files(tmp_path / "folder" / component.folder, component.stem)
        weights = Weights(scan_all(files))
        loaded = getattr(pipeline, component.folder).state_dict()
        names = canonical_names(loaded, component.aliases)
        assert weights.shapes.keys() <= names.keys()
        for name in weights.shapes:
            np.testing.assert_array_equal(loaded[names[name]].numpy(), weights.read(name))
        extra = names.keys() - weights.shapes.keys()
        assert extra <= set(component.ignored)
