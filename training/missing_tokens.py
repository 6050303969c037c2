"""Trains the transformer on with tokens missing, as JiT's sparse stages have them. Uses JAX.

    python -m training.scene_data --count 24576 --out SCENES          # once
    python -m training.missing_tokens --scenes SCENES --minutes 6 --out RUN

A step has two parts, and one update of the weights:

- Whole pictures teach the model on, and keep the guidance that it has learned: `flow.py`'s
  `--refine`. The averaged weights give the velocity without a prompt.
- Subsets of tokens, with their positions, teach it to answer when tokens are missing. The target
  is the guided velocity that the averaged weights predict from all tokens of the same noisy
  picture, at the tokens that are given. The best answer to it is what is known of that velocity
  from the subset. Unlike `noise - x0` it has no noise of its own that the model would have to
  average out.

Subsets are those of JiT's stages: mostly even rows and columns and the border, filled with random
tokens or with those of the highest importance. Three sizes take turns, so that all shapes are
static (`DENSITIES`). T5 and CLIP stay frozen.

`RUN` gets a diffusers folder of the averaged weights at each of `--snapshots`, shares of the time,
and a log. `jitjax convert RUN/at-1 --out CHECKPOINT` makes a checkpoint of one, which
`--checkpoint` continues from. `--no-missing` leaves the subsets out, for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, muon

import jitjax
from jitjax.convert.targets.diffusers_folder import write_folder
from jitjax.models.devices import compiler_options
from jitjax.models.flux import FluxTransformer
from jitjax.sampler.anchors import layout_priority, local_variance
from jitjax.sampler.grid import positions
from training.noise_levels import HIGH_SIGMAS, SHIFT

GRID = (32, 32)
TOKENS = GRID[0] * GRID[1]
DENSITIES = (0.3125, 0.46875, 0.6875)
"""Shares of tokens in the subsets; times `TOKENS` they are multiples of 16."""
SHIFT_512 = SHIFT[512]


class Scenes(NamedTuple):
    """The training set, on the device.

    Attributes:
        tokens: clean tokens, float16 [scenes, 1024, 64].
        things: (x, y, radius) of each thing, [scenes, 4, 3].
        captions: rows of `text`, [scenes, captions].
        text, pooled: T5 states and CLIP outputs of all captions; the last row is the empty one.
    """

    tokens: Array
    things: Array
    captions: Array
    text: Array
    pooled: Array


class Batch(NamedTuple):
    """Noisy pictures: `x` at noise level `sigma` [b], and what belongs to them."""

    x0: Array
    noise: Array
    sigma: Array
    guidance: Array
    rows: Array
    weights: Array

    @property
    def x(self) -> Array:
        sigma = self.sigma[:, None, None]
        return (1 - sigma) * self.x0 + sigma * self.noise


def load_scenes(folder: Path, params: jitjax.FluxParams, chunk: int = 512) -> Scenes:
    """Load a folder by `training.scene_data` and encode its captions."""
    captions = json.loads((folder / "captions.json").read_text())
    texts = [*sorted({text for row in captions for text in row}), ""]
    row_of = {text: row for row, text in enumerate(texts)}
    states, pooled = [], []
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        encoded = jitjax.encode_prompt(params, part + [""] * (chunk - len(part)))
        states.append(encoded.text[: len(part)].astype(jnp.float16))
        pooled.append(encoded.pooled[: len(part)])
    return Scenes(
        jnp.asarray(np.load(folder / "tokens.npy")),
        jnp.asarray(np.load(folder / "things.npy")),
        jnp.asarray([[row_of[text] for text in row] for row in captions]),
        jnp.concatenate(states),
        jnp.concatenate(pooled),
    )


def token_weights(things: Float[Array, "4 3"], unshifted: Array) -> Float[Array, " n"]:
    """Weight the tokens of a whole picture's loss, as `training.steps.token_weights` does."""
    rows, columns = GRID
    margin = 1 + jnp.clip(15 * (unshifted - 0.4), 0, 3)
    weights = jnp.ones(GRID)
    for x, y, radius in things:
        ends = []
        for centre, count in ((y, rows), (x, columns)):
            half = radius * count + margin
            low, high = (jnp.clip(jnp.round(centre * count + s * half), 0, count) for s in (-1, 1))
            ends.append((low, high, jnp.arange(count)))
        (top, bottom, r), (left, right, c) = ends
        inside = ((r >= top) & (r < bottom))[:, None] & ((c >= left) & (c < right))[None]
        weight = columns / jnp.sqrt(jnp.maximum((bottom - top) * (right - left), 1))
        weights = jnp.where(inside & (radius > 0), weight, weights)
    confidence = jnp.clip((0.75 - unshifted) / 0.15, 0, 1)
    weights = 1 + (weights - 1) * confidence
    return (weights / weights.mean()).reshape(-1)


