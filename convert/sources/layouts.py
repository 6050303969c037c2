"""Which models a safetensors file holds, under which names, and their configurations from shapes.

A file may hold one model or several, each under a prefix of its own (ComfyUI's whole checkpoints
have `model.diffusion_model.`, `vae.`, `text_encoders.t5xxl.transformer.`). One tensor that only
this model and layout has gives both away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config, TransformerConfig

from ..components import component_of
from ..tables.engine import Shape
from ..tables.original import Part, autoencoder_parts, original_shapes, transformer_parts

Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Layout:
    """Names that a model may have in a single file.

    Attributes:
        title: for messages.
        model: field in `FluxParams`.
        mark: a name that no other layout has.
        config: configuration from the shapes of the tensors (names without their prefix).
        parts: table of the original release, or None where the names are those of the rules.
        ignored: tensors that carry nothing, beside those of the rules' own table.
    """

    title: str
    model: str
    mark: str
    config: Callable[[Shapes], Any]
    parts: Callable[[Any], dict[str, Part]] | None = None
    ignored: tuple[str, ...] = ()


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the pattern's group takes."""
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})


def _transformer(shapes: Shapes, image: str, text: str, pooled: str, norm: str, guidance: str,
                 double: str, single: str) -> TransformerConfig:  # fmt: skip
    hidden, channels = shapes[image]
    width = shapes[norm][0]
    return TransformerConfig(
        in_channels=channels,
        num_layers=_count(shapes, rf"{double}\.(\d+)\."),
        num_single_layers=_count(shapes, rf"{single}\.(\d+)\."),
        attention_head_dim=width,
        num_attention_heads=hidden // width,
        joint_attention_dim=shapes[text][1],
        pooled_projection_dim=shapes[pooled][1],
        guidance_embeds=guidance in shapes,
        # No tensor tells how a head is shared among the axes: as in FLUX.1, 16 to 56 to 56.
        axes_dims_rope=(width // 8, width * 7 // 16, width * 7 // 16),
    )


def original_transformer(shapes: Shapes) -> TransformerConfig:
    """From the shapes of the original release."""
    return _transformer(
        shapes, "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale", "guidance_in.in_layer.weight",
        "double_blocks", "single_blocks",
    )  # fmt: skip


def diffusers_transformer(shapes: Shapes) -> TransformerConfig:
    """From the shapes of diffusers' file."""
    embed = "time_text_embed.{}_embedder.linear_1.weight"
    return _transformer(
        shapes, "x_embedder.weight", "context_embedder.weight", embed.format("text"),
        "transformer_blocks.0.attn.norm_q.weight", embed.format("guidance"),
        "transformer_blocks", "single_transformer_blocks",
    )  # fmt: skip


def _autoencoder(shapes: Shapes, level: str, block: str) -> AutoencoderConfig:
    levels = _count(shapes, level.format(r"(\d+)"))
    widths = tuple(shapes[f"{block.format(i, 0)}.conv2.weight"][0] for i in range(levels))
    layers = _count(shapes, re.escape(block.format(0, "@")).replace("@", r"(\d+)"))
    return AutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=widths,
        layers_per_block=layers,
    )


def original_autoencoder(shapes: Shapes) -> AutoencoderConfig:
    """From the shapes of the original release; the latents' shift and scale are FLUX's."""
    return _autoencoder(shapes, r"encoder\.down\.{}\.", "encoder.down.{}.block.{}")


def diffusers_autoencoder(shapes: Shapes) -> AutoencoderConfig:
    """From the shapes of diffusers' file; the latents' shift and scale are FLUX's."""
    return _autoencoder(shapes, r"encoder\.down_blocks\.{}\.", "encoder.down_blocks.{}.resnets.{}")


