"""A perceptual distance between images, and bootstrap intervals of means."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import bootstrap

from jitjax.checkpoint import FluxParams
from jitjax.config import AutoencoderConfig
from jitjax.models.autoencoder import Autoencoder, DownLevel


@partial(jax.jit, static_argnums=0)
def _features(config: AutoencoderConfig, params: dict, images: Array) -> list[Array]:
    _, state = Autoencoder(config).apply(
        {"params": params},
        2 * images - 1,
        method="encode",
        capture_intermediates=lambda module, name: isinstance(module, DownLevel),
        mutable=["intermediates"],
    )
    levels = jax.tree.leaves(state)
    lengths = (jnp.sqrt(jnp.square(level).sum(-1, keepdims=True)) for level in levels)
    return [level / (length + 1e-6) for level, length in zip(levels, lengths, strict=True)]


def feature_distance(
    params: FluxParams, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
) -> Float[Array, " b"]:
    """Compute the distance between images in feature space of the checkpoint's autoencoder.

    The formula is that of LPIPS (Zhang et al., 2018) without its learned weights: features are
    normalised to unit length at each position; their squared distances are averaged over positions,
    then over the encoder's levels.

    Args:
        params: parameters that include the autoencoder.
        a: images [batch, height, width, 3] in [0, 1].
        b: images of the same shape.

    Returns:
        One distance per pair of images, 0 for equal images.
    """
    config, weights = params.config.autoencoder, params.autoencoder
    pairs = zip(_features(config, weights, a), _features(config, weights, b), strict=True)
    levels = [jnp.square(x - y).sum(-1).mean((1, 2)) for x, y in pairs]
    return jnp.stack(levels).mean(0)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval (percentile method) of a mean.

    Args:
        values: one value per prompt, the mean over its seeds: seeds of one prompt are not
            independent. For a paired comparison, differences. Values that are not finite are
            ignored.
        seed: seed of the resampling.

    Returns:
        The lower and the upper end; both are the mean where there is nothing to resample.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(values.mean()) if len(values) else float("nan")
        return mean, mean
    result = bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(result.low), float(result.high)
