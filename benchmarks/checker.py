"""Says what a picture shows, from its pixels: an exact checker for scenes of `training.scenes`.

    found = describe(image)            # a list of `Found`: colour, shape, size, texture
    result = check(image, scene)       # {"count": True, "colour": True, ..., "right": True}

numpy and scipy only. The ground is a plane in each channel, fitted to the border; what differs
from it is an object; shapes are told by overlap with ideal outlines of the same extent, so a rough
shape is no shape. It was validated on drawn scenes with noise, blur and JPEG, and never tuned on
generated pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from training.scenes import COLOURS, SHAPES, Scene, signed_distance

WORK = 256  # pictures are averaged down to about this shorter side first
CONTRAST = 0.13  # Euclidean distance from the ground, in RGB, that makes an object
LEAST_AREA = 0.002  # of the picture: smaller islands are specks
SIZE_LIMITS = (("small", 0.075, 0.155), ("medium", 0.155, 0.25), ("large", 0.25, 0.40))
# Least intersection over union with the ideal outline: a little below the lowest in drawn scenes of
# 256 and 512 px, three in four of them with noise, blur or JPEG compression.
LEAST_OVERLAP = {
    "circle": 0.88,
    "square": 0.88,
    "triangle": 0.80,
    "star": 0.75,
    "ring": 0.83,
    "cross": 0.86,
}
NEUTRAL = 0.22  # greatest channel minus least: below, a pixel belongs to the second tone
LEAST_PURITY = 0.75  # share of an object's coloured pixels that carry its colour
FARTHEST_COLOUR = 0.30  # from the palette's colour, in RGB


@dataclass(frozen=True)
class Found:
    """One object; attributes that fit nothing are "". `x`, `y`: centre over width and height."""

    colour: str
    shape: str
    size: str
    texture: str
    x: float
    y: float
    extent: float  # half of the larger side of the bounding box, over the shorter side
    overlap: float  # with the ideal outline of `shape`


def _shrink(image: np.ndarray) -> np.ndarray:
    """Means of n x n blocks, the shorter side then about `WORK`; smoothed a little."""
    n = max(1, round(min(image.shape[:2]) / WORK))
    h, w = image.shape[0] // n * n, image.shape[1] // n * n
    if n > 1:
        rows = np.add.reduceat(image[:h, :w], np.arange(0, h, n), axis=0)
        image = np.add.reduceat(rows, np.arange(0, w, n), axis=1) / np.float32(n * n)
    return ndimage.gaussian_filter(image, (0.6, 0.6, 0), truncate=3)


def _plane(image: np.ndarray) -> np.ndarray:
    """The ground: per channel a plane through the border's pixels, outliers left out."""
    h, w = image.shape[:2]
    frame = max(2, round(0.025 * min(h, w)))
    border = np.zeros((h, w), bool)
    border[:frame] = border[-frame:] = True
    border[:, :frame] = border[:, -frame:] = True
    y, x = np.nonzero(border)
    y, x = y[::3], x[::3]
    points = np.stack([np.ones(len(y)), x / w - 0.5, y / h - 0.5], axis=1)
    values = image[y, x]
    kept = np.linalg.norm(values - np.median(values, axis=0), axis=1) < 0.3
    plane = np.zeros((3, 3))
    plane[0] = np.median(values, axis=0)
    for _ in range(3):
        if kept.sum() < 16:
            break
        plane = np.linalg.lstsq(points[kept], values[kept], rcond=None)[0]
        kept = np.linalg.norm(values - points @ plane, axis=1) < 0.08
    xs, ys = np.arange(w) / w - 0.5, np.arange(h) / h - 0.5
    ground = plane[0] + xs[None, :, None] * plane[1] + ys[:, None, None] * plane[2]
    return ground.astype(np.float32)


_ROUND = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.3
_GRID = (np.arange(96) + 0.5) / 48 - 1
_OUTLINES = {
    shape: signed_distance(shape, _GRID[None, :] * 1.1, _GRID[:, None] * 1.1) <= 0
    for shape in SHAPES
}


