"""Figures of a run: anchors, importance, clean predictions, and pictures side by side.

```python
images, trace = jitjax.sample(params, "a large red circle", plan="4x", key=key, trace=True)
jitjax.viz.show_trace(params, trace, grid)
```

They need matplotlib: `pip install "jitjax[viz]"`. Every function takes one sample of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import Image

from jitjax.checkpoint import FluxParams
from jitjax.files import atomic_file
from jitjax.sample import decode
from jitjax.sampler.grid import Grid, as_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jitjax.sampler.trace import Trace

PANEL = 2.6
"""Side of a picture in a figure, in inches."""
DIMMED = 0.35
"""Brightness of tokens that are no anchors."""
LEAST_SIDE = 384
"""Smaller pictures of an animation are enlarged by a whole factor to at least this height."""
FRAME_MILLISECONDS = 250
LAST_FRAME_MILLISECONDS = 1500
DECODED_AT_ONCE = 4
ANIMATIONS = {".webp": "WEBP", ".gif": "GIF"}
"""Suffix of an animation -> Pillow's name of the format."""


def show_anchors(
    trace: Trace, grid: Grid, *, image: Array | np.ndarray | None = None, sample: int = 0
) -> Figure:
    """Draw the anchors of each stage.

    Args:
        trace: the record of a run, from `denoise(..., trace=True)`.
        grid: rows and columns of tokens.
        image: the picture to draw them on, [height, width, 3] in [0, 1]; plain white by default.
        sample: index in the batch, from 0.

    Returns:
        A matplotlib figure: one panel per stage, tokens that are no anchors darkened.

    Raises:
        ValueError: the grid, the image or the sample does not fit.
        ImportError: matplotlib is missing.
    """
    grid = _check(trace, grid, sample)
    picture = np.ones((*grid, 3)) if image is None else _as_picture("image", image)
    figure, axes = _panels(1, len(trace.anchors), picture.shape[1] / picture.shape[0])
    for stage, axis in enumerate(axes[0]):
        active = _active(trace, grid, stage, sample)
        axis.imshow(_dimmed(picture, active))
        axis.set_title(_stage_title(trace, stage, active), fontsize=9)
    return figure


