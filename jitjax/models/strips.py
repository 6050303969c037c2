"""The autoencoder for large pictures, in horizontal strips, so that few activations are held.

    decoder:  latents -> first levels, whole -> [last two levels, strip by strip] -> image
    encoder:  image -> [first two levels, strip by strip] -> last levels, whole -> mean, logvar

Group norms need means and variances over the whole picture, so strips cannot run on their own from
beginning to end. Each resnet reads all strips of its input three times: for the statistics of its
first norm, for those of its second norm, and to compute its output. Only the input of a resnet is
kept in full, and in its place the output; an upsampling before the resnet, and what lies within it,
are computed again each time. A strip is read with the rows around it that its convolutions reach,
and statistics of strips are merged exactly, so the result is that of the untiled model up to
rounding, without seams.

The modules of `autoencoder` define the parameters. Source of the merged statistics: Chan, Golub and
LeVeque, "Algorithms for computing the sample variance", 1983.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jitjax.config import AutoencoderConfig
from jitjax.models.autoencoder import (
    Autoencoder,
    DownLevel,
    MidBlock,
    UpLevel,
    conv3x3,
    group_norm,
    split_moments,
)
from jitjax.models.layers import EPSILON
from jitjax.models.linen import Conv
from jitjax.models.precision import at_least_float32

WHOLE_PIXELS = 1024 * 1024
"""Most pixels of an image that is encoded or decoded as a whole."""
STRIPPED_LEVELS = 2
"""Number of levels, the largest ones, that run in strips. FLUX's others have at most a sixteenth of
the pixels and four times the channels of the largest, so several of their activations fit into the
memory of one of the largest level's."""
STRIP_PIXELS = 2**17
"""Pixels of an image in a strip, about; a batch of b images has b times as many."""
LEAST_ROWS = 2
"""Fewest rows of a strip, since a resnet reads two rows of each neighbour."""

Statistics = tuple[Float[Array, "b groups"], Float[Array, "b groups"]]
"""Mean and variance of each sample and group of channels, over all pixels; float32 or wider."""


def decode_latents(
    config: AutoencoderConfig, params: dict, latents: Float[Array, "b h w latent"], dtype: Any
) -> Float[Array, "b height width out"]:
    """Decode latents as `Autoencoder.decode` does, in strips above `WHOLE_PIXELS` pixels.

    Args:
        config: sizes.
        params: the parameters of `Autoencoder`.
        latents: [b, h, w, latent_channels], unscaled.
        dtype: dtype of the computation.

    Returns:
        [b, h * factor, w * factor, out_channels], nominally in [-1, 1], not clipped.
    """
    if latents.shape[1] * latents.shape[2] * config.factor**2 > WHOLE_PIXELS:
        return decode_in_strips(config, params["decoder"], latents, dtype)
    images = Autoencoder(config, dtype).apply({"params": params}, latents, method="decode")
    assert isinstance(images, jax.Array)
    return images


def decode_in_strips(
    config: AutoencoderConfig, params: dict, latents: Float[Array, "b h w latent"], dtype: Any
) -> Float[Array, "b height width out"]:
    """Decode latents to images in strips of rows, whatever their size.

    A gradient keeps the inputs of the resnets and computes the rest again.

    Args:
        config, latents, dtype: as for `decode_latents`.
        params: the parameters of `Decoder`.

    Returns:
        As `decode_latents`.
    """
    widths = config.block_out_channels[::-1]
    first = max(0, len(widths) - STRIPPED_LEVELS)
    x = conv3x3(widths[0], dtype, "conv_in").apply({"params": params["conv_in"]}, latents)
    x = MidBlock(config, dtype).apply({"params": params["mid"]}, x)
    upsample = None
    for i, width in enumerate(widths[:first]):
        level = params[f"up_{i}"]
        # The last upsampling before the strips is a part of them.
        x = UpLevel(config, width, i + 1 < first, dtype).apply({"params": level}, x)
        upsample = level.get("upsample")
    assert isinstance(x, jax.Array)
    image_width = latents.shape[2] * config.factor
    rows = STRIP_PIXELS // image_width // (image_width // x.shape[2])
    picture = Picture(_split(x, rows), x.shape[1], upsample, dtype)
    for i in range(first, len(widths)):
        level = params[f"up_{i}"]
        for j in range(config.layers_per_block + 1):
            picture = _resnet(picture, level[f"resnet_{j}"], config.norm_num_groups)
        picture = replace(picture, upsample=level.get("upsample"))
    statistics = picture.statistics(lambda x: x, 0, config.norm_num_groups)
    images = picture.map(
        lambda x: x.norm_silu(params["norm_out"], statistics).conv3x3(params["conv_out"]).rows, 1
    )
    return _join(images)[:, : picture.height]


