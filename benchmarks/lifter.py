"""Cost of the lifter beside one FLUX-size step: seconds, and operations counted.

    python -m benchmarks.lifter --grid 64 --repeats 5

The step is that of the first 4x stage of FLUX.1-dev: one double and one single block at full width
are timed, and taken 19 and 38 times. About 4 GB of memory.
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
from jitjax.models.flux import FluxTransformer, abstract_params
from jitjax.sampler.anchors import AnchorSet, first_anchors
from jitjax.sampler.grid import positions
from jitjax.sampler.lifter import Lifter
from jitjax.sampler.plan import CHOICES, PLANS

FLUX = TransformerConfig()
CHANNELS = 64


def seconds(run: Callable[..., object], *given: object, repeats: int) -> float:
    """Median time of `run(*given)`, after a call that compiles."""
    jax.block_until_ready(run(*given))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - start)
    return median(times)


def blocks(double: int, single: int, tokens: int, text: int, repeats: int) -> float:
    """Seconds of a FLUX transformer of full width with this many blocks."""
    config = dataclasses.replace(FLUX, num_layers=double, num_single_layers=single)
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), abstract_params(config))
    model = FluxTransformer(config)
    grid = (tokens, 1)
    given = (
        jnp.ones((1, tokens, CHANNELS)),
        positions(jnp.arange(tokens)[None], grid),
        jnp.ones((1, text, config.joint_attention_dim)),
        jnp.ones((1, config.pooled_projection_dim)),
        jnp.ones(1),
        jnp.ones(1),
    )
    return seconds(jax.jit(model.apply), {"params": params}, *given, repeats=repeats)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=int, default=64, help="tokens per side (default: 64)")
    parser.add_argument("--text", type=int, default=512, help="text tokens (default: 512)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    grid = (options.grid, options.grid)
    n = options.grid**2
    budget = PLANS["4x"].budgets(n)[0]
    total = budget + options.text
    one = blocks(1, 1, budget, options.text, options.repeats)
    more_single = blocks(1, 2, budget, options.text, options.repeats) - one
    more_double = blocks(2, 1, budget, options.text, options.repeats) - one
    step = FLUX.num_layers * more_double + FLUX.num_single_layers * more_single
    depth = FLUX.num_layers + FLUX.num_single_layers
    operations = depth * (24 * FLUX.hidden**2 * total + 4 * total**2 * FLUX.hidden)
    print(f"{jax.devices()[0].device_kind}; {budget} anchors of {n} tokens, {options.text} of text")
    print(f"step of FLUX.1-dev: {step:.1f} s, {operations / 1e12:.1f} TFLOP")

    index = first_anchors(jax.random.key(0), grid, budget)[None]
    values = jax.random.normal(jax.random.key(1), (1, budget, CHANNELS))
    anchors = AnchorSet.padded(index, budget, n)
    lift = jax.jit(Lifter.__call__)
    build = jax.jit(Lifter.build, static_argnums=(1, 2, 3))
    for kind in CHOICES["lift"]:
        given = anchors, grid, budget, kind
        once = seconds(build, *given, repeats=options.repeats)
        each = seconds(lift, build(*given), values, repeats=options.repeats)
        print(
            f"{kind:8s} per step {1e3 * each:7.2f} ms = {each / step:.3%} of the step; "
            f"per stage {1e3 * once:7.1f} ms"
        )


if __name__ == "__main__":
    main()
