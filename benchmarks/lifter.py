"""Measures the lifter's cost relative to one step of FLUX.1-dev.

    python -m benchmarks.lifter --grid 64 --repeats 5

The step is one of `4x`'s first stage. Its time is extrapolated from one double and one single block
at full width to 19 and 38 of them. Needs about 4 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp

from jitjax.config import TransformerConfig
from jitjax.models import param_shapes
from jitjax.models.flux import FluxTransformer
from jitjax.sampler.anchors import AnchorSet, first_anchors
from jitjax.sampler.grid import positions
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.plan import CHOICES, PLANS

FLUX = TransformerConfig()
CHANNELS = 64


def median_seconds(function: Callable[..., object], *inputs: object, repeats: int) -> float:
    """Return the median time of `function(*inputs)` in seconds, after a call that compiles it."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return median(times)


def time_blocks(double: int, single: int, tokens: int, text: int, repeats: int) -> float:
    """Time one evaluation of a full-width FLUX transformer.

    Args:
        double: number of double blocks.
        single: number of single blocks.
        tokens: number of image tokens.
        text: number of text tokens.
        repeats: number of timed evaluations.

    Returns:
        The median time in seconds.
    """
    config = dataclasses.replace(FLUX, num_layers=double, num_single_layers=single)
    params = jax.tree.map(
        lambda s: jnp.full(s.shape, 0.01, s.dtype), param_shapes.transformer(config)
    )
    model = FluxTransformer(config)
    grid = (tokens, 1)
    inputs = (
        jnp.ones((1, tokens, CHANNELS)),
        positions(jnp.arange(tokens)[None], grid),
        jnp.ones((1, text, config.joint_attention_dim)),
        jnp.ones((1, config.pooled_projection_dim)),
        jnp.ones(1),
        jnp.ones(1),
    )
    return median_seconds(jax.jit(model.apply), {"params": params}, *inputs, repeats=repeats)


def main() -> None:
    """Print the costs of building and of applying each kind of lift."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=int, default=64, help="tokens per side (default: 64)")
    parser.add_argument("--text", type=int, default=512, help="text tokens (default: 512)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    grid = (args.grid, args.grid)
    token_count = args.grid**2
    budget = PLANS["4x"].budgets(token_count)[0]
    tokens = budget + args.text
    base = time_blocks(1, 1, budget, args.text, args.repeats)
    single_seconds = time_blocks(1, 2, budget, args.text, args.repeats) - base
    double_seconds = time_blocks(2, 1, budget, args.text, args.repeats) - base
    step_seconds = FLUX.num_layers * double_seconds + FLUX.num_single_layers * single_seconds
    depth = FLUX.num_layers + FLUX.num_single_layers
    operations = depth * (24 * FLUX.hidden**2 * tokens + 4 * tokens**2 * FLUX.hidden)
    device = jax.devices()[0].device_kind
    print(f"{device}; {budget} anchors of {token_count} tokens, {args.text} text tokens")
    print(f"step of FLUX.1-dev: {step_seconds:.1f} s, {operations / 1e12:.1f} TFLOP")

    index = first_anchors(jax.random.key(0), grid, budget)[None]
    values = jax.random.normal(jax.random.key(1), (1, budget, CHANNELS))
    anchors = AnchorSet.padded(index, budget, token_count)
    lift = jax.jit(Lifter.__call__)
    build = jax.jit(Lifter.build, static_argnums=(1, 2, 3))
    for kind in CHOICES["lift"]:
        inputs = anchors, grid, budget, kind
        build_seconds = median_seconds(build, *inputs, repeats=args.repeats)
        lift_seconds = median_seconds(lift, build(*inputs), values, repeats=args.repeats)
        print(
            f"{kind:8s} per step {1e3 * lift_seconds:7.2f} ms = "
            f"{lift_seconds / step_seconds:.3%} of the step; "
            f"per stage {1e3 * build_seconds:7.1f} ms"
        )


if __name__ == "__main__":
    main()