def draw_batch(key: Array, scenes: Scenes, size: int, dropout: float) -> Batch:
    """Draw pictures, captions, noise, noise levels (as `training.steps`), and guidance scales.

    Args:
        key: `jax.random` key of all draws.
        scenes: the training set.
        size: pictures in the batch.
        dropout: probability of an empty caption.
    """
    keys = iter(jax.random.split(key, 8))
    index = jax.random.randint(next(keys), (size,), 0, len(scenes.tokens))
    choice = jax.random.randint(next(keys), (size,), 0, scenes.captions.shape[1])
    empty = len(scenes.text) - 1
    dropped = jax.random.uniform(next(keys), (size,)) < dropout
    rows = jnp.where(dropped, empty, scenes.captions[index, choice])
    uniform = (jnp.arange(size) + jax.random.uniform(next(keys), (size,))) / size
    share, start = HIGH_SIGMAS
    low = jnp.clip(uniform / (1 - share), 1e-4, 1 - 1e-4)
    low = jax.nn.sigmoid(0.4 + 0.9 * jax.scipy.special.ndtri(low))
    unshifted = jnp.where(uniform < 1 - share, low, 1 - (1 - start) * (1 - uniform) / share)
    unshifted = jax.random.permutation(next(keys), unshifted)
    sigma = SHIFT_512 * unshifted / (1 + (SHIFT_512 - 1) * unshifted)
    x0 = scenes.tokens[index].astype(jnp.float32)
    noise = jax.random.normal(next(keys), x0.shape)
    guidance = jax.random.uniform(next(keys), (size,), minval=2.0, maxval=4.0)
    weights = jax.vmap(token_weights)(scenes.things[index], unshifted)
    return Batch(x0, noise, sigma, guidance, rows, weights)


def draw_subset(key: Array, velocity: Float[Array, "b n c"], count: int) -> Array:
    """Draw `count` tokens per picture, [b, count].

    Four of five subsets hold the layout of JiT's first anchors. The others are without a layout.
    The rest is random in half of the subsets, and of the highest importance in the others.
    """
    batch = len(velocity)
    layout_key, kind_key, random_key = jax.random.split(key, 3)
    importance = local_variance(velocity, GRID)
    importance = importance / importance.max(axis=1, keepdims=True)
    random = jax.random.uniform(random_key, importance.shape)
    by_importance = jax.random.bernoulli(kind_key, 0.5, (batch, 1))
    scores = jnp.where(by_importance, importance + 1e-3 * random, random)
    has_layout = jax.random.bernoulli(layout_key, 0.8, (batch, 1))
    layout = jnp.asarray(layout_priority(GRID) > 0)[None]
    return jnp.sort(jax.lax.top_k(scores + 2.0 * (has_layout & layout), count)[1], axis=1)


