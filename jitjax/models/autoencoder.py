"""FLUX's KL autoencoder: images to latents of 8 x 8 times fewer pixels and back. NHWC throughout.

    encode:  conv -> level 0 .. n-1 (resnets, then halve) -> mid -> norm, conv -> mean, logvar
    decode:  conv -> mid -> level n-1 .. 0 (resnets, then double) -> norm, conv -> image

Rombach et al., 2021 (arXiv 2112.10752). The numbers are those of diffusers' `AutoencoderKL` with
the settings of FLUX: no convolutions around the latents.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jitjax.config import AutoencoderConfig
from jitjax.models.attention import attend

Image = Float[Array, "b _ _ _"]  # NHWC; sizes and widths change on the way


def norm(config: AutoencoderConfig, dtype: Any, name: str) -> nn.GroupNorm:
    """Group norm with the two-pass variance: E[x^2] - E[x]^2 loses digits if the mean is large."""
    return nn.GroupNorm(
        config.norm_num_groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name
    )


def conv(width: int, dtype: Any, name: str) -> nn.Conv:
    """3 x 3, the size kept."""
    return nn.Conv(width, (3, 3), padding=1, dtype=dtype, name=name)


class Resnet(nn.Module):
    """Norm, silu, conv, twice, added to the input; a 1 x 1 conv on it where the widths differ."""

    config: AutoencoderConfig
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        y = conv(self.width, self.dtype, "conv1")(
            nn.silu(norm(self.config, self.dtype, "norm1")(x))
        )
        y = conv(self.width, self.dtype, "conv2")(
            nn.silu(norm(self.config, self.dtype, "norm2")(y))
        )
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Single-head attention over all pixels, added to the input."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        b, h, w, c = x.shape
        pixels = norm(self.config, self.dtype, "norm")(x).reshape(b, h * w, c)
        qkv = nn.DenseGeneral((3, c), dtype=self.dtype, name="qkv")(pixels)
        q, k, v = jnp.moveaxis(qkv[:, :, :, None], 2, 0)  # each [b, pixels, one head, c]
        y = attend(q, k, v)
        return x + nn.Dense(c, dtype=self.dtype, name="out")(y.reshape(b, h, w, c))


class Mid(nn.Module):
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
    """Resnets of one width; then, if `halve`, a convolution of stride 2."""

    config: AutoencoderConfig
    width: int
    halve: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        for i in range(self.config.layers_per_block):
            x = Resnet(self.config, self.width, self.dtype, name=f"resnet_{i}")(x)
        if self.halve:
            # Padded at the bottom and the right only, as the model was trained.
            pad = ((0, 1), (0, 1))
            x = nn.Conv(self.width, (3, 3), 2, pad, dtype=self.dtype, name="downsample")(x)
        return x


class UpLevel(nn.Module):
    """Resnets of one width, one more than on the way down; if `double`, nearest and a conv."""

    config: AutoencoderConfig
    width: int
    double: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        for i in range(self.config.layers_per_block + 1):
            x = Resnet(self.config, self.width, self.dtype, name=f"resnet_{i}")(x)
        if self.double:
            x = conv(self.width, self.dtype, "upsample")(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class Encoder(nn.Module):
    """Images to the two halves of the latent distribution, one after the other in the channels."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c = self.config
        widths = c.block_out_channels
        x = conv(widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            halve = i + 1 < len(widths)
            x = DownLevel(c, width, halve, self.dtype, name=f"down_{i}")(x)
        x = Mid(c, self.dtype, name="mid")(x)
        x = nn.silu(norm(c, self.dtype, "norm_out")(x))
        return conv(2 * c.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents to images. `up_0` has the lowest resolution."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Image) -> Image:
        c = self.config
        widths = c.block_out_channels[::-1]
        x = conv(widths[0], self.dtype, "conv_in")(x)
        x = Mid(c, self.dtype, name="mid")(x)
        for i, width in enumerate(widths):
            double = i + 1 < len(widths)
            x = UpLevel(c, width, double, self.dtype, name=f"up_{i}")(x)
        x = nn.silu(norm(c, self.dtype, "norm_out")(x))
        return conv(c.out_channels, self.dtype, "conv_out")(x)


class Autoencoder(nn.Module):
    """Encoder and decoder; call by `apply(variables, x, method="encode")` or `"decode"`.

    Attributes:
        config: sizes.
        dtype: dtype of the computation; norms and softmax are float32 in any case.
    """

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(
        self, images: Float[Array, "b height width channels"]
    ) -> tuple[Float[Array, "b h w latent"], Float[Array, "b h w latent"]]:
        """Mean and log variance of the latents, not yet scaled: see `to_latents`.

        Args:
            images: [b, height, width, in_channels] in [-1, 1]; both sides multiples of
                `config.factor`.

        Returns:
            mean, logvar: each [b, height / factor, width / factor, latent_channels].

        Raises:
            ValueError: a side that is not a multiple of the factor (the rest would be cut off).
        """
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"Autoencoder.encode: images of {images.shape[1]} x {images.shape[2]}, "
                f"expected multiples of {factor}"
            )
        mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w latent"]) -> Float[Array, "b height width out"]:
        """Images in about [-1, 1], not clipped, from latents as `encode` gives them.

        Args:
            latents: [b, h, w, latent_channels], unscaled: see `from_latents`.

        Returns:
            [b, h * factor, w * factor, out_channels].
        """
        return self.decoder(latents)

    def __call__(
        self, images: Float[Array, "b height width channels"]
    ) -> Float[Array, "b height width out"]:
        """Through the mean and back; it is here so that `init` makes all parameters."""
        return self.decode(self.encode(images)[0])


def to_latents(
    mean: Float[Array, "b h w latent"], config: AutoencoderConfig
) -> Float[Array, "b h w latent"]:
    """What the autoencoder encodes, in the units the transformer works in."""
    return (mean - config.shift_factor) * config.scaling_factor


def from_latents(
    latents: Float[Array, "b h w latent"], config: AutoencoderConfig
) -> Float[Array, "b h w latent"]:
    """The inverse of `to_latents`."""
    return latents / config.scaling_factor + config.shift_factor


def abstract_params(config: AutoencoderConfig, dtype: Any = jnp.float32) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s of `dtype`; nothing is allocated."""
    shape = (1, config.factor, config.factor, config.in_channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = jax.eval_shape(Autoencoder(config).init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