def encode_images(
    config: AutoencoderConfig, params: dict, images: Float[Array, "b height width in"], dtype: Any
) -> tuple[Float[Array, "b h w latent"], Float[Array, "b h w latent"]]:
    """Encode images as `Autoencoder.encode` does, in strips above `WHOLE_PIXELS` pixels.

    Args:
        config: sizes.
        params: the parameters of `Autoencoder`.
        images: [b, height, width, in_channels] in [-1, 1].
        dtype: dtype of the computation.

    Returns:
        mean, logvar: each [b, height / factor, width / factor, latent_channels], unscaled.
    """
    if images.shape[1] * images.shape[2] > WHOLE_PIXELS:
        return encode_in_strips(config, params["encoder"], images, dtype)
    moments: Any = Autoencoder(config, dtype).apply({"params": params}, images, method="encode")
    return moments


def encode_in_strips(
    config: AutoencoderConfig, params: dict, images: Float[Array, "b height width in"], dtype: Any
) -> tuple[Float[Array, "b h w latent"], Float[Array, "b h w latent"]]:
    """Encode images in strips of rows, whatever their size.

    A gradient keeps the inputs of the resnets and computes the rest again.

    Args:
        config, images, dtype: as for `encode_images`.
        params: the parameters of `Encoder`.

    Returns:
        As `encode_images`.
    """
    widths = config.block_out_channels
    in_strips = min(STRIPPED_LEVELS, len(widths) - 1)  # each ends with a downsampling
    strips = _split(images, STRIP_PIXELS // images.shape[2], multiple=2**in_strips)
    picture = Picture(strips, images.shape[1], None, dtype)
    picture = picture.apply(lambda x: x.conv3x3(params["conv_in"]), 1)
    for i in range(in_strips):
        level = params[f"down_{i}"]
        for j in range(config.layers_per_block):
            picture = _resnet(picture, level[f"resnet_{j}"], config.norm_num_groups)
        halved = picture.apply(lambda x, level=level: x.downsample(level["downsample"]), 1)
        picture = replace(halved, height=picture.height // 2)
    x: Any = _join(picture.strips)[:, : picture.height]
    for i, width in list(enumerate(widths))[in_strips:]:
        level = DownLevel(config, width, i + 1 < len(widths), dtype)
        x = level.apply({"params": params[f"down_{i}"]}, x)
    x = MidBlock(config, dtype).apply({"params": params["mid"]}, x)
    x = group_norm(config, dtype, "norm_out").apply({"params": params["norm_out"]}, x)
    conv_out = conv3x3(2 * config.latent_channels, dtype, "conv_out")
    moments = conv_out.apply({"params": params["conv_out"]}, nn.silu(x))
    assert isinstance(moments, jax.Array)
    return split_moments(moments)


def _split(x: Array, rows: int, multiple: int = 1) -> Array:
    """[b, h, w, c] to strips [n, b, r, w, c] of about `rows` rows; the last may be padded.

    `multiple` divides r.
    """
    b, height, width, channels = x.shape
    count = -(-height // max(rows, LEAST_ROWS))
    rows = max(-(-height // count), LEAST_ROWS)
    rows = -(-rows // multiple) * multiple
    count = -(-height // rows)
    x = jnp.pad(x, ((0, 0), (0, count * rows - height), (0, 0), (0, 0)))
    return x.reshape(b, count, rows, width, channels).swapaxes(0, 1)


def _join(strips: Array) -> Array:
    """Undo `_split`, without removing the padding."""
    count, b, rows, width, channels = strips.shape
    return strips.swapaxes(0, 1).reshape(b, count * rows, width, channels)


@dataclass(frozen=True)
class Window:
    """Neighbouring rows of a picture, some of which may lie outside it.

    Attributes:
        rows: [b, r, w, c]; rows outside the picture have any finite values.
        start: index of the first row in the picture; negative above it.
        height: rows of the picture.
        dtype: dtype of the convolutions.
    """

    rows: Array
    start: Array
    height: int
    dtype: Any

    def inside(self) -> Array:
        """[r, 1, 1], False for rows outside the picture."""
        index = self.start + jnp.arange(self.rows.shape[1])
        return ((index >= 0) & (index < self.height))[:, None, None]

    def conv3x3(self, params: dict) -> Window:
        """Convolve with zeros around the picture; the result has one row less on either side."""
        rows = jnp.where(self.inside()[None], self.rows, jnp.zeros((), self.rows.dtype))
        conv = Conv(params["kernel"].shape[-1], (3, 3), padding=((0, 0), (1, 1)), dtype=self.dtype)
        rows = conv.apply({"params": params}, rows)
        assert isinstance(rows, jax.Array)
        return replace(self, rows=rows, start=self.start + 1)

    def norm_silu(self, params: dict, statistics: Statistics) -> Window:
        """Group norm by given statistics, as Flax computes it, and SiLU."""
        channels = self.rows.shape[-1]
        mean, variance = (
            jnp.repeat(x, channels // x.shape[-1], axis=-1)[:, None, None, :] for x in statistics
        )
        scale, bias = (params[name][None, None, None, :] for name in ("scale", "bias"))
        y = (self.rows - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias
        return replace(self, rows=nn.silu(y.astype(self.dtype)))

    def enlarge(self) -> Window:
        """Twice the resolution, by repeating pixels."""
        rows = self.rows.repeat(2, axis=1).repeat(2, axis=2)
        return replace(self, rows=rows, start=2 * self.start, height=2 * self.height)

    def downsample(self, params: dict) -> Window:
        """Half the resolution by a convolution; of the rows above it needs none, below one.

        The first row of the strip is even in the picture.
        """
        rows = jnp.where(self.inside()[None], self.rows, jnp.zeros((), self.rows.dtype))[:, 1:]
        padding = ((0, 0), (0, 1))
        conv = Conv(params["kernel"].shape[-1], (3, 3), 2, padding, dtype=self.dtype)
        rows = conv.apply({"params": params}, rows)
        assert isinstance(rows, jax.Array)
        return replace(self, rows=rows, start=(self.start + 1) // 2, height=self.height // 2)

    def trim(self, count: int) -> Window:
        """Remove the same number of rows above and below, so that `count` are left."""
        removed = (self.rows.shape[1] - count) // 2
        return replace(
            self, rows=self.rows[:, removed : removed + count], start=self.start + removed
        )


@dataclass(frozen=True)
class Picture:
    """Activations of a whole picture in strips, of which the last may reach beyond the picture.

    Attributes:
        strips: [n, b, r, w, c], n strips of r rows.
        height: rows of the picture that is stored.
        upsample: parameters of a convolution. If there are any, the picture is the stored one
            after upsampling and this convolution, which are computed whenever it is read.
        dtype: dtype of the convolutions.
    """

    strips: Array
    height: int
    upsample: dict | None
    dtype: Any

    def map(self, function: Callable[[Window], Any], margin: int) -> Any:
        """Apply a function to each strip, and stack the results.

        Args:
            function: its argument is a strip with `margin` more rows on either side.
            margin: number of rows.
        """
        apply = self._windowed(function, margin)
        return jax.lax.map(lambda inputs: apply(*inputs), (self.strips, self._outside(margin)))

    def apply(self, function: Callable[[Window], Window], margin: int) -> Picture:
        """Apply a function to each strip; arguments as for `map`, but the results are a picture.

        If the shape of a strip stays, XLA writes the results to the memory of the strips.
        """
        outside = self._outside(margin)
        apply = self._windowed(lambda x: function(x).rows, margin)
        result = jax.eval_shape(apply, self.strips[0], jax.tree.map(lambda x: x[0], outside))
        count, in_place = self.strips.shape[0], result.shape == self.strips.shape[1:]
        # Zeros would do, but they depend on nothing, and XLA allocates them in the beginning.
        unset = jnp.broadcast_to(self.strips[0, 0, 0, 0, 0], (count, *result.shape))

        def step(strips: Array, inputs: tuple[Array, Any]) -> tuple[Array, None]:
            i, outside = inputs
            strip = (strips if in_place else self.strips)[i]
            return strips.at[i].set(apply(strip, outside)), None

        inputs = (jnp.arange(count), outside)
        strips, _ = jax.lax.scan(step, self.strips if in_place else unset, inputs)
        height = self.height if self.upsample is None else 2 * self.height
        return Picture(strips, height, None, self.dtype)

    def _reach(self, margin: int) -> int:
        """Rows around a stored strip that are needed for `margin` rows around a strip."""
        return margin if self.upsample is None else margin // 2 + 1

    def _outside(self, margin: int) -> tuple[Array, Array, Array]:
        """For all strips: index of the first row that is needed, and the rows above and below."""
        count, _, rows, _, _ = self.strips.shape
        reach = self._reach(margin)
        beyond = jnp.zeros_like(self.strips[:1, :, :reach])
        above = jnp.concatenate([beyond, self.strips[:-1, :, rows - reach :]])
        below = jnp.concatenate([self.strips[1:, :, :reach], beyond])
        return rows * jnp.arange(count) - reach, above, below

    def _windowed(self, function: Callable[[Window], Any], margin: int) -> Callable[..., Any]:
        """A function of a strip and what `_outside` gives for it, for one of a `Window`."""

        @jax.checkpoint  # A gradient keeps only the strips.
        def apply(strip: Array, outside: tuple[Array, Array, Array]) -> Any:
            start, above, below = outside
            rows = jnp.concatenate([above, strip, below], axis=1)
            window = Window(rows, start, self.height, self.dtype)
            if self.upsample is not None:
                window = window.enlarge().trim(2 * strip.shape[1] + 2 * margin + 2)
                window = window.conv3x3(self.upsample)
            return function(window)

        return apply

    def statistics(
        self, function: Callable[[Window], Window], margin: int, groups: int
    ) -> Statistics:
        """Mean and variance of a function of the picture, per sample and group of channels.

        Those of each strip are computed one after the other, since E[x^2] - E[x]^2 cancels, and
        merged, so the function runs only once per strip.
        """

        def measure(window: Window) -> tuple[Array, Array, Array]:
            window = function(window)
            x = window.rows.astype(at_least_float32(window.rows.dtype))
            b, rows, width, channels = x.shape
            x = x.reshape(b, rows, width, groups, channels // groups)
            where = window.inside()[None, ..., None]
            mean = x.mean((1, 2, 4), where=where)
            centred = jnp.square(x - mean[:, None, None, :, None])
            weight = window.inside().sum() / window.height
            return mean, centred.mean((1, 2, 4), where=where), weight.astype(x.dtype)

        means, variances, weights = self.map(measure, margin)
        weights = weights[:, None, None]  # each strip's share of the rows
        mean = (weights * means).sum(0)
        return mean, (weights * (variances + jnp.square(means - mean[None]))).sum(0)


def _resnet(picture: Picture, params: dict, groups: int) -> Picture:
    """`autoencoder.Resnet`, computed in strips."""
    first_norm = picture.statistics(lambda x: x, 0, groups)

    def first_half(x: Window) -> Window:
        return x.norm_silu(params["norm1"], first_norm).conv3x3(params["conv1"])

    second_norm = picture.statistics(first_half, 1, groups)

    def whole(x: Window) -> Window:
        y = first_half(x).norm_silu(params["norm2"], second_norm).conv3x3(params["conv2"])
        rows = x.trim(y.rows.shape[1]).rows
        if "shortcut" in params:
            conv = Conv(y.rows.shape[-1], (1, 1), dtype=x.dtype)
            rows = conv.apply({"params": params["shortcut"]}, rows)
            assert isinstance(rows, jax.Array)
        return replace(y, rows=rows + y.rows)

    return picture.apply(whole, 2)
