"""Image checker: detects the objects in an image and compares them with a `training.scenes.Scene`.

    objects = describe(image)          # a list of `DetectedObject`: colour, shape, size, texture
    result = check(image, scene)       # {"count": True, "colour": True, ..., "right": True}

The background is a plane in each channel, fitted to the border. Connected regions that differ from
it are objects. An object's shape is the ideal outline of the same extent with the largest
intersection over union; below `MIN_OVERLAP` the object has no shape. The checker uses numpy and
scipy only. It was validated on rendered scenes with noise, blur and JPEG compression, and never
tuned on generated images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from training.scenes import COLOURS, SHAPES, Scene, signed_distance

WORKING_SIDE = 256  # images are averaged down to about this shorter side first
MIN_CONTRAST = 0.13  # Euclidean distance in RGB between an object and the background
MIN_AREA = 0.002  # share of the image; smaller regions are ignored
SIZE_RANGES = (("small", 0.075, 0.155), ("medium", 0.155, 0.25), ("large", 0.25, 0.40))
# Minimum intersection over union with the ideal outline. Each is a little below the lowest value
# in rendered scenes of 256 and 512 px, three in four of them with noise, blur or JPEG compression.
MIN_OVERLAP = {
    "circle": 0.88,
    "square": 0.88,
    "triangle": 0.80,
    "star": 0.75,
    "ring": 0.83,
    "cross": 0.86,
}
MAX_NEUTRAL_CHROMA = 0.22  # largest channel minus smallest; below, a pixel is of the second tone
MIN_PURITY = 0.75  # share of an object's coloured pixels that have its colour
MAX_COLOUR_DISTANCE = 0.30  # Euclidean distance in RGB from the palette's colour


@dataclass(frozen=True)
class DetectedObject:
    """One object in an image.

    Attributes:
        colour, shape, size, texture: words of `training.scenes`; "" where no word fits.
        x, y: centre of the bounding box, as fractions of the image's width and height.
        extent: half of the larger side of the bounding box, over the image's shorter side.
        overlap: intersection over union with the best ideal outline.
    """

    colour: str
    shape: str
    size: str
    texture: str
    x: float
    y: float
    extent: float
    overlap: float


def _downsample(image: np.ndarray) -> np.ndarray:
    """Average blocks to a shorter side of about `WORKING_SIDE`, then smooth slightly."""
    factor = max(1, round(min(image.shape[:2]) / WORKING_SIDE))
    h, w = image.shape[0] // factor * factor, image.shape[1] // factor * factor
    if factor > 1:
        rows = np.add.reduceat(image[:h, :w], np.arange(0, h, factor), axis=0)
        image = np.add.reduceat(rows, np.arange(0, w, factor), axis=1) / np.float32(factor * factor)
    return ndimage.gaussian_filter(image, (0.6, 0.6, 0), truncate=3)


def _fit_background(image: np.ndarray) -> np.ndarray:
    """Fit a plane per channel to the border's pixels, without outliers; evaluate it everywhere."""
    h, w = image.shape[:2]
    margin = max(2, round(0.025 * min(h, w)))
    border = np.zeros((h, w), bool)
    border[:margin] = border[-margin:] = True
    border[:, :margin] = border[:, -margin:] = True
    y, x = np.nonzero(border)
    y, x = y[::3], x[::3]
    basis = np.stack([np.ones(len(y)), x / w - 0.5, y / h - 0.5], axis=1)
    values = image[y, x]
    inliers = np.linalg.norm(values - np.median(values, axis=0), axis=1) < 0.3
    plane = np.zeros((3, 3))
    plane[0] = np.median(values, axis=0)
    for _ in range(3):
        if inliers.sum() < 16:
            break
        plane = np.linalg.lstsq(basis[inliers], values[inliers], rcond=None)[0]
        inliers = np.linalg.norm(values - basis @ plane, axis=1) < 0.08
    xs, ys = np.arange(w) / w - 0.5, np.arange(h) / h - 0.5
    background = plane[0] + xs[None, :, None] * plane[1] + ys[:, None, None] * plane[2]
    return background.astype(np.float32)


_DISC = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.3
_GRID = (np.arange(96) + 0.5) / 48 - 1
_OUTLINES = {
    shape: signed_distance(shape, _GRID[None, :] * 1.1, _GRID[:, None] * 1.1) <= 0
    for shape in SHAPES
}


