"""Recognises the models in a file by their tensor names, and infers configurations from shapes.

A file contains one model or several, each with a prefix (ComfyUI's whole checkpoints have
`model.diffusion_model.`, `vae.`, `text_encoders.t5xxl.transformer.`). Each layout has a marker, the
name of a tensor that no other layout has; it identifies both the model and the layout. Aliases of
names (see `Component.aliases`) are no layouts of their own.

Configurations are inferred from shapes that are checked first: `_axes` raises for a tensor that is
absent, has another number of axes, or is empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
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
        config: infers the configuration from canonical name (without prefix) -> shape. Raises
            `KeyError` for a missing tensor, `ValueError` for a shape that no such model has.
        parts: returns the table of original names for a configuration; None if the layout has the
            names of the rule table.
        ignored: tensors that need no rule, in addition to those of the component.
        marker_aliases: the marker, or another tensor that no other layout has, under the aliases of
            the component.
    """

    title: str
    model: str
    marker: str
    config: Callable[[Shapes], Any]
    parts: Callable[[Any], dict[str, Part]] | None = None
    ignored: tuple[str, ...] = ()
    marker_aliases: tuple[str, ...] = ()

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """Return the prefixes under which a file has models of this layout."""
        found = {}
        # Longest first: "text_model.X" is the marker X with prefix "text_model." only if there is
        # no marker "text_model.X".
        markers = sorted((self.marker, *self.marker_aliases), key=len, reverse=True)
        for name in names:
            for marker in markers:
                if name == marker or name.endswith(f".{marker}"):
                    found[name.removesuffix(marker)] = None
                    break
        return list(found)


def _axes(shapes: Shapes, name: str, count: int) -> Shape:
    """Return the shape of a tensor that must have `count` axes, none of them empty."""
    shape = shapes[name]
    if len(shape) != count or not all(shape):
        raise ValueError(f"{name} has shape {list(shape)}; expected {count} non-empty axes")
    return shape


def _heads(name: str, width: int, head_dim: int) -> int:
    """Return the number of heads. Raises `ValueError` if the width is no multiple of a head's."""
    if width % head_dim:
        raise ValueError(f"{name} has width {width}; expected a multiple of a head's {head_dim}")
    return width // head_dim