def loss_parts(
    weights: Any,
    averaged: Any,
    key: Array,
    scenes: Scenes,
    *,
    model: FluxTransformer,
    sizes: tuple[int, int],
    count: int,
    dropout: float,
) -> tuple[Array, tuple[Array, Array]]:
    """Compute the loss of a step; see the module's description.

    Args:
        weights: parameters of the transformer, to be trained.
        averaged: averaged parameters.
        key: `jax.random` key of all draws.
        scenes: the training set.
        model: the transformer.
        sizes: number of whole pictures, and of subsets (0 for none).
        count: tokens of a subset.
        dropout: probability of an empty caption.

    Returns:
        The loss, and its two parts.
    """
    whole_size, subset_size = sizes
    batch_key, subset_key = jax.random.split(key)
    batch = draw_batch(batch_key, scenes, whole_size + subset_size, dropout)
    empty = len(scenes.text) - 1
    whole, part = slice(whole_size), slice(whole_size, None)
    everywhere = jnp.broadcast_to(positions(jnp.arange(TOKENS), GRID), (len(batch.x0), TOKENS, 3))

    def velocity(parameters, tokens, places, rows, sigma, guidance):
        text, pooled = scenes.text[rows].astype(jnp.float32), scenes.pooled[rows]
        inputs = tokens, places, text, pooled, sigma, guidance
        return model.apply({"params": parameters}, *inputs)

    teacher_rows = batch.rows.at[whole].set(empty)
    taught = jax.lax.stop_gradient(
        velocity(averaged, batch.x, everywhere, teacher_rows, batch.sigma, batch.guidance)
    )
    is_guided = batch.rows != empty
    scale = jnp.where(is_guided, batch.guidance, 1.0)[:, None, None]

    u = velocity(
        weights,
        batch.x[whole],
        everywhere[whole],
        batch.rows[whole],
        batch.sigma[whole],
        batch.guidance[whole],
    )
    implied = taught[whole] + (u - taught[whole]) / scale[whole]
    error = implied - (batch.noise - batch.x0)[whole]
    whole_loss = jnp.mean(batch.weights[whole, :, None] * error**2)
    if not subset_size:
        return whole_loss, (whole_loss, jnp.zeros(()))

    chosen = draw_subset(subset_key, taught[part], count)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x[part], chosen[:, :, None], axis=1)

    v = velocity(
        weights,
        take(batch.x),
        positions(chosen, GRID),
        batch.rows[part],
        batch.sigma[part],
        batch.guidance[part],
    )
    error = (v - take(taught)) / scale[part]
    subset_loss = jnp.mean(take(batch.weights[:, :, None]) * error**2)
    return whole_loss + subset_loss, (whole_loss, subset_loss)


def make_optimizer(weights: Any, muon_rate: float, adam_rate: float):
    """Return Muon for the matrices in the blocks, and AdamW for all else (modulations included)."""

    def dimensions(path: tuple, leaf: Array) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        if "blocks" not in names[0] or names[-1] != "kernel" or "modulation" in names[-2]:
            return None
        if names[-2] == "qkv":  # [blocks, hidden, 3, heads, head]: three matrices
            return MuonDimensionNumbers(1, (3, 4))
        return MuonDimensionNumbers(1, 2)

    return muon(
        muon_rate,
        weight_decay=0.01,
        adam_b2=0.95,
        adam_weight_decay=0.01,
        adam_learning_rate=adam_rate,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(dimensions, weights),
    )


def make_update(optimizer: optax.GradientTransformation, decay: float):
    """Return the jitted update: state, gradient, rate factor -> state."""

    @partial(jax.jit, donate_argnums=0)
    def update(state, gradient, factor):
        weights, averaged, moments, number = state
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1, 1 / (norm + 1e-6)), gradient)
        updates, moments = optimizer.update(gradient, moments, weights)
        weights = jax.tree.map(lambda w, u: w + factor * u, weights, updates)
        rate = 1 - jnp.minimum(decay, (1 + number) / (10 + number))
        averaged = jax.tree.map(lambda a, w: a + rate * (w - a), averaged, weights)
        return weights, averaged, moments, number + 1

    return update


