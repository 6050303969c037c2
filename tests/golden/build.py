"""Small random pipelines for tests, and paths of the recordings of the authors' program."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jitjax.checkpoint import FluxParams, abstract_params
from jitjax.config import (
    AutoencoderConfig,
    CLIPConfig,
    FluxConfig,
    T5Config,
    TransformerConfig,
)

HERE = Path(__file__).parent
RECORDINGS = ("jit_7x_16x16", "jit_4x_16x24")
TRANSFORMER = HERE / "flux_random_transformer.safetensors"
WORDS = [
    "a",
    "red",
    "blue",
    "large",
    "small",
    "circle",
    "square",
    "left",
    "right",
    "of",
    "the",
    "and",
    "on",
    "plain",
    "grey",
    "background",
]


SMALL = FluxConfig(
    transformer=TransformerConfig(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    ),
    t5=T5Config(vocab_size=40, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2),
    clip=CLIPConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=1,
    ),
    autoencoder=AutoencoderConfig(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
    ),
    text_length=12,
    image_size=64,
)


def random_tree(shapes: Any, seed: int) -> Any:
    """Draw random arrays for a tree of `jax.ShapeDtypeStruct`s.

    Their standard deviation is 1/sqrt(input width), and 1/2 for vectors, so that activations have
    magnitudes near 1.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        width = leaf.shape[-2] if len(leaf.shape) > 1 else 4
        # Not by jax.numpy, which compiles a program for every shape.
        values = rng.normal(size=leaf.shape) / np.sqrt(width)
        return jax.device_put(values.astype(leaf.dtype))

    return jax.tree.map(draw, shapes)


def write_tokenizers(folder: Path) -> None:
    """Write a word tokenizer for each text encoder, in the layout of a diffusers folder."""
    for name, special in (("tokenizer", ["<|startoftext|>", "<|endoftext|>"]),
                          ("tokenizer_2", ["<pad>", "</s>"])):  # fmt: skip
        vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        is_clip = name == "tokenizer"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A {special[1]}" if is_clip else f"$A {special[1]}",
            special_tokens=[(token, i) for i, token in enumerate(special)],
        )
        (folder / name).mkdir(parents=True)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        settings = {
            "tokenizer_class": "CLIPTokenizer" if is_clip else "T5Tokenizer",
            "model_max_length": 16 if is_clip else 12,
            "pad_token": special[1] if is_clip else special[0],
            "eos_token": special[1],
            "unk_token": "<unk>",
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))


def small_params(folder: Path, seed: int = 0) -> FluxParams:
    """Return a random pipeline with configuration `SMALL`; write its tokenizers to `folder`."""
    write_tokenizers(folder)
    shapes = abstract_params(SMALL)
    random = random_tree(shapes, seed)
    return FluxParams(
        random.transformer, random.t5, random.clip, random.autoencoder, SMALL, str(folder)
    )


def with_input_channels(params: FluxParams, channels: int, seed: int = 1) -> FluxParams:
    """Return a pipeline with another random transformer, of so many input channels."""
    transformer = dataclasses.replace(
        params.config.transformer, in_channels=channels, out_channels=64
    )
    config = dataclasses.replace(params.config, transformer=transformer)
    random = random_tree(abstract_params(config).transformer, seed)
    return dataclasses.replace(params, transformer=random, config=config)
