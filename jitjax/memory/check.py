"""Refuses a batch that cannot fit its device, before anything is compiled."""

from __future__ import annotations

import bisect
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from jitjax.checkpoint import PARTS, FluxParams
from jitjax.memory import programs
from jitjax.memory.programs import Settings
from jitjax.memory.weights import Divisions
from jitjax.models.quantised import float_dtype, kind_of
from jitjax.offload import in_host_memory
from jitjax.sampler.plan import Plan

UNAVOIDABLE = 0.4
"""Share of a program's temporaries that no order of its operations avoids: a product's operand,
result, and what is added to it. (5 + 1 + 1 of 12 arrays in a block of the transformer, and 2 + 1 of
7 in the decoder.)"""


def check_fits(
    params: FluxParams,
    grid: tuple[int, int],
    batch: int,
    plan: Plan,
    *,
    encode: bool,
    image: bool = False,
    negative: bool = False,
) -> None:
    """Raise if a batch cannot fit the device that the parameters are on.

    There is no false alarm: only what no order of operations avoids is counted, which is
    `UNAVOIDABLE` of the estimate. So a batch that passes may still not fit. Nothing is checked for
    traced parameters, several devices, and devices that do not say how much memory they have, such
    as CPUs.

    Args:
        params: the parameters.
        grid: rows and columns of tokens.
        batch: number of pictures.
        plan: the plan.
        encode: whether the text encoders run.
        image: whether pictures are encoded.
        negative: whether there are negative prompts.

    Raises:
        ValueError: it cannot; the message has the estimate, and what would fit.
    """
    leaves = jax.tree.leaves([getattr(params, part) for part in PARTS])
    if not leaves or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    devices = {device for leaf in leaves for device in leaf.sharding.device_set}
    if len(devices) != 1:
        return
    statistics = memory_statistics(next(iter(devices)))
    limit, used = statistics.get("bytes_limit"), statistics.get("bytes_in_use")
    if not limit or used is None:
        return
    low_memory = in_host_memory(leaves)
    runs = _Runs(encode, image, negative, low_memory)
    needed = _needed(params, grid, batch, plan, runs, UNAVOIDABLE)
    if used + needed <= limit:
        return
    estimate = _needed(params, grid, batch, plan, runs, 1.0)
    # The largest batch that fits, which is below this one: what is needed grows with the batch.
    fitting = bisect.bisect_right(
        range(1, batch),
        limit - used,
        key=lambda b: _needed(params, grid, b, plan, runs, 1.0),
    )
    height, width = (side * params.config.pixels_per_token for side in grid)
    hints = [f"a batch of {fitting}"] if fitting else ["a smaller size"]
    hints += ["quantised weights", *([] if low_memory else ["jitjax.load(path, low_memory=True)"])]
    raise ValueError(
        f"a batch of {batch} at {width} x {height} pixels does not fit the device: it needs about "
        f"{estimate / 1e9:.1f} GB beside the {used / 1e9:.1f} GB in use, of {limit / 1e9:.1f} GB; "
        f"expected less, such as {', or '.join(hints)} (see `jitjax memory --help`)"
    )


def memory_statistics(device: Any) -> dict[str, int]:
    """Return what a device says of its memory; nothing if it does not."""
    return device.memory_stats() or {}


class _Runs(NamedTuple):
    """What runs beside the transformer and the decoder; see `check_fits`."""

    encode: bool
    image: bool
    negative: bool
    low_memory: bool


def _needed(
    params: FluxParams,
    grid: tuple[int, int],
    batch: int,
    plan: Plan,
    runs: _Runs,
    share: float,
) -> float:
    """Bytes that the device has to have free, with a share of the temporaries."""
    dtype = float_dtype(params.transformer)
    settings = Settings(
        params.config,
        grid,
        batch,
        plan,
        dtype.name,
        kind_of(params.transformer),
        Divisions(),
        "gpu",
        "cudnn",
        runs.negative,
    )
    needed = [*programs.stages(settings), programs.decoder(settings)]
    if runs.image:
        needed.append(programs.image_encoder(settings))
    if runs.encode:
        needed.append(programs.encoders(settings))
    bytes_of = {part: _bytes(getattr(params, part)) for part in PARTS}
    return max(
        # Those of the text encoders are small.
        (0 if "t5" in program.parts else share * program.temporaries)
        + program.outputs
        + (sum(bytes_of[part] for part in program.parts) if runs.low_memory else 0)
        for program in needed
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
