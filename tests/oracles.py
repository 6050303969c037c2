"""A reference implementation of the sampler in NumPy and SciPy, for one sample at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter


def squared_distances(grid: tuple[int, int], index: np.ndarray) -> np.ndarray:
    """Squared distance of each token to each anchor, [tokens, anchors]."""
    rows, columns = np.indices(grid).reshape(2, -1)
    return (rows[:, None] - rows[index]) ** 2 + (columns[:, None] - columns[index]) ** 2


def blur(field: np.ndarray, grid: tuple[int, int], width: float) -> np.ndarray:
    """Blur values [tokens, channels]; the mode "mirror" of SciPy is "reflect" in PyTorch."""
    radius = int(np.ceil(3 * width))
    planes = field.reshape(*grid, -1).astype(np.float64)
    # SciPy reflects a single row onto itself, like `blur_matrix`.
    out = gaussian_filter(planes, (width, width, 0), mode="mirror", radius=(radius, radius, 0))
    return out.reshape(field.shape)


def lift(values: np.ndarray, index: np.ndarray, grid: tuple[int, int], kind: str) -> np.ndarray:
    """Lift values [anchors, channels] to [tokens, channels]."""
    n = grid[0] * grid[1]
    nearest = values[squared_distances(grid, index).argmin(1)].astype(np.float64)
    narrow = 0.4 / np.sqrt(len(index) / n)
    if kind == "blur":
        out = blur(nearest, grid, np.clip(narrow, 1, 10))
    elif kind == "narrow":
        out = blur(nearest, grid, narrow)
    elif kind == "linear":
        rows, columns = np.indices(grid).reshape(2, -1)
        squared = squared_distances(grid, index)
        out = np.zeros_like(nearest)
        for token in range(n):
            # Square roots of the weights, since `lstsq` squares the residuals.
            root = np.exp((squared[token].min() - squared[token]) / (4 * narrow**2))[:, None]
            offsets = rows[index] - rows[token], columns[index] - columns[token]
            plane = np.stack([np.ones(len(index)), *offsets], axis=1)
            ridge = np.sqrt(0.02 * squared[token].min()) * np.eye(3)[1:]  # of the two slopes
            matrix = np.concatenate([root * plane, ridge])
            right_side = np.concatenate([root * values, np.zeros((2, values.shape[1]))])
            out[token] = np.linalg.lstsq(matrix, right_side, rcond=None)[0][0]
    else:
        out = nearest if kind == "nearest" else np.zeros_like(nearest)
    out[index] = values
    return out


def importance(velocity: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Local variance over 3 x 3 windows, zero beyond the edge, averaged over channels."""
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
    """Solve one sample [tokens, channels]; `relax` 0 sets new tokens to their target ("hit")."""
    y, index, n = noise.astype(np.float64), np.asarray(first), len(noise)
    u = np.zeros_like(y)
    density_from_step = dict(zip(stage_steps[:-1], densities[1:], strict=True))
    for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        if step in density_from_step:
            score = importance(u, grid)  # u is the velocity of the previous step
            others = np.setdiff1d(np.arange(n), index)
            new = others[np.argsort(-score[others], kind="stable")]
            new = new[: int(n * density_from_step[step]) - len(index)]
            clean = lift((y - sigma * u)[index], index, grid, kind)
            target = ((1 - sigma) * clean + sigma * microflow_noise)[new]
            y[new] = target if relax == 0 else y[new] + (target - y[new]) / relax
            index = np.concatenate([index, new])
        anchor_velocity = velocity(y[index], index, sigma)
        if len(index) == n:
            u = anchor_velocity[np.argsort(index)]
        else:
            u = lift(anchor_velocity, index, grid, kind)
        y = y + u * (next_sigma - sigma)
    return y


def microflow(y, target, start: float, end: float, target_sigma: float):
    """Closed form of the micro-flow: the gap to the target is proportional to T - sigma."""
    return target + (y - target) * (target_sigma - end) / (target_sigma - start)
