"""FLUX's KL autoencoder: images to latents with 8 times fewer pixels per side, and back. NHWC.

    encode:  conv -> level 0 .. n-1 (resnets, downsample) -> mid -> norm, conv -> mean, logvar
    decode:  conv -> mid -> level n-1 .. 0 (resnets, upsample) -> norm, conv -> image

Source: Rombach et al., 2021 (arXiv 2112.10752). Reference: diffusers `AutoencoderKL` with FLUX's
settings, which have no quantisation convolutions before and after the latents.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jitjax.config import AutoencoderConfig
from jitjax.models.attention import attend
from jitjax.models.layers import EPSILON
from jitjax.models.linen import Conv, Dense, DenseGeneral, GroupNorm

Image = Float[Array, "b _ _ _"]
"""Activations [b, height, width, channels] of any resolution and any number of channels."""


def group_norm(config: AutoencoderConfig, dtype: Any, name: str) -> GroupNorm:
    """Group norm with a two-pass variance; E[x^2] - E[x]^2 cancels if the mean is large."""
    return GroupNorm(
        config.norm_num_groups, epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name
    )


def conv3x3(width: int, dtype: Any, name: str) -> Conv:
    """3 x 3 convolution to `width` channels that keeps the resolution."""
    return Conv(width, (3, 3), padding=1, dtype=dtype, name=name)


class Resnet(nn.Module):
    """Residual block: (norm, silu, conv) twice, added to the input.

    The input passes through a 1 x 1 convolution if its channels differ from `width`.
    """

    config: AutoencoderConfig
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        y = nn.silu(group_norm(self.config, self.dtype, "norm1")(x))
        y = conv3x3(self.width, self.dtype, "conv1")(y)
        y = nn.silu(group_norm(self.config, self.dtype, "norm2")(y))
        y = conv3x3(self.width, self.dtype, "conv2")(y)
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Single-head attention over all pixels, added to the input."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        b, h, w, c = x.shape
        pixels = group_norm(self.config, self.dtype, "norm")(x).reshape(b, h * w, c)
        qkv = DenseGeneral((3, c), dtype=self.dtype, name="qkv")(pixels)
        q, k, v = jnp.moveaxis(qkv[:, :, :, None], 2, 0)  # each [b, pixels, 1, c]
        y = attend(q, k, v)
        return x + Dense(c, dtype=self.dtype, name="out")(y.reshape(b, h, w, c))


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        width = x.shape[-1]
        x = Resnet(self.config, width, self.dtype, name="resnet_0")(x)
        x = Attention(self.config, self.dtype, name="attention")(x)
        return Resnet(self.config, width, self.dtype, name="resnet_1")(x)


class DownLevel(nn.Module):
    """`layers_per_block` resnets; then, if `add_downsample`, a convolution of stride 2."""

    config: AutoencoderConfig
    width: int
    add_downsample: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        for i in range(self.config.layers_per_block):
            x = Resnet(self.config, self.width, self.dtype, name=f"resnet_{i}")(x)
        if self.add_downsample:
            padding = ((0, 1), (0, 1))  # The model was trained with bottom and right padding only.
            x = Conv(self.width, (3, 3), 2, padding, dtype=self.dtype, name="downsample")(x)
        return x


class UpLevel(nn.Module):
    """`layers_per_block + 1` resnets; then, if `add_upsample`, nearest upsampling and a conv."""

    config: AutoencoderConfig
    width: int
    add_upsample: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        for i in range(self.config.layers_per_block + 1):
            x = Resnet(self.config, self.width, self.dtype, name=f"resnet_{i}")(x)
        if self.add_upsample:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = conv3x3(self.width, self.dtype, "upsample")(x)
        return x


class Encoder(nn.Module):
    """Images to the mean and log variance of the latents, concatenated along the channels."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c = self.config
        widths = c.block_out_channels
        x = conv3x3(widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            add_downsample = i + 1 < len(widths)
            x = DownLevel(c, width, add_downsample, self.dtype, name=f"down_{i}")(x)
        x = MidBlock(c, self.dtype, name="mid")(x)
        x = nn.silu(group_norm(c, self.dtype, "norm_out")(x))
        return conv3x3(2 * c.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents to images. The submodule `up_0` has the lowest resolution."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c = self.config
        widths = c.block_out_channels[::-1]
        x = conv3x3(widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(c, self.dtype, name="mid")(x)
        for i, width in enumerate(widths):
            add_upsample = i + 1 < len(widths)
            x = UpLevel(c, width, add_upsample, self.dtype, name=f"up_{i}")(x)
        x = nn.silu(group_norm(c, self.dtype, "norm_out")(x))
        return conv3x3(c.out_channels, self.dtype, "conv_out")(x)


class Autoencoder(nn.Module):
    """FLUX's autoencoder; use `apply(variables, x, method="encode")` or `method="decode"`.

    Attributes:
        config: sizes.
        dtype: dtype of the computation; norms and softmax are float32 for every dtype.
    """

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(
        self, images: Float[Array, "b height width channels"]
    ) -> tuple[Float[Array, "b h w latent"], Float[Array, "b h w latent"]]:
        """Encode images to the mean and log variance of their latents.

        Args:
            images: [b, height, width, in_channels] in [-1, 1]; height and width are multiples of
                `config.factor`.

        Returns:
            mean, logvar: each [b, height / factor, width / factor, latent_channels]. The mean is
                unscaled; `to_latents` scales it. `logvar` is clipped to [-30, 20].

        Raises:
            ValueError: the height or width is not a multiple of `config.factor`.
        """
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"Autoencoder.encode: images are {images.shape[1]} x {images.shape[2]} pixels; "
                f"expected multiples of {factor}"
            )
        return split_moments(self.encoder(images))

    def decode(self, latents: Float[Array, "b h w latent"]) -> Float[Array, "b height width out"]:
        """Decode latents to images.

        Args:
            latents: [b, h, w, latent_channels], unscaled, as `encode` and `from_latents` return
                them.

        Returns:
            [b, h * factor, w * factor, out_channels], nominally in [-1, 1], not clipped.
        """
        return self.decoder(latents)

    def __call__(
        self, images: Float[Array, "b height width channels"]
    ) -> Float[Array, "b height width out"]:
        """Decode the encoded mean. `init` calls this to create the parameters of both halves."""
        return self.decode(self.encode(images)[0])


def split_moments(moments: Image) -> tuple[Image, Image]:
    """Return the mean and the clipped log variance from the encoder's last channels."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def to_latents(
    mean: Float[Array, "b h w latent"], config: AutoencoderConfig
) -> Float[Array, "b h w latent"]:
    """Scale the mean that `Autoencoder.encode` returns to the transformer's latents."""
    return (mean - config.shift_factor) * config.scaling_factor


def from_latents(
    latents: Float[Array, "b h w latent"], config: AutoencoderConfig
) -> Float[Array, "b h w latent"]:
    """Undo `to_latents`: unscale the transformer's latents for `Autoencoder.decode`."""
    return latents / config.scaling_factor + config.shift_factor
