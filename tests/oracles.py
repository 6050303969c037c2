"""The sampler once more, in NumPy and SciPy, sample by sample and loop by loop: slow and plain."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter


def squared_distances(grid: tuple[int, int], index: np.ndarray) -> np.ndarray:
    """[tokens, anchors]."""
    rows, columns = np.indices(grid).reshape(2, -1)
    return (rows[:, None] - rows[index]) ** 2 + (columns[:, None] - columns[index]) ** 2


def blurred(field: np.ndarray, grid: tuple[int, int], width: float) -> np.ndarray:
    """A Gaussian blur of [tokens, channels]; scipy's "mirror" is torch's "reflect"."""
    radius = int(np.ceil(3 * width))
    planes = field.reshape(*grid, -1).astype(np.float64)
    # scipy reflects a single row on to itself, as it should be.
    out = gaussian_filter(planes, (width, width, 0), mode="mirror", radius=(radius, radius, 0))
    return out.reshape(field.shape)


def lift(values: np.ndarray, index: np.ndarray, grid: tuple[int, int], kind: str) -> np.ndarray:
    """Values [anchors, channels] to all tokens."""
    n = grid[0] * grid[1]
    nearest = values[squared_distances(grid, index).argmin(1)].astype(np.float64)
    narrow = 0.4 / np.sqrt(len(index) / n)
    if kind == "blur":
        out = blurred(nearest, grid, np.clip(narrow, 1, 10))
    elif kind == "narrow":
        out = blurred(nearest, grid, narrow)
    elif kind == "linear":
        rows, columns = np.indices(grid).reshape(2, -1)
        squared = squared_distances(grid, index)
        out = np.zeros_like(nearest)
        for token in range(n):
            root = np.exp((squared[token].min() - squared[token]) / (4 * narrow**2))[:, None]
            offsets = rows[index] - rows[token], columns[index] - columns[token]
            plane = np.stack([np.ones(len(index)), *offsets], axis=1)
            held = np.sqrt(0.02 * squared[token].min()) * np.eye(3)[1:]  # the slopes, towards 0
            left = np.concatenate([root * plane, held])
            right = np.concatenate([root * values, np.zeros((2, values.shape[1]))])
            out[token] = np.linalg.lstsq(left, right, rcond=None)[0][0]
    else:
        out = nearest if kind == "nearest" else np.zeros_like(nearest)
    out[index] = values
    return out


def importance(velocity: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Local variance over 3 x 3 windows with zeros beyond the edge, mean over channels."""
    padded = np.pad(velocity.reshape(*grid, -1), ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
    variance = (windows**2).mean((-1, -2)) - windows.mean((-1, -2)) ** 2
    return variance.mean(-1).ravel()


def solve(
    velocity: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    noise: np.ndarray,
    microflow_noise: np.ndarray,
    sigmas: np.ndarray,
    stage_steps: list[int],
    densities: list[float],
    relax: float,
    first: np.ndarray,
    grid: tuple[int, int],
    kind: str = "blur",
) -> np.ndarray:
    """One sample [tokens, channels] from noise to clean; `relax` 0 sets tokens to the target."""
    y, index, n = noise.astype(np.float64), np.asarray(first), len(noise)
    u = np.zeros_like(y)
    starts = dict(zip(stage_steps[:-1], densities[1:], strict=True))
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        if step in starts:
            score = importance(u, grid)  # u: the velocity of the step before
            others = np.setdiff1d(np.arange(n), index)
            new = others[np.argsort(-score[others], kind="stable")]
            new = new[: int(n * starts[step]) - len(index)]
            clean = lift((y - sigma * u)[index], index, grid, kind)
            target = ((1 - sigma) * clean + sigma * microflow_noise)[new]
            y[new] = target if relax == 0 else y[new] + (target - y[new]) / relax
            index = np.concatenate([index, new])
        on_anchors = velocity(y[index], index, sigma)
        u = (
            on_anchors[np.argsort(index)]
            if len(index) == n
            else lift(on_anchors, index, grid, kind)
        )
        y = y + u * (following - sigma)
    return y


def microflow(y, target, start: float, end: float, horizon: float):
    """The micro-flow's closed form: the gap to the target shrinks in proportion to T - sigma."""
    return target + (y - target) * (horizon - end) / (horizon - start)
