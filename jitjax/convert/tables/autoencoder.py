"""Rule table of the autoencoder: diffusers tensor names -> paths in our parameter tree."""

from __future__ import annotations

from jitjax.config import AutoencoderConfig

from .engine import Rule

AUTOENCODER_IGNORED: tuple[str, ...] = ()
"""Tensors of an autoencoder file that need no rule."""


def norm(target: str, source: str) -> list[Rule]:
    """Return the rules for scale and bias of one group norm."""
    return [
        Rule(f"{target}/scale", (f"{source}.weight",)),
        Rule(f"{target}/bias", (f"{source}.bias",)),
    ]


def conv(target: str, source: str) -> list[Rule]:
    """Return the rules for kernel and bias of one convolution."""
    return [
        Rule(f"{target}/kernel", (f"{source}.weight",), "conv"),
        Rule(f"{target}/bias", (f"{source}.bias",)),
    ]


def resnet(target: str, source: str, shortcut: bool = False) -> list[Rule]:
    """Return the rules for one residual block; `shortcut` if it changes the width."""
    return [
        *norm(f"{target}/norm1", f"{source}.norm1"),
        *conv(f"{target}/conv1", f"{source}.conv1"),
        *norm(f"{target}/norm2", f"{source}.norm2"),
        *conv(f"{target}/conv2", f"{source}.conv2"),
        *(conv(f"{target}/shortcut", f"{source}.conv_shortcut") if shortcut else []),
    ]


def mid_block(target: str, source: str) -> list[Rule]:
    """Return the rules for resnet, attention and resnet at the lowest resolution."""
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


def encoder_or_decoder(
    name: str, widths: tuple[int, ...], resnets: int, level: str, resample: str
) -> list[Rule]:
    """Return the rules for the encoder or the decoder.

    Args:
        name: "encoder" or "decoder".
        widths: width of each level, in the order in which the levels run.
        resnets: residual blocks per level.
        level: "down" or "up".
        resample: "downsample" or "upsample"; it follows every level but the last.
    """
    rules = [
        *conv(f"{name}/conv_in", f"{name}.conv_in"),
        *mid_block(f"{name}/mid", f"{name}.mid_block"),
        *norm(f"{name}/norm_out", f"{name}.conv_norm_out"),
        *conv(f"{name}/conv_out", f"{name}.conv_out"),
    ]
    previous_width = widths[0]
    for i, width in enumerate(widths):
        target, source = f"{name}/{level}_{i}", f"{name}.{level}_blocks.{i}"
        for j in range(resnets):
            shortcut = j == 0 and width != previous_width
            rules += resnet(f"{target}/resnet_{j}", f"{source}.resnets.{j}", shortcut)
        if i + 1 < len(widths):
            rules += conv(f"{target}/{resample}", f"{source}.{resample}rs.0.conv")
        previous_width = width
    return rules


def autoencoder_rules(config: AutoencoderConfig) -> list[Rule]:
    """Return the rules from diffusers `AutoencoderKL` to `models.autoencoder.Autoencoder`."""
    widths, layers = config.block_out_channels, config.layers_per_block
    return [
        *encoder_or_decoder("encoder", widths, layers, "down", "downsample"),
        *encoder_or_decoder("decoder", widths[::-1], layers + 1, "up", "upsample"),
    ]
