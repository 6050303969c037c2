"""Configurations: what the transformer's input tokens hold."""

from __future__ import annotations

import dataclasses

import pytest

from jitjax.config import AutoencoderConfig, FluxConfig, TransformerConfig

SMALL = AutoencoderConfig(latent_channels=2, block_out_channels=(8, 8), norm_num_groups=8)
"""2 x 2 pixels per latent pixel, so 4 x 4 per token."""


@pytest.mark.parametrize(
    ("inputs", "latents", "control", "extra", "mask"),
    [
        (64, 64, "none", 0, 0),
        (64, None, "none", 0, 0),
        (128, 64, "picture", 64, 0),
        (384, 64, "fill", 320, 256),
        (16, 8, "picture", 8, 0),
        (272, 8, "fill", 264, 256),
        (32, 8, "fill", 24, 16),
    ],
)
def test_control_follows_from_the_channels(inputs, latents, control, extra, mask):
    given = {} if latents is None else {"out_channels": latents}
    config = TransformerConfig(in_channels=inputs, **given)
    assert config.out_channels == (latents or inputs)
    assert (config.control, config.control_channels, config.mask_channels) == (control, extra, mask)
    raw = {"in_channels": inputs, "out_channels": latents, "guidance_embeds": True}
    assert TransformerConfig.from_diffusers(raw) == config
    if latents is None:
        del raw["out_channels"]
        assert TransformerConfig.from_diffusers(raw) == config


@pytest.mark.parametrize("inputs", [32, 63, 65, 96, 127, 129, 196, 320, 383, 385])
def test_other_numbers_of_channels_are_refused(inputs):
    message = (
        f"TransformerConfig.in_channels is {inputs} and out_channels is 64; expected "
        "in_channels 64 .latents alone., 128 .with a control picture. or 384 "
    )
    with pytest.raises(ValueError, match=message):
        TransformerConfig(in_channels=inputs, out_channels=64)


def test_channels_must_be_those_of_the_autoencoder():
    for inputs in (8, 16, 32):
        transformer = TransformerConfig(in_channels=inputs, out_channels=8)
        assert FluxConfig(transformer, autoencoder=SMALL).transformer == transformer
    message = "transformer.mask_channels is 256; expected pixels_per_token .. 2 = 16"
    with pytest.raises(ValueError, match=message):
        FluxConfig(TransformerConfig(in_channels=272, out_channels=8), autoencoder=SMALL)
    message = "transformer.out_channels is 128; expected autoencoder.latent_channels . 4 = 64"
    with pytest.raises(ValueError, match=message):
        FluxConfig(TransformerConfig(in_channels=128))


def test_a_config_can_be_widened():
    config = dataclasses.replace(TransformerConfig(), in_channels=128)
    assert (config.out_channels, config.control) == (64, "picture")
