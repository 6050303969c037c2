"""What FLUX.1 Fill is shown: the picture without what the mask covers, and the mask itself.

    picture [H, W, 3], grey under the mask -- encode --> tokens [N, 64] --+
                                                                          +--> tokens [N, 320]
    mask    [H, W], 0 or 1 -- 8 x 8 pixels per latent pixel ------------- +
                              [H/8, W/8, 64] -- pack 2 x 2 --> [N, 256]

Source: `FluxFillPipeline` of diffusers 0.42. It takes masks of 0 and 1; others are rounded here, as
there.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig
from jitjax.encode import encode
from jitjax.latents import pack

GREY = 0.5
"""What the covered pixels become: 0 in the autoencoder's [-1, 1]."""
COVERED = 0.5
"""The least value of a mask that covers a pixel."""


def masked_pictures(image: Any, mask: Any) -> Any:
    """Return pictures that are grey where a mask covers them.

    Args:
        image: [b or 1, height, width, 3], in [0, 1].
        mask: [b or 1, height, width], in [0, 1]; from 0.5 on it covers.

    Returns:
        [b, height, width, 3]; a NumPy array, in the host's memory, if both are.
    """
    numpy = np if isinstance(image, np.ndarray) and isinstance(mask, np.ndarray) else jnp
    return numpy.where(mask[..., None] >= COVERED, image.dtype.type(GREY), image)


def with_mask(
    tokens: Float[Array, "b n d"], mask: Any, config: FluxConfig
) -> Float[Array, "b n c"]:
    """Return the clean tokens of masked pictures with every pixel of their masks.

    Args:
        tokens: of `masked_pictures`, from `encode`.
        mask: [b, height, width], in [0, 1]; rounded to 0 or 1.
        config: the model's configuration.

    Returns:
        c = d + 256; what is added is ordered (row, column in the latent pixel, row, column in the
        patch).
    """
    factor = config.autoencoder.factor
    binary = (jnp.asarray(mask) >= COVERED).astype(tokens.dtype)
    b, height, width = binary.shape
    rows, columns = height // factor, width // factor
    latents = binary.reshape(b, rows, factor, columns, factor).transpose(0, 1, 3, 2, 4)
    packed = pack(latents.reshape(b, rows, columns, factor**2))
    return jnp.concatenate([tokens, packed], axis=2)


def fill_tokens(params: FluxParams, image: Any, mask: Any) -> Float[Array, "b n c"]:
    """Return the further channels of the tokens for FLUX.1 Fill, `denoise(control=)`.

    Args:
        params: parameters; only the autoencoder's are used.
        image: the pictures to fill, [b, height, width, 3], in [0, 1]; sides are multiples of 16.
        mask: what to fill, [b, height, width]: from 0.5 on it is new.

    Returns:
        float32 [b, n, 320]; n = height width / 256.

    Raises:
        ValueError, TypeError: as `encode`.
    """
    return with_mask(encode(params, masked_pictures(image, mask)), mask, params.config)
