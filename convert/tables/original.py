"""Names of the original release (Black Forest Labs' single files) in terms of diffusers' names.

Their files hold the same numbers, some fused (`qkv`, `linear1`), one with its halves swapped, and
the autoencoder's attention as convolutions of 1 x 1. So a table says for each diffusers tensor
which rows of which original tensor it is, and the tables of rules serve both layouts. The same
table splits low-rank updates that were trained on these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jitjax.config import AutoencoderConfig, TransformerConfig

from .engine import Shape

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """What a diffusers tensor is in a file of the original release.

    Attributes:
        source: name of the original tensor.
        rows: ranges of its rows, one after another; None for all.
        tail: axes of length 1 that the original has beyond diffusers'.
    """

    source: str
    rows: Rows | None = None
    tail: Shape = ()


def original_shapes(parts: Mapping[str, Part], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the original tensors, given those of the diffusers tensors.

    Raises:
        ValueError: the table leaves out rows of a tensor, or uses some twice.
    """
    found: dict[str, Shape] = {}
    used: dict[str, list[tuple[int, int]]] = {}
    for name, part in parts.items():
        rows = part.rows or ((0, shapes[name][0]),)
        used.setdefault(part.source, []).extend(rows)
        found[part.source] = (0, *shapes[name][1:], *part.tail)
    for source, ranges in used.items():
        at = 0
        for start, stop in sorted(ranges):
            if start != at:
                raise ValueError(f"rows {at} to {start} of {source} are not used just once")
            at = stop
        found[source] = (at, *found[source][1:])
    return found


def _layer(target: str, source: str, rows: Rows | None = None) -> dict[str, Part]:
    return {f"{target}.{kind}": Part(f"{source}.{kind}", rows) for kind in ("weight", "bias")}


def _norm(target: str, source: str) -> dict[str, Part]:
    return {f"{target}.weight": Part(f"{source}.scale")}


def transformer_parts(config: TransformerConfig) -> dict[str, Part]:
    """diffusers `FluxTransformer2DModel` -> the original `Flux`."""
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
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
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
            attention = f"{theirs}.{stream}_attn"
            out |= _layer(f"{ours}.{norm}.linear", f"{theirs}.{stream}_mod.lin")
            for j, letter in enumerate("qkv"):
                rows = ((j * h, (j + 1) * h),)
                out |= _layer(f"{ours}.attn.{qkv.format(letter)}", f"{attention}.qkv", rows)
            out |= _norm(f"{ours}.attn.{q_norm}", f"{attention}.norm.query_norm")
            out |= _norm(f"{ours}.attn.{k_norm}", f"{attention}.norm.key_norm")
            out |= _layer(f"{ours}.attn.{proj}", f"{attention}.proj")
            out |= _layer(f"{ours}.{mlp}.net.0.proj", f"{theirs}.{stream}_mlp.0")
            out |= _layer(f"{ours}.{mlp}.net.2", f"{theirs}.{stream}_mlp.2")
    for i in range(config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        out |= _layer(f"{ours}.norm.linear", f"{theirs}.modulation.lin")
        for j, letter in enumerate("qkv"):
            rows = ((j * h, (j + 1) * h),)
            out |= _layer(f"{ours}.attn.to_{letter}", f"{theirs}.linear1", rows)
        out |= _layer(f"{ours}.proj_mlp", f"{theirs}.linear1", ((3 * h, 7 * h),))
        out |= _norm(f"{ours}.attn.norm_q", f"{theirs}.norm.query_norm")
        out |= _norm(f"{ours}.attn.norm_k", f"{theirs}.norm.key_norm")
        out |= _layer(f"{ours}.proj_out", f"{theirs}.linear2")
    # Theirs gives shift and scale in this order, diffusers scale and shift.
    swapped = ((h, 2 * h), (0, h))
    out |= _layer("norm_out.linear", "final_layer.adaLN_modulation.1", swapped)
    return out | _layer("proj_out", "final_layer.linear")


def autoencoder_parts(config: AutoencoderConfig) -> dict[str, Part]:
    """diffusers `AutoencoderKL` -> the original `AutoEncoder`."""
    out: dict[str, Part] = {}
    levels = len(config.block_out_channels)

    def resnet(target: str, source: str, shortcut: bool) -> dict[str, Part]:
        names = ("norm1", "conv1", "norm2", "conv2")
        found = {}
        for name in names:
            found |= _layer(f"{target}.{name}", f"{source}.{name}")
        if shortcut:
            found |= _layer(f"{target}.conv_shortcut", f"{source}.nin_shortcut")
        return found

    for half, side, resample, layers in (
        ("encoder", "down", "downsample", config.layers_per_block),
        ("decoder", "up", "upsample", config.layers_per_block + 1),
    ):
        out |= _layer(f"{half}.conv_in", f"{half}.conv_in")
        out |= _layer(f"{half}.conv_norm_out", f"{half}.norm_out")
        out |= _layer(f"{half}.conv_out", f"{half}.conv_out")
        for j in range(2):
            out |= resnet(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", False)
        attention, theirs = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        out |= _layer(f"{attention}.group_norm", f"{theirs}.norm")
        names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        for target, source in names.items():
            out[f"{attention}.{target}.weight"] = Part(f"{theirs}.{source}.weight", tail=(1, 1))
            out[f"{attention}.{target}.bias"] = Part(f"{theirs}.{source}.bias")
        widths = config.block_out_channels if half == "encoder" else config.block_out_channels[::-1]
        before = widths[0]
        for i, width in enumerate(widths):
            # The original counts its levels from the finest one in both halves.
            level = i if half == "encoder" else levels - 1 - i
            ours, theirs = f"{half}.{side}_blocks.{i}", f"{half}.{side}.{level}"
            for j in range(layers):
                shortcut = j == 0 and width != before
                out |= resnet(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", shortcut)
            if i + 1 < levels:
                out |= _layer(f"{ours}.{resample}rs.0.conv", f"{theirs}.{resample}.conv")
            before = width
    return out
