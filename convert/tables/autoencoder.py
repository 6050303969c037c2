"""Rule table of the autoencoder: diffusers' names on one side, our parameter tree on the other."""

from __future__ import annotations

from jitjax.config import AutoencoderConfig

from .engine import Rule

AUTOENCODER_IGNORED: tuple[str, ...] = ()
"""Tensors in an autoencoder's file that carry nothing."""


def norm(target: str, source: str) -> list[Rule]:
    """Scale and bias of one group norm."""
    return [
        Rule(f"{target}/scale", (f"{source}.weight",)),
        Rule(f"{target}/bias", (f"{source}.bias",)),
    ]


def conv(target: str, source: str) -> list[Rule]:
    """Kernel and bias of one convolution."""
    return [
        Rule(f"{target}/kernel", (f"{source}.weight",), "conv"),
        Rule(f"{target}/bias", (f"{source}.bias",)),
    ]


def resnet(target: str, source: str, shortcut: bool = False) -> list[Rule]:
    """One residual block; `shortcut` where it changes the width."""
    return [
        *norm(f"{target}/norm1", f"{source}.norm1"),
        *conv(f"{target}/conv1", f"{source}.conv1"),
        *norm(f"{target}/norm2", f"{source}.norm2"),
        *conv(f"{target}/conv2", f"{source}.conv2"),
        *(conv(f"{target}/shortcut", f"{source}.conv_shortcut") if shortcut else []),
    ]


def mid(target: str, source: str) -> list[Rule]:
    """Resnet, attention, resnet at the lowest resolution."""
    attention = f"{source}.attentions.0"
    qkv = [f"{attention}.to_{name}" for name in "qkv"]
    return [
        *resnet(f"{target}/resnet_0", f"{source}.resnets.0"),
        *norm(f"{target}/attention/norm", f"{attention}.group_norm"),
        Rule(f"{target}/attention/qkv/kernel", tuple(f"{s}.weight" for s in qkv), "fused"),
        Rule(f"{target}/attention/qkv/bias", tuple(f"{s}.bias" for s in qkv), "fused_bias"),
        Rule(f"{target}/attention/out/kernel", (f"{attention}.to_out.0.weight",), "linear"),
        Rule(f"{target}/attention/out/bias", (f"{attention}.to_out.0.bias",)),
        *resnet(f"{target}/resnet_1", f"{source}.resnets.1"),
    ]


def half(name: str, widths: tuple[int, ...], resnets: int, level: str, resample: str) -> list[Rule]:
    """Encoder or decoder: what they have in common, and the levels in the order they run.

    Args:
        name: "encoder" or "decoder".
        widths: width of each level.
        resnets: blocks per level.
        level: "down" or "up".
        resample: "downsample" or "upsample", after every level but the last.
    """
    rules = [
        *conv(f"{name}/conv_in", f"{name}.conv_in"),
        *mid(f"{name}/mid", f"{name}.mid_block"),
        *norm(f"{name}/norm_out", f"{name}.conv_norm_out"),
        *conv(f"{name}/conv_out", f"{name}.conv_out"),
    ]
    before = widths[0]
    for i, width in enumerate(widths):
        target, source = f"{name}/{level}_{i}", f"{name}.{level}_blocks.{i}"
        for j in range(resnets):
            shortcut = j == 0 and width != before
            rules += resnet(f"{target}/resnet_{j}", f"{source}.resnets.{j}", shortcut)
        if i + 1 < len(widths):
            rules += conv(f"{target}/{resample}", f"{source}.{resample}rs.0.conv")
        before = width
    return rules


def autoencoder_rules(config: AutoencoderConfig) -> list[Rule]:
    """diffusers `AutoencoderKL` -> `jitjax.models.autoencoder.Autoencoder`."""
    widths, layers = config.block_out_channels, config.layers_per_block
    return [
        *half("encoder", widths, layers, "down", "downsample"),
        *half("decoder", widths[::-1], layers + 1, "up", "upsample"),
    ]