def _count(shapes: Shapes, pattern: str) -> int:
    """Count the different values of the pattern's group among the names."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _transformer(shapes: Shapes, image: str, out: str, text: str, pooled: str, norm: str,
                 guidance: str, double: str, single: str) -> TransformerConfig:  # fmt: skip
    hidden, channels = _axes(shapes, image, 2)
    (head_dim,) = _axes(shapes, norm, 1)
    if head_dim % 32:
        raise ValueError(f"{norm} has shape [{head_dim}]; expected a multiple of 32 (FLUX.1: 128)")
    return TransformerConfig(
        in_channels=channels,
        out_channels=_axes(shapes, out, 2)[0],
        num_layers=_count(shapes, rf"{double}\.(\d+)\."),
        num_single_layers=_count(shapes, rf"{single}\.(\d+)\."),
        attention_head_dim=head_dim,
        num_attention_heads=_heads(image, hidden, head_dim),
        joint_attention_dim=_axes(shapes, text, 2)[1],
        pooled_projection_dim=_axes(shapes, pooled, 2)[1],
        guidance_embeds=guidance in shapes,
        # No tensor has the split of a head among the three axes; FLUX.1 has 16, 56 and 56.
        axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
    )


def original_transformer(shapes: Shapes) -> TransformerConfig:
    """Infer the configuration from the shapes in a file of the original release."""
    return _transformer(
        shapes, "img_in.weight", "final_layer.linear.weight", "txt_in.weight",
        "vector_in.in_layer.weight", "double_blocks.0.img_attn.norm.query_norm.scale",
        "guidance_in.in_layer.weight", "double_blocks", "single_blocks",
    )  # fmt: skip


def diffusers_transformer(shapes: Shapes) -> TransformerConfig:
    """Infer the configuration from the shapes in a diffusers file."""
    embed = "time_text_embed.{}_embedder.linear_1.weight"
    return _transformer(
        shapes, "x_embedder.weight", "proj_out.weight", "context_embedder.weight",
        embed.format("text"), "transformer_blocks.0.attn.norm_q.weight",
        embed.format("guidance"), "transformer_blocks", "single_transformer_blocks",
    )  # fmt: skip


def _autoencoder(shapes: Shapes, level: str, block: str) -> AutoencoderConfig:
    levels = _count(shapes, level.format(r"(\d+)"))
    widths = tuple(_axes(shapes, f"{block.format(i, 0)}.conv2.weight", 4)[0] for i in range(levels))
    layers = _count(shapes, re.escape(block.format(0, "@")).replace("@", r"(\d+)"))
    return AutoencoderConfig(
        in_channels=_axes(shapes, "encoder.conv_in.weight", 4)[1],
        out_channels=_axes(shapes, "decoder.conv_out.weight", 4)[0],
        latent_channels=_axes(shapes, "decoder.conv_in.weight", 4)[1],
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
    relative_bias = f"{block}.0.SelfAttention.relative_attention_bias.weight"
    query = f"{block}.0.SelfAttention.q.weight"
    buckets, heads = _axes(shapes, relative_bias, 2)
    heads_width, d_model = _axes(shapes, query, 2)
    return T5Config(
        vocab_size=_axes(shapes, "shared.weight", 2)[0],
        d_model=d_model,
        d_kv=_heads(query, heads_width, heads),
        d_ff=_axes(shapes, f"{block}.1.DenseReluDense.wi_0.weight", 2)[0],
        num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def clip_encoder(shapes: Shapes) -> CLIPConfig:
    """Infer the configuration from the shapes in a file of a CLIP text model.

    The width of a head is 64, as in every CLIP.
    """
    embeddings = "text_model.embeddings"
    vocab, hidden = _axes(shapes, f"{embeddings}.token_embedding.weight", 2)
    mlp = "text_model.encoder.layers.0.mlp.fc1.weight"
    return CLIPConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_axes(shapes, mlp, 2)[0],
        num_hidden_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads("token_embedding.weight", hidden, min(64, hidden)),
        max_position_embeddings=_axes(shapes, f"{embeddings}.position_embedding.weight", 2)[0],
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
        marker_aliases=("enc.blk.0.attn_q.weight",),
    ),
    Layout(
        "CLIP text model",
        "clip",
        "text_model.embeddings.token_embedding.weight",
        clip_encoder,
        marker_aliases=("embeddings.token_embedding.weight",),
    ),
)


NO_WEIGHTS = re.compile(r"(^|\.)(logit_scale|text_projection(\.weight)?|scaled_fp8|spiece_model)$")
"""Tensors beside the models that are no weights of any: ComfyUI keeps some above the encoders."""


@dataclass(frozen=True)
class RecognisedModel:
    """A model in a file.

    Attributes:
        layout: its layout.
        prefix: what its names in the file begin with.
        names: tensor name without prefix -> name in the file.
    """

    layout: Layout
    prefix: str
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
        for prefix in layout.prefixes(shapes):
            names = {n.removeprefix(prefix): n for n in shapes if n.startswith(prefix)}
            models.append(RecognisedModel(layout, prefix, names))
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
    return RecognisedModel(model.layout, model.prefix, names)


def stray_names(names: Iterable[str], models: Iterable[RecognisedModel]) -> list[str]:
    """Return the names in a file that belong to none of its models and may be weights."""
    known = {stored for model in models for stored in model.names.values()}
    return [name for name in names if name not in known and not NO_WEIGHTS.search(name)]


def misfits(shapes: Shapes, layout: Layout) -> list[str]:
    """Compare the names in a file with a layout's, not counting block numbers.

    For files whose configuration cannot be inferred, which alone gives the expected shapes.

    Args:
        shapes: canonical name -> shape of every tensor of the file.
        layout: the layout.
    """
    optional = re.compile(r"guidance_(in|embedder)\.")  # FLUX.1-schnell has none
    component = component_of(layout.model)
    ignored = {_without_numbers(name) for name in (*component.ignored, *layout.ignored)}
    expected = {_without_numbers(name): name for name in full_size_names(layout)}
    available = {_without_numbers(name) for name in shapes}
    unmatched = [f"unmatched key: {n}" for n in shapes
                 if _without_numbers(n) not in expected.keys() | ignored]  # fmt: skip
    missing = [f"missing key: {name}" for numberless, name in expected.items()
               if numberless not in available and not optional.search(name)]  # fmt: skip
    return unmatched + missing


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _closest_layout(shapes: Shapes) -> str:
    """Describe the layout that shares most names with the file, not counting block numbers."""
    names = {_without_numbers(name) for name in shapes}
    closest, most_shared = LAYOUTS[0], -1
    for layout in LAYOUTS:
        known = {_without_numbers(name) for name in full_size_names(layout)}
        shared = sum(any(n == k or n.endswith(f".{k}") for k in known) for n in names)
        if shared > most_shared:
            closest, most_shared = layout, shared
    first_names = ", ".join(sorted(shapes)[:5]) or "(none)"
    return (
        f"the closest layout is {closest.title!r}: it shares {most_shared} of {len(names)} names "
        f"(not counting block numbers) but lacks {closest.marker!r}; the file's first names are "
        f"{first_names}"
    )


def full_size_names(layout: Layout) -> dict[str, Shape]:
    """Return name -> shape of FLUX.1-dev's tensors in a layout."""
    component = component_of(layout.model)
    config = component.config()
    shapes = component.source_shapes(config)
    return original_shapes(layout.parts(config), shapes) if layout.parts else shapes