def _classify_shape(mask: np.ndarray, cx: float, cy: float, half: float) -> tuple[str, float]:
    """Return the shape with the largest overlap, or "", and that overlap.

    `cx`, `cy` and `half` are the centre and half the larger side of the bounding box, in pixels.
    The mask is sampled on a square 1.1 times as large, so that pixels outside an outline count.
    """
    offsets = _GRID * 1.1 * half
    y = np.round(cy + offsets).astype(int)
    x = np.round(cx + offsets).astype(int)
    inside = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))[None, :]
    sampled = mask[np.clip(y, 0, mask.shape[0] - 1)][:, np.clip(x, 0, mask.shape[1] - 1)] & inside
    overlaps = {
        shape: float((sampled & ideal).sum() / max((sampled | ideal).sum(), 1))
        for shape, ideal in _OUTLINES.items()
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return (best if overlaps[best] >= MIN_OVERLAP[best] else ""), overlaps[best]


def _classify_colour(pixels: np.ndarray) -> str:
    """Return the palette's colour for `pixels` [n, 3], or "" where too few of them have it."""
    coloured = pixels[np.ptp(pixels, axis=1) > MAX_NEUTRAL_CHROMA]
    if len(coloured) < 0.25 * len(pixels):
        return ""
    palette = np.array(list(COLOURS.values()), np.float32)
    median = np.median(coloured, axis=0)
    distance = np.linalg.norm(palette - median, axis=1)
    best = int(distance.argmin())
    # Mixing with the second tone hardly changes the direction of the chroma: compare directions.
    chroma = coloured - coloured.mean(axis=1, keepdims=True)
    ideal = palette - palette.mean(axis=1, keepdims=True)
    chroma = chroma / (np.linalg.norm(chroma, axis=1, keepdims=True) + 1e-6)
    direction = ideal[best] / np.linalg.norm(ideal[best])
    purity = float((chroma @ direction > 0.8).mean())
    if distance[best] > MAX_COLOUR_DISTANCE or purity < MIN_PURITY:
        return ""
    return tuple(COLOURS)[best]


def _classify_texture(image: np.ndarray, inner: np.ndarray) -> str:
    """Classify by the share of the second tone and by how well gradient directions agree."""
    chroma = np.ptp(image, axis=2)
    full_chroma = float(np.quantile(chroma[inner], 0.85))
    neutral = 1 - np.clip(chroma / max(full_chroma, MAX_NEUTRAL_CHROMA), 0, 1)
    share = float((neutral[inner] > 0.5).mean())
    if share < 0.08:
        return "plain"
    dy, dx = (np.asarray(slope) for slope in np.gradient(neutral))
    xx, yy, xy = ((a * b)[inner].sum() for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    coherence = float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-6))
    if coherence > 0.55:
        return "striped"
    return "dotted" if share < 0.37 else "checked"


def describe(image: np.ndarray) -> list[DetectedObject]:
    """Detect all objects in an image.

    Args:
        image: [height, width, 3], floats in [0, 1] or uint8 from 0 to 255.

    Returns:
        The objects, the largest first.

    Raises:
        ValueError: `image` has another shape.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image has shape {list(image.shape)}; expected [height, width, 3]")
    scale = 255.0 if image.dtype == np.uint8 else 1.0
    image = _downsample(np.asarray(image, np.float32) / np.float32(scale))
    h, w = image.shape[:2]
    short_side = min(h, w)
    difference = image - _fit_background(image)
    mask = np.einsum("hwc,hwc->hw", difference, difference) > MIN_CONTRAST**2
    # Where a colour blends into a white tone it can pass through the background's colour: close
    # such seams, then drop single pixels.
    mask = ndimage.binary_closing(np.pad(mask, 3), _DISC)[3:-3, 3:-3]
    mask = ndimage.binary_opening(mask, np.ones((2, 2), bool))
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3), int), output=labels)
    detected = []
    areas = np.bincount(labels.ravel())
    boxes = ndimage.find_objects(labels)
    for label in (1 + np.argsort(-areas[1:])).tolist():
        if areas[label] < MIN_AREA * h * w:
            break
        rows, columns = boxes[label - 1]
        component_mask = labels[rows, columns] == label
        patch: np.ndarray = image[rows, columns]
        cy, cx = (component_mask.shape[0] - 1) / 2, (component_mask.shape[1] - 1) / 2
        half = max(component_mask.shape) / 2
        shape, overlap = _classify_shape(component_mask, cx, cy, half)
        inner = np.asarray(ndimage.binary_erosion(component_mask, iterations=2), bool)
        if inner.sum() < 12:
            inner = component_mask
        extent = half / short_side
        size = next((name for name, low, high in SIZE_RANGES if low <= extent < high), "")
        detected.append(
            DetectedObject(
                _classify_colour(patch[inner]),
                shape,
                size,
                _classify_texture(patch, inner),
                (columns.start + cx + 0.5) / w,
                (rows.start + cy + 0.5) / h,
                extent,
                overlap,
            )
        )
    return detected


ATTRIBUTES = ("colour", "shape", "size", "texture")


def _relation_holds(relation: str, a: DetectedObject, b: DetectedObject) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > 0 and along > 0.8 * across


def check(
    image: np.ndarray, scene: Scene, mentioned: tuple[str, ...] = ("colour", "shape", "size")
) -> dict[str, bool]:
    """Compare the objects in an image with a scene, attribute by attribute.

    Detected objects are paired with the scene's things in the order that matches best.

    Args:
        image: [height, width, 3], floats in [0, 1] or uint8 from 0 to 255.
        scene: what the image should show.
        mentioned: the attributes that "right" depends on.

    Returns:
        Whether "count", each of `ATTRIBUTES` and, if the scene has one, "relation" match; and
        "right", which is true when count, relation and every attribute in `mentioned` match.
    """
    detected = describe(image)
    things = scene.things
    best: dict[str, bool] = dict.fromkeys(ATTRIBUTES, False)
    relation = not scene.relation
    if len(detected) >= len(things):
        candidates = []
        for order in permutations(detected[:5], len(things)):
            matches = {
                name: all(
                    getattr(f, name) == getattr(t, name) for f, t in zip(order, things, strict=True)
                )
                for name in ATTRIBUTES
            }
            related = not scene.relation or _relation_holds(scene.relation, order[0], order[1])
            score = sum(matches[name] for name in mentioned) + related
            candidates.append((score, len(candidates), matches, related))
        # Ties go to the earlier order, whose objects are larger.
        _, _, best, relation = max(candidates, key=lambda entry: (entry[0], -entry[1]))
    result = {"count": len(detected) == len(things), **best}
    if scene.relation:
        result["relation"] = relation
    result["right"] = result["count"] and relation and all(best[name] for name in mentioned)
    return result
