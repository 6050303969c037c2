"""Folders that diffusers and transformers save, read by the converter with equal values."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from common import randomised  # noqa: E402

import jitjax  # noqa: E402
from jitjax.convert.__main__ import main  # noqa: E402
from jitjax.convert.components import component_of, from_state  # noqa: E402
from jitjax.convert.sources.diffusers_folder import read_config  # noqa: E402
from jitjax.convert.sources.single_files import open_sources  # noqa: E402
from jitjax.loading import BUNDLED  # noqa: E402
from jitjax.text import tokenize  # noqa: E402

pytestmark = pytest.mark.parity

CLIP = transformers.CLIPTextConfig(
    vocab_size=40, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=23, bos_token_id=0, pad_token_id=1,
    eos_token_id=37, projection_dim=64, hidden_act="quick_gelu",
)  # fmt: skip
T5 = transformers.T5Config(
    vocab_size=40, d_model=24, d_kv=6, d_ff=16, num_layers=3, num_heads=2,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
VISION = transformers.CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    image_size=32, patch_size=16,
)  # fmt: skip
MODELS = {
    "transformer": (
        "transformer",
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=64,
            guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ),
    ),
    "transformer without guidance": (
        "transformer",
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=24, pooled_projection_dim=64,
            axes_dims_rope=(4, 2, 2),
        ),
    ),
    "vae": (
        "autoencoder",
        lambda: diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=4,
            norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    ),
    "clip": ("clip", lambda: transformers.CLIPTextModel(CLIP)),
    "clip with projection": ("clip", lambda: transformers.CLIPTextModelWithProjection(CLIP)),
    "t5": ("t5", lambda: transformers.T5EncoderModel(T5)),
}  # fmt: skip


def assert_equal(got, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def as_numpy(state) -> dict[str, np.ndarray]:
    """The tensors as float32, which holds every bfloat16 and float16 value."""
    return {name: value.float().numpy() for name, value in state.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize("name", MODELS)
def test_folder_of_one_model(tmp_path, name, shard, dtype):
    part, make = MODELS[name]
    model = randomised(make(), seed=3).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "5KB")
    params = open_sources(None, {part: tmp_path}, tokenizers=BUNDLED / "tiny").read()
    config = getattr(params.config, part)
    assert config == component_of(part).read_config(tmp_path / "config.json")
    tree = params.part(part)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {dtype}
    # `from_state` with these names is compared with torch's outputs by the tests of the models.
    expected = from_state(part, as_numpy(model.state_dict()), config)
    assert_equal(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree), expected)


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_whole_pipeline(tmp_path, shard):
    """A pipeline that diffusers loads, changes and saves: settings, tokenizers and all weights."""
    pipeline = diffusers.FluxPipeline.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.bfloat16)
    for number, model in enumerate(
        (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    ):
        randomised(model, seed=number)
    source, out = tmp_path / "source", tmp_path / "out"
    pipeline.save_pretrained(source, max_shard_size=shard)
    assert (source / "transformer/diffusion_pytorch_model.safetensors.index.json").exists() == (
        shard == "300KB"
    )
    assert main([str(source), "--dtype", "auto", "--out", str(out)]) == 0
    params, before = jitjax.load(out), jitjax.load("tiny")
    assert params.config == read_config(source) == before.config
    for part, model in (
        ("transformer", pipeline.transformer),
        ("autoencoder", pipeline.vae),
        ("clip", pipeline.text_encoder),
        ("t5", pipeline.text_encoder_2),
    ):
        expected = from_state(part, as_numpy(model.state_dict()), getattr(params.config, part))
        got = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params.part(part))
        assert_equal(got, expected)
    prompts = ["a large red circle", "a small blue striped star on a plain grey background"]
    for got, expected in zip(
        tokenize(params.tokenizer, prompts, params.config),
        tokenize(before.tokenizer, prompts, before.config),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_folder_of_a_whole_clip(tmp_path):
    """transformers' `CLIPModel`, as in `openai/clip-vit-large-patch14`: its text half is read."""
    config = transformers.CLIPConfig(
        text_config=CLIP.to_dict(), vision_config=VISION.to_dict(), projection_dim=64
    )
    model = transformers.CLIPModel(config)
    randomised(model.text_model, seed=4)
    model.save_pretrained(tmp_path)
    params = open_sources(None, {"clip": tmp_path}, tokenizers=BUNDLED / "tiny").read()
    state = as_numpy(model.state_dict())
    text = {name: value for name, value in state.items() if name.startswith("text_model.")}
    assert_equal(params.clip, from_state("clip", text, params.config.clip))
    assert params.config.clip.num_attention_heads == 2