def train(args: argparse.Namespace) -> None:
    """Train for `args.minutes` or `args.steps`, and write the snapshots."""
    params = jitjax.load(args.checkpoint)
    scenes = load_scenes(args.scenes, params)
    print(f"{len(scenes.tokens)} scenes, {len(scenes.text)} captions", flush=True)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = FluxTransformer(params.config.transformer, dtype=dtype, attention="auto")
    weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params.transformer)
    optimizer = make_optimizer(weights, args.muon, args.adam)
    sizes = (args.batch, 0 if args.no_missing else args.subsets)
    counts = (TOKENS,) if args.no_missing else tuple(round(d * TOKENS) for d in DENSITIES)
    update = make_update(optimizer, args.average)
    state = (weights, jax.tree.map(jnp.copy, weights), optimizer.init(weights), jnp.zeros(()))
    key = jax.random.key(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.txt").open("a")

    began = time.monotonic()

    def compile_gradient(count: int):
        compute = partial(loss_parts, model=model, sizes=sizes, count=count, dropout=args.dropout)
        gradient = jax.jit(jax.grad(compute, has_aux=True), compiler_options=compiler_options())
        return gradient.lower(state[0], state[1], key, scenes).compile()

    with ThreadPoolExecutor() as pool:
        gradients = dict(zip(counts, pool.map(compile_gradient, counts), strict=True))
    print(f"compiled in {time.monotonic() - began:.1f} s", flush=True)

    def save(share: float) -> None:
        averaged = dataclasses.replace(params, transformer=state[1])
        folder = args.out / f"at-{share:g}"
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(jax.tree.map(lambda x: x.astype(jnp.float16), averaged), folder)

    snapshots = sorted(args.snapshots)
    began, previous, losses_of = time.monotonic(), None, {count: [] for count in counts}
    reported = began
    for number in itertools.count():
        elapsed = (time.monotonic() - began) / (60 * args.minutes)
        if args.steps:
            elapsed = max(elapsed, number / args.steps)
        while snapshots and elapsed >= snapshots[0]:
            save(snapshots.pop(0))
        if elapsed >= 1:
            break
        warm = min(1.0, (number + 1) / args.warm_up)
        factor = warm * min(1.0, (1 - elapsed) / (1 - args.decay_from))
        count = counts[number % len(counts)]
        gradient, losses = gradients[count](
            state[0], state[1], jax.random.fold_in(key, number), scenes
        )
        state = update(state, gradient, jnp.asarray(factor))
        if previous is not None:  # one step is always in flight
            losses_of[previous[0]].append(np.asarray(previous[1]))
        previous = count, losses
        if time.monotonic() - reported > args.report:
            reported = time.monotonic()
            parts = [f"{c}: {np.mean(v[-50:], axis=0).round(5)}" for c, v in losses_of.items() if v]
            line = f"step {number + 1}, {reported - began:.0f} s, rate x{factor:.2f}, " + "; ".join(
                parts
            )
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            if not np.isfinite(losses_of[count][-1:]).all():
                raise FloatingPointError(f"loss is {losses_of[count][-1]} at step {number}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=Path, required=True, help="by training.scene_data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", default="tiny", help="where to start from")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, help="ends earlier, after this many steps")
    parser.add_argument("--batch", type=int, default=48, help="whole pictures per step")
    parser.add_argument("--subsets", type=int, default=96, help="subsets of tokens per step")
    parser.add_argument("--no-missing", action="store_true", help="whole pictures only")
    parser.add_argument("--muon", type=float, default=0.01, help="rate of the matrices")
    parser.add_argument("--adam", type=float, default=1e-3, help="rate of all else")
    parser.add_argument("--warm-up", type=int, default=100, help="steps until the full rate")
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the time")
    parser.add_argument("--average", type=float, default=0.995, help="decay of the average")
    parser.add_argument("--dropout", type=float, default=0.08, help="share of empty captions")
    parser.add_argument("--snapshots", type=float, nargs="+", default=[0.1, 0.4, 1.0])
    parser.add_argument("--report", type=float, default=10, help="seconds between lines")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
