"""Bootstrap intervals of means."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap


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