def show_trace(params: FluxParams, trace: Trace, grid: Grid, *, sample: int = 0) -> Figure:
    """Draw a run stage by stage, and the tokens of every step.

    Args:
        params: parameters; the autoencoder's decode the clean predictions.
        trace: the record of a run, from `denoise(..., trace=True)`.
        grid: rows and columns of tokens.
        sample: index in the batch, from 0.

    Returns:
        A matplotlib figure. Rows: the clean prediction at the end of each stage with its anchors;
        the importance by which the next stage's new anchors are chosen, and these; the number of
        tokens that the transformer runs on, as bars.

    Raises:
        ValueError: the grid or the sample does not fit.
        ImportError: matplotlib is missing.
    """
    grid = _check(trace, grid, sample)
    clean = jnp.stack([x[sample] for x in trace.clean])
    pictures = _decode(params, clean, grid)
    stages, aspect = len(pictures), grid[1] / grid[0]
    figure, axes = _panels(3, stages, aspect)
    for stage, picture in enumerate(pictures):
        active = _active(trace, grid, stage, sample)
        axes[0, stage].imshow(_dimmed(picture, active))
        axes[0, stage].set_title(_stage_title(trace, stage, active), fontsize=9)
        axis = axes[1, stage]
        transition = trace.transitions[stage] if stage < stages - 1 else None
        if transition is None:
            axis.imshow(picture)
            axis.set_title("clean prediction", fontsize=9)
            continue
        axis.imshow(np.asarray(transition.scores[sample]).reshape(grid), cmap="viridis")
        new = np.asarray(transition.new[sample])
        axis.plot(new % grid[1], new // grid[1], ".", color="white", markersize=2)
        axis.set_title(f"importance; dots: {len(new)} new anchors", fontsize=9)
    for axis in axes[2]:
        axis.remove()
    _draw_tokens(figure.add_subplot(axes[2, 0].get_gridspec()[2, :]), trace, grid)
    return figure


def compare(
    images: Mapping[str, Array | np.ndarray], *, reference: str | None = None, columns: int = 4
) -> Figure:
    """Draw pictures side by side.

    Args:
        images: name -> picture, [height, width, 3] in [0, 1], or a batch of one.
        reference: name of the picture to which the others' PSNR is given, in dB; None for none.
        columns: most pictures in a row, 1 or more.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there are no images, one is no picture, or the reference is none of them.
        ImportError: matplotlib is missing.
    """
    pictures = {name: _as_picture(name, image) for name, image in images.items()}
    if not pictures:
        raise ValueError("images is empty; expected at least one picture")
    if reference is not None and reference not in pictures:
        raise ValueError(f"reference is {reference!r}; expected one of {list(pictures)}")
    rows, columns = math.ceil(len(pictures) / columns), min(columns, len(pictures))
    height, width = next(iter(pictures.values())).shape[:2]
    figure, axes = _panels(rows, columns, width / height)
    for axis in axes.flat[len(pictures) :]:
        axis.remove()
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(picture)
        title = name
        if name == reference:
            title += "\nreference"
        elif reference is not None:
            title += f"\n{psnr(picture, pictures[reference]):.1f} dB"
        axis.set_title(title, fontsize=9)
    return figure


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two pictures, in dB; infinite if they are equal.

    Args:
        image, reference: pictures of one shape, in [0, 1].

    Returns:
        -10 log10 of the mean squared difference.

    Raises:
        ValueError: their shapes differ.

    Examples:
        >>> import numpy as np
        >>> round(jitjax.viz.psnr(np.zeros((8, 8, 3)), np.full((8, 8, 3), 0.1)), 3)
        20.0
    """
    if image.shape != reference.shape:
        raise ValueError(
            f"the pictures have shapes {list(image.shape)} and {list(reference.shape)}; expected "
            "equal ones"
        )
    error = float(((image - reference) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def frames(
    params: FluxParams, trace: Trace, grid: Grid, *, sample: int = 0
) -> list[Float[np.ndarray, "height width 3"]]:
    """Return the clean prediction of every step, the active anchors outlined, and the last picture.

    Args:
        params: parameters; the autoencoder's decode the predictions.
        trace: the record of a run, from `denoise(..., trace=True)`.
        grid: rows and columns of tokens.
        sample: index in the batch, from 0.

    Returns:
        One picture per step and one more, [height, width, 3] in [0, 1]; enlarged by a whole factor
        if they have fewer than 384 rows.

    Raises:
        ValueError: the grid or the sample does not fit.
    """
    grid = _check(trace, grid, sample)
    clean = trace.predictions()[:, sample]
    pictures = _decode(params, jnp.concatenate([clean, trace.states[-1:, sample]]), grid)
    drawn, step = [], 0
    for stage, steps in enumerate(trace.stage_steps):
        active = _active(trace, grid, stage, sample)
        drawn += [_outlined(picture, active) for picture in pictures[step : step + steps]]
        step += steps
    return [*drawn, _enlarged(pictures[-1])]


def animate(
    params: FluxParams,
    trace: Trace,
    grid: Grid,
    path: str | Path,
    *,
    sample: int = 0,
    overwrite: bool = True,
) -> Path:
    """Write an animation of a run: a WebP or GIF file with the pictures of `frames`.

    Args:
        params, trace, grid, sample: as for `frames`.
        path: the file; it is never half-written.
        overwrite: replace the file if it exists.

    Returns:
        The path.

    Raises:
        ValueError: the suffix is another, or the grid or the sample does not fit.
        OSError: the file cannot be written, or exists and may not be replaced.
    """
    path = Path(path)
    if path.suffix.lower() not in ANIMATIONS:
        raise ValueError(f"path is {str(path)!r}; expected a name that ends in .webp or .gif")
    # First of all, so that a file that cannot be written is told before anything is drawn.
    with atomic_file(path, overwrite=overwrite) as file:
        pictures = frames(params, trace, grid, sample=sample)
        first, *others = (Image.fromarray((p * 255).round().astype(np.uint8)) for p in pictures)
        durations = [FRAME_MILLISECONDS] * len(others) + [LAST_FRAME_MILLISECONDS]
        first.save(
            file,
            format=ANIMATIONS[path.suffix.lower()],
            save_all=True,
            append_images=others,
            duration=durations,
            loop=0,
        )
    return path


def _check(trace: Trace, grid: Any, sample: int) -> Grid:
    grid = as_grid(grid)
    batch, tokens = trace.start.shape[:2]
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid is {grid}; expected {tokens} tokens, as in the trace")
    if not 0 <= sample < batch:
        raise ValueError(f"sample is {sample}; expected 0 to {batch - 1}")
    return grid


def _as_picture(name: str, image: Any) -> Float[np.ndarray, "h w 3"]:
    picture = np.asarray(image, np.float32)
    if picture.ndim == 4 and picture.shape[0] == 1:
        picture = picture[0]
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{name} has shape {list(picture.shape)}; expected [height, width, 3]")
    return np.clip(picture, 0, 1)


def _decode(params: FluxParams, tokens: Array, grid: Grid) -> Float[np.ndarray, "k h w 3"]:
    """Decode tokens, [k, n, d], to pictures in [0, 1]: `DECODED_AT_ONCE`, all by one program."""
    pictures: list[np.ndarray] = []
    count = min(len(tokens), DECODED_AT_ONCE)
    for end in range(count, len(tokens) + count, count):
        # The last piece begins earlier, or another program would be compiled for what is left.
        first = min(end, len(tokens)) - count
        piece = np.asarray(decode(params, tokens[first : first + count], grid=grid))
        pictures.extend(piece[len(pictures) - first :])
    return np.clip(np.stack(pictures), 0, 1)


def _active(trace: Trace, grid: Grid, stage: int, sample: int) -> Bool[np.ndarray, "rows columns"]:
    tokens = np.arange(grid[0] * grid[1])
    return np.isin(tokens, trace.anchors[stage][sample]).reshape(grid)


def _per_pixel(active: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Repeat each token's value over its pixels."""
    height, width = (a // b for a, b in zip(picture.shape, active.shape, strict=False))
    if (height * active.shape[0], width * active.shape[1]) != picture.shape[:2]:
        raise ValueError(
            f"image has shape {list(picture.shape)}; expected a multiple of the grid {active.shape}"
        )
    return np.repeat(np.repeat(active, height, 0), width, 1)


def _dimmed(picture: np.ndarray, active: np.ndarray) -> np.ndarray:
    return picture * np.where(_per_pixel(active, picture), 1, DIMMED)[..., None]


def _enlarged(picture: np.ndarray) -> np.ndarray:
    factor = math.ceil(LEAST_SIDE / picture.shape[0])
    return np.repeat(np.repeat(picture, factor, 0), factor, 1)


def _outlined(picture: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Enlarge a picture, and draw lines between active and other tokens."""
    picture = _enlarged(picture)
    pixels = _per_pixel(active, picture)
    edge = np.zeros_like(pixels)
    edge[:-1] |= pixels[:-1] != pixels[1:]
    edge[:, :-1] |= pixels[:, :-1] != pixels[:, 1:]
    # White on dark and black on light, so that lines show on every ground.
    line = np.where(picture.mean(-1, keepdims=True) < 0.5, 1.0, 0.0)
    return np.where(edge[..., None], 0.5 * picture + 0.5 * line, picture)


def _stage_title(trace: Trace, stage: int, active: np.ndarray) -> str:
    first = sum(trace.stage_steps[:stage]) + 1
    last = first + trace.stage_steps[stage] - 1
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{steps}: {active.sum()} of {active.size} tokens"


def _draw_tokens(axis: Any, trace: Trace, grid: Grid) -> None:
    steps = np.arange(1, len(trace.slots) + 1)
    axis.bar(steps, trace.slots, width=0.8)
    axis.axhline(grid[0] * grid[1], color="grey", linewidth=0.8)
    axis.set_xticks(steps)
    axis.set_xlabel("step")
    axis.set_ylabel("tokens that the transformer runs on")


def _panels(rows: int, columns: int, aspect: float) -> tuple[Figure, Any]:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('jitjax.viz needs matplotlib: pip install "jitjax[viz]"') from error
    size = columns * PANEL * max(aspect, 0.75) + 0.4, rows * (PANEL + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


__all__: Sequence[str] = ("animate", "compare", "frames", "psnr", "show_anchors", "show_trace")