def _shape(mask: np.ndarray, cx: float, cy: float, half: float) -> tuple[str, float]:
    """The best shape and its overlap; `mask` is sampled on a square 1.1 times the bounding box."""
    at = _GRID * 1.1 * half
    y = np.round(cy + at).astype(int)
    x = np.round(cx + at).astype(int)
    inside = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))[None, :]
    seen = mask[np.clip(y, 0, mask.shape[0] - 1)][:, np.clip(x, 0, mask.shape[1] - 1)] & inside
    overlaps = {
        shape: float((seen & ideal).sum() / max((seen | ideal).sum(), 1))
        for shape, ideal in _OUTLINES.items()
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return (best if overlaps[best] >= LEAST_OVERLAP[best] else ""), overlaps[best]


def _colour(pixels: np.ndarray) -> str:
    """The palette's colour of `pixels` [n, 3], if most of the coloured ones agree on it."""
    coloured = pixels[np.ptp(pixels, axis=1) > NEUTRAL]
    if len(coloured) < 0.25 * len(pixels):
        return ""
    palette = np.array(list(COLOURS.values()), np.float32)
    median = np.median(coloured, axis=0)
    distance = np.linalg.norm(palette - median, axis=1)
    best = int(distance.argmin())
    # Mixtures with the second tone stay near in direction: compare chroma, scaled to one length.
    chroma = coloured - coloured.mean(axis=1, keepdims=True)
    ideal = palette - palette.mean(axis=1, keepdims=True)
    chroma = chroma / (np.linalg.norm(chroma, axis=1, keepdims=True) + 1e-6)
    own = ideal[best] / np.linalg.norm(ideal[best])
    purity = float((chroma @ own > 0.8).mean())
    if distance[best] > FARTHEST_COLOUR or purity < LEAST_PURITY:
        return ""
    return tuple(COLOURS)[best]


def _texture(image: np.ndarray, inner: np.ndarray) -> str:
    """Best effort: by the share of the second tone and by how much gradients agree."""
    chroma = np.ptp(image, axis=2)
    full = float(np.quantile(chroma[inner], 0.85))
    neutral = 1 - np.clip(chroma / max(full, NEUTRAL), 0, 1)
    share = float((neutral[inner] > 0.5).mean())
    if share < 0.08:
        return "plain"
    dy, dx = (np.asarray(slope) for slope in np.gradient(neutral))
    xx, yy, xy = ((a * b)[inner].sum() for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    agreement = float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-6))
    if agreement > 0.55:
        return "striped"
    return "dotted" if share < 0.37 else "checked"


def describe(image: np.ndarray) -> list[Found]:
    """All objects of a picture, the largest first.

    Args:
        image: [height, width, 3] in [0, 1], any float or uint8 (then 0 to 255).
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be [height, width, 3], got {image.shape}")
    scale = 255.0 if image.dtype == np.uint8 else 1.0
    image = _shrink(np.asarray(image, np.float32) / np.float32(scale))
    h, w = image.shape[:2]
    short = min(h, w)
    difference = image - _plane(image)
    mask = np.einsum("hwc,hwc->hw", difference, difference) > CONTRAST**2
    # Where a colour blends into a white tone it can pass through the ground's colour: close such
    # seams, then drop single pixels.
    mask = ndimage.binary_closing(np.pad(mask, 3), _ROUND)[3:-3, 3:-3]
    mask = ndimage.binary_opening(mask, np.ones((2, 2), bool))
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3), int), output=labels)
    found = []
    areas = np.bincount(labels.ravel())
    boxes = ndimage.find_objects(labels)
    for label in (1 + np.argsort(-areas[1:])).tolist():
        if areas[label] < LEAST_AREA * h * w:
            break
        rows, columns = boxes[label - 1]
        own = labels[rows, columns] == label
        patch: np.ndarray = image[rows, columns]
        cy, cx = (own.shape[0] - 1) / 2, (own.shape[1] - 1) / 2
        half = max(own.shape) / 2
        shape, overlap = _shape(own, cx, cy, half)
        inner = np.asarray(ndimage.binary_erosion(own, iterations=2), bool)
        if inner.sum() < 12:
            inner = own
        extent = half / short
        size = next((name for name, low, high in SIZE_LIMITS if low <= extent < high), "")
        found.append(
            Found(
                _colour(patch[inner]),
                shape,
                size,
                _texture(patch, inner),
                (columns.start + cx + 0.5) / w,
                (rows.start + cy + 0.5) / h,
                extent,
                overlap,
            )
        )
    return found


ATTRIBUTES = ("colour", "shape", "size", "texture")


def _relation_holds(relation: str, a: Found, b: Found) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > 0 and along > 0.8 * across


def check(
    image: np.ndarray, scene: Scene, mentioned: tuple[str, ...] = ("colour", "shape", "size")
) -> dict[str, bool]:
    """Whether the picture shows the scene, attribute by attribute.

    Objects found are paired with the scene's things in the order that agrees best. `right` is true
    when the count, every attribute in `mentioned`, and the relation if there is one, agree.
    """
    found = describe(image)
    things = scene.things
    best: dict[str, bool] = dict.fromkeys(ATTRIBUTES, False)
    relation = not scene.relation
    if len(found) >= len(things):
        scored = []
        for order in permutations(found[:5], len(things)):
            agrees = {
                name: all(
                    getattr(f, name) == getattr(t, name) for f, t in zip(order, things, strict=True)
                )
                for name in ATTRIBUTES
            }
            holds = not scene.relation or _relation_holds(scene.relation, order[0], order[1])
            scored.append((sum(agrees[n] for n in mentioned) + holds, len(scored), agrees, holds))
        # Ties go to the earlier order, that is, to the larger objects.
        _, _, best, relation = max(scored, key=lambda entry: (entry[0], -entry[1]))
    result = {"count": len(found) == len(things), **best}
    if scene.relation:
        result["relation"] = relation
    result["right"] = result["count"] and relation and all(best[name] for name in mentioned)
    return result
