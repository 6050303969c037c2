"""How far one picture is from another, and how sure a mean is."""

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
    """Mean squared distance of the autoencoder's features, each of length 1, over its levels.

    LPIPS's formula without its learned weights and with this encoder (Zhang et al., 2018).
    """
    config, weights = params.config.autoencoder, params.autoencoder
    pairs = zip(_features(config, weights, a), _features(config, weights, b), strict=True)
    levels = [jnp.square(x - y).sum(-1).mean((1, 2)) for x, y in pairs]
    return jnp.stack(levels).mean(0)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of the mean of `values` [prompts]; NaN left out.

    Give one mean per prompt, so that seeds of one prompt are drawn together; for a paired
    comparison give differences.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(values.mean()) if len(values) else float("nan")
        return mean, mean
    found = bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)
