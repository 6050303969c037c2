"""Tables from diffusers tensor names to those of the original release (Black Forest Labs' files).

The original files have the same weights with four differences: other names, fused layers (`qkv`,
`linear1`), one layer with its two halves swapped, and the autoencoder's attention as 1 x 1
convolutions. A table gives for each diffusers tensor the rows of the original tensor that it
consists of, so one set of rule tables serves both layouts. The same tables split low-rank updates
that were trained on the original names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jitjax.config import AutoencoderConfig, TransformerConfig

from .tables.engine import Shape

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """The part of an original tensor that one diffusers tensor consists of.

    Attributes:
        source: name of the original tensor.
        rows: (start, stop) ranges of its rows, concatenated in this order; None for all rows.
        tail: trailing axes of length 1 that only the original tensor has.
    """

    source: str
    rows: Rows | None = None
    tail: Shape = ()


def original_shapes(parts: Mapping[str, Part], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return name -> shape of the original tensors.

    Args:
        parts: diffusers name -> part of an original tensor.
        shapes: diffusers name -> shape.

    Raises:
        ValueError: the table omits rows of an original tensor, or uses some twice.
    """
    out: dict[str, Shape] = {}
    used: dict[str, list[tuple[int, int]]] = {}
    for name, part in parts.items():
        rows = part.rows or ((0, shapes[name][0]),)
        used.setdefault(part.source, []).extend(rows)
        out[part.source] = (0, *shapes[name][1:], *part.tail)
    for source, ranges in used.items():
        end = 0
        for start, stop in sorted(ranges):
            if start != end:
                raise ValueError(f"rows {end} to {start} of {source} are not used exactly once")
            end = stop
        out[source] = (end, *out[source][1:])
    return out


def _layer(target: str, source: str, rows: Rows | None = None) -> dict[str, Part]:
    return {f"{target}.{kind}": Part(f"{source}.{kind}", rows) for kind in ("weight", "bias")}


def _norm(target: str, source: str) -> dict[str, Part]:
    return {f"{target}.weight": Part(f"{source}.scale")}


def transformer_parts(config: TransformerConfig) -> dict[str, Part]:
    """Return diffusers `FluxTransformer2DModel` name -> part of the original `Flux`."""
    h = config.hidden
    out: dict[str, Part] = {}
    embedders = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
    if not config.guidance_embeds:
        del embedders["guidance"]
    for name, source in embedders.items():
        target = f"time_text_embed.{name}_embedder"
        out |= _layer(f"{target}.linear_1", f"{source}.in_layer")
        out |= _layer(f"{target}.linear_2", f"{source}.out_layer")
    out |= _layer("x_embedder", "img_in") | _layer("context_embedder", "txt_in")
    for i in range(config.num_layers):
        target, source = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, norm, qkv, q_norm, k_norm, proj, mlp in (
            ("img", "norm1", "to_{}", "norm_q", "norm_k", "to_out.0", "ff"),
            (
                "txt",
                "norm1_context",
                "add_{}_proj",
                "norm_added_q",
                "norm_added_k",
                "to_add_out",
                "ff_context",
            ),
        ):
            attention = f"{source}.{stream}_attn"
            out |= _layer(f"{target}.{norm}.linear", f"{source}.{stream}_mod.lin")
            for j, letter in enumerate("qkv"):
                rows = ((j * h, (j + 1) * h),)
                out |= _layer(f"{target}.attn.{qkv.format(letter)}", f"{attention}.qkv", rows)
            out |= _norm(f"{target}.attn.{q_norm}", f"{attention}.norm.query_norm")
            out |= _norm(f"{target}.attn.{k_norm}", f"{attention}.norm.key_norm")
            out |= _layer(f"{target}.attn.{proj}", f"{attention}.proj")
            out |= _layer(f"{target}.{mlp}.net.0.proj", f"{source}.{stream}_mlp.0")
            out |= _layer(f"{target}.{mlp}.net.2", f"{source}.{stream}_mlp.2")
    for i in range(config.num_single_layers):
        target, source = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        out |= _layer(f"{target}.norm.linear", f"{source}.modulation.lin")
        for j, letter in enumerate("qkv"):
            rows = ((j * h, (j + 1) * h),)
            out |= _layer(f"{target}.attn.to_{letter}", f"{source}.linear1", rows)
        out |= _layer(f"{target}.proj_mlp", f"{source}.linear1", ((3 * h, 7 * h),))
        out |= _norm(f"{target}.attn.norm_q", f"{source}.norm.query_norm")
        out |= _norm(f"{target}.attn.norm_k", f"{source}.norm.key_norm")
        out |= _layer(f"{target}.proj_out", f"{source}.linear2")
    # The original layer returns (shift, scale), the diffusers layer (scale, shift).
    swapped = ((h, 2 * h), (0, h))
    out |= _layer("norm_out.linear", "final_layer.adaLN_modulation.1", swapped)
    return out | _layer("proj_out", "final_layer.linear")


def autoencoder_parts(config: AutoencoderConfig) -> dict[str, Part]:
    """Return diffusers `AutoencoderKL` name -> part of the original `AutoEncoder`."""
    out: dict[str, Part] = {}
    levels = len(config.block_out_channels)

    def resnet(target: str, source: str, shortcut: bool) -> dict[str, Part]:
        parts = {}
        for name in ("norm1", "conv1", "norm2", "conv2"):
            parts |= _layer(f"{target}.{name}", f"{source}.{name}")
        if shortcut:
            parts |= _layer(f"{target}.conv_shortcut", f"{source}.nin_shortcut")
        return parts

    for half, side, resample, layers in (
        ("encoder", "down", "downsample", config.layers_per_block),
        ("decoder", "up", "upsample", config.layers_per_block + 1),
    ):
        out |= _layer(f"{half}.conv_in", f"{half}.conv_in")
        out |= _layer(f"{half}.conv_norm_out", f"{half}.norm_out")
        out |= _layer(f"{half}.conv_out", f"{half}.conv_out")
        for j in range(2):
            out |= resnet(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", False)
        target, source = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        out |= _layer(f"{target}.group_norm", f"{source}.norm")
        projections = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        for name, original in projections.items():
            out[f"{target}.{name}.weight"] = Part(f"{source}.{original}.weight", tail=(1, 1))
            out[f"{target}.{name}.bias"] = Part(f"{source}.{original}.bias")
        widths = config.block_out_channels if half == "encoder" else config.block_out_channels[::-1]
        previous_width = widths[0]
        for i, width in enumerate(widths):
            # The original release counts the levels from the finest one in both halves.
            level = i if half == "encoder" else levels - 1 - i
            target, source = f"{half}.{side}_blocks.{i}", f"{half}.{side}.{level}"
            for j in range(layers):
                shortcut = j == 0 and width != previous_width
                out |= resnet(f"{target}.resnets.{j}", f"{source}.block.{j}", shortcut)
            if i + 1 < levels:
                out |= _layer(f"{target}.{resample}rs.0.conv", f"{source}.{resample}.conv")
            previous_width = width
    return out
