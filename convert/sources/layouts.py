"""Recognises the models in a file by their tensor names, and infers configurations from shapes.

A file contains one model or several, each with a prefix (ComfyUI's whole checkpoints have
`model.diffusion_model.`, `vae.`, `text_encoders.t5xxl.transformer.`). Each layout has a marker, the
name of a tensor that no other layout has; it identifies both the model and the layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jitjax.config import AutoencoderConfig, CLIPConfig, T5Config, TransformerConfig

from ..components import component_of
from ..original import Part, autoencoder_parts, original_shapes, transformer_parts
from ..tables.engine import Shape

Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Layout:
    """A naming scheme of a model's tensors in a single file.

    Attributes:
        title: name of the layout in messages.
        model: field in `FluxParams`.
        marker: name of a tensor that no other layout has.
        config: infers the configuration from name (without prefix) -> shape.
        parts: returns the table of original names for a configuration; None if the layout has the
            names of the rule table.
        ignored: tensors that need no rule, in addition to those of the component.
    """

    title: str
    model: str
    marker: str
    config: Callable[[Shapes], Any]
    parts: Callable[[Any], dict[str, Part]] | None = None
    ignored: tuple[str, ...] = ()


def _count(shapes: Shapes, pattern: str) -> int:
    """Count the different values of the pattern's group among the names."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _transformer(shapes: Shapes, image: str, text: str, pooled: str, norm: str, guidance: str,
                 double: str, single: str) -> TransformerConfig:  # fmt: skip
    hidden, channels = shapes[image]
    head_dim = shapes[norm][0]
    return TransformerConfig(
        in_channels=channels,
        num_layers=_count(shapes, rf"{double}\.(\d+)\."),
        num_single_layers=_count(shapes, rf"{single}\.(\d+)\."),
        attention_head_dim=head_dim,
        num_attention_heads=hidden // head_dim,
        joint_attention_dim=shapes[text][1],
        pooled_projection_dim=shapes[pooled][1],
        guidance_embeds=guidance in shapes,
        # No tensor has the split of a head among the three axes; FLUX.1 has 16, 56 and 56.
        axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
    )


def original_transformer(shapes: Shapes) -> TransformerConfig:
    """Infer the configuration from the shapes in a file of the original release."""
    return _transformer(
        shapes, "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale", "guidance_in.in_layer.weight",
        "double_blocks", "single_blocks",
    )  # fmt: skip


def diffusers_transformer(shapes: Shapes) -> TransformerConfig:
    """Infer the configuration from the shapes in a diffusers file."""
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
    """Infer the configuration from the shapes in a file of the original release.

    The shift and scale of the latents are FLUX's.
    """
    return _autoencoder(shapes, r"encoder\.down\.{}\.", "encoder.down.{}.block.{}")


def diffusers_autoencoder(shapes: Shapes) -> AutoencoderConfig:
    """Infer the configuration from the shapes in a diffusers file.

    The shift and scale of the latents are FLUX's.
    """
    return _autoencoder(shapes, r"encoder\.down_blocks\.{}\.", "encoder.down_blocks.{}.resnets.{}")


def t5_encoder(shapes: Shapes) -> T5Config:
    """Infer the configuration from the shapes in a file of a T5 encoder."""
    block = "encoder.block.0.layer"
    buckets, heads = shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"]
    heads_width, d_model = shapes[f"{block}.0.SelfAttention.q.weight"]
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    return T5Config(
        vocab_size=shapes[embedding][0],
        d_model=d_model,
        d_kv=heads_width // heads,
        d_ff=shapes[f"{block}.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def clip_encoder(shapes: Shapes) -> CLIPConfig:
    """Infer the configuration from the shapes in a file of a CLIP text model.

    The width of a head is 64, as in every CLIP.
    """
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
        # Projection and temperature of CLIP's loss; FLUX uses the pooled state before them.
        ignored=("text_projection.weight", "logit_scale"),
    ),
)


@dataclass(frozen=True)
class RecognisedModel:
    """A model in a file.

    Attributes:
        layout: its layout.
        names: tensor name without prefix -> name in the file.
    """

    layout: Layout
    names: Mapping[str, str]


def recognise(shapes: Shapes, label: str) -> list[RecognisedModel]:
    """Recognise the models in a file by the names of its tensors.

    Args:
        shapes: name -> shape of every tensor of the file.
        label: name of the file, for the error message.

    Raises:
        ValueError: the file contains no model of FLUX; the message names the closest layout.
    """
    models = []
    for layout in LAYOUTS:
        markers = [n for n in shapes if n == layout.marker or n.endswith(f".{layout.marker}")]
        for marker in markers:
            prefix = marker.removesuffix(layout.marker)
            names = {n.removeprefix(prefix): n for n in shapes if n.startswith(prefix)}
            models.append(RecognisedModel(layout, names))
    if not models:
        raise ValueError(f"{label} contains no known model of FLUX; {_closest_layout(shapes)}")
    return [_without_nested_models(model, models) for model in models]


def _without_nested_models(
    model: RecognisedModel, models: list[RecognisedModel]
) -> RecognisedModel:
    """Remove the tensors of models with longer prefixes ("" is a prefix of every name)."""
    nested = [set(m.names.values()) for m in models if len(m.names) < len(model.names)]
    excluded = set().union(*nested)
    names = {name: stored for name, stored in model.names.items() if stored not in excluded}
    return RecognisedModel(model.layout, names)


def _closest_layout(shapes: Shapes) -> str:
    """Describe the layout that shares most names with the file, not counting block numbers."""
    names = {re.sub(r"\d+", "0", name) for name in shapes}
    closest, most_shared = LAYOUTS[0], -1
    for layout in LAYOUTS:
        known = {re.sub(r"\d+", "0", name) for name in full_size_names(layout)}
        shared = sum(any(n == k or n.endswith(f".{k}") for k in known) for n in names)
        if shared > most_shared:
            closest, most_shared = layout, shared
    first_names = ", ".join(sorted(shapes)[:5]) or "(none)"
    return (
        f"the closest layout is {closest.title!r}: it shares {most_shared} of {len(names)} names "
        f"(not counting block numbers) and requires {closest.marker!r}; the file's first names "
        f"are {first_names}"
    )


def full_size_names(layout: Layout) -> dict[str, Shape]:
    """Return name -> shape of FLUX.1-dev's tensors in a layout."""
    component = component_of(layout.model)
    config = component.config()
    shapes = component.source_shapes(config)
    return original_shapes(layout.parts(config), shapes) if layout.parts else shapes