def t5_encoder(shapes: Shapes) -> T5Config:
    """From the shapes of an encoder's file."""
    block = "encoder.block.0.layer"
    buckets, heads = shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"]
    inner, model = shapes[f"{block}.0.SelfAttention.q.weight"]
    table = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    return T5Config(
        vocab_size=shapes[table][0],
        d_model=model,
        d_kv=inner // heads,
        d_ff=shapes[f"{block}.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def clip_encoder(shapes: Shapes) -> CLIPConfig:
    """From the shapes of a text model's file; heads are 64 wide, as in every CLIP."""
    embeddings = "text_model.embeddings"
    vocab, hidden = shapes[f"{embeddings}.token_embedding.weight"]
    return CLIPConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=shapes[f"{embeddings}.position_embedding.weight"][0],
    )


LAYOUTS = (
    Layout(
        "FLUX transformer, original release",
        "transformer",
        "double_blocks.0.img_attn.qkv.weight",
        original_transformer,
        transformer_parts,
    ),
    Layout(
        "FLUX transformer, diffusers",
        "transformer",
        "single_transformer_blocks.0.attn.to_q.weight",
        diffusers_transformer,
    ),
    Layout(
        "autoencoder, original release",
        "autoencoder",
        "encoder.down.0.block.0.conv1.weight",
        original_autoencoder,
        autoencoder_parts,
    ),
    Layout(
        "autoencoder, diffusers",
        "autoencoder",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        diffusers_autoencoder,
    ),
    Layout(
        "T5 encoder",
        "t5",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        t5_encoder,
        ignored=("spiece_model",),
    ),
    Layout(
        "CLIP text model",
        "clip",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        clip_encoder,
        # The projection and temperature of CLIP's loss; FLUX takes the pooled state before them.
        ignored=("text_projection.weight", "logit_scale"),
    ),
)


@dataclass(frozen=True)
class Found:
    """A model in a file: its layout, and its tensors' names without prefix -> names in the file."""

    layout: Layout
    names: Mapping[str, str]


def recognise(shapes: Shapes, what: str) -> list[Found]:
    """The models in a file, by the names of its tensors.

    Args:
        shapes: name -> shape of every tensor of the file.
        what: the file, for messages.

    Raises:
        ValueError: no model of FLUX is recognised; the message names the nearest layout.
    """
    found = []
    for layout in LAYOUTS:
        ends = [n for n in shapes if n == layout.mark or n.endswith(f".{layout.mark}")]
        for end in ends:
            prefix = end.removesuffix(layout.mark)
            names = {n.removeprefix(prefix): n for n in shapes if n.startswith(prefix)}
            found.append(Found(layout, names))
    if not found:
        raise ValueError(f"{what} holds no model of FLUX that is known; {_nearest(shapes)}")
    return [_own(one, found) for one in found]


def _own(one: Found, found: list[Found]) -> Found:
    """Without the tensors of models under longer prefixes ("" is a prefix of them all)."""
    others = [set(f.names.values()) for f in found if len(f.names) < len(one.names)]
    taken = set().union(*others)
    return Found(one.layout, {k: v for k, v in one.names.items() if v not in taken})


def _nearest(shapes: Shapes) -> str:
    """The layout with most of the file's names, numbers aside."""
    names = {re.sub(r"\d+", "0", name) for name in shapes}
    best, most = LAYOUTS[0], -1
    for layout in LAYOUTS:
        known = {re.sub(r"\d+", "0", name) for name in full_size_names(layout)}
        shared = sum(any(n == k or n.endswith(f".{k}") for k in known) for n in names)
        if shared > most:
            best, most = layout, shared
    listed = ", ".join(sorted(shapes)[:5]) or "(none)"
    return (
        f"nearest is {best.title!r}, which has {most} of {len(names)} kinds of names and always "
        f"{best.mark!r}; the file begins with {listed}"
    )


def full_size_names(layout: Layout) -> dict[str, Shape]:
    """Names and shapes of FLUX.1-dev's tensors in a layout."""
    component = component_of(layout.model)
    config = component.config()
    shapes = component.source_shapes(config)
    return original_shapes(layout.parts(config), shapes) if layout.parts else shapes
