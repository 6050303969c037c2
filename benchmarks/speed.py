"""Measures the transformer and whole plans: seconds, FLOP/s, compilation time and memory.

    python -m benchmarks.speed --model flux-dev --out speed.jsonl    on a GPU
    python -m benchmarks.speed --model middle --size 512 --dtype float32               on a CPU
    python -m benchmarks.speed --model flux-dev --plans --profile kernels.txt          kernels

Weights are random and created on the device. There is a row for a large matrix product, then one
for a single evaluation of the transformer at each number of tokens that the plans use, then one for
each plan from noise to clean tokens. Each row is written as soon as it is measured.

"share" is the FLOP/s of the row over the FLOP/s of the matrix product. "outside" is the share of a
plan's time beyond the time of its evaluations, measured separately. FLOPs are counted by
`benchmarks.quality.flops`, attention included.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jitjax
from benchmarks.quality import flops
from benchmarks.timing import (
    compile_for,
    device_info,
    matmul_rate,
    measure,
    random_params,
    record_row,
)
from jitjax.checkpoint import FluxParams
from jitjax.config import FluxConfig, T5Config, TransformerConfig
from jitjax.denoise import FluxVelocity, plan_for_device
from jitjax.models import param_shapes
from jitjax.models.attention import IMPLEMENTATIONS
from jitjax.models.devices import compiler_options
from jitjax.sampler.grid import positions

MODELS = {
    "flux-dev": TransformerConfig(),
    "middle": TransformerConfig(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        axes_dims_rope=(8, 28, 28),
    ),
}
PLANS = ("dense", "4x", "7x")


class Bench:
    """A transformer with random weights, and the inputs for one sample.

    Args:
        config: configuration of the transformer.
        side: side of the image in pixels, a multiple of 16.
        text: number of text tokens.
        dtype: dtype of the weights.
        attention: implementation of attention, see `jitjax.models.attention`.
    """

    def __init__(self, config: TransformerConfig, side: int, text: int, dtype: Any, attention: str):
        self.config, self.grid, self.text = config, (side // 16, side // 16), text
        self.tokens = self.grid[0] * self.grid[1]
        self.velocity = FluxVelocity(config, attention)
        self.params = FluxParams(
            transformer=random_params(param_shapes.transformer(config, dtype)),
            t5={},
            clip={},
            autoencoder={},
            config=FluxConfig(
                transformer=config,
                t5=T5Config(d_model=config.joint_attention_dim),
                text_length=text,
            ),
            tokenizer="",
        )
        keys = iter(jax.random.split(jax.random.key(1), 8))
        self.conditioning = jitjax.Conditioning(
            jax.random.normal(next(keys), (1, text, config.joint_attention_dim)),
            jax.random.normal(next(keys), (1, config.pooled_projection_dim)),
        )
        self.noise = jax.random.normal(next(keys), (1, self.tokens, config.in_channels))
        self.microflow_noise = jax.random.normal(next(keys), self.noise.shape)
        self.guidance = jnp.full((1,), 3.5)
        self.args = (self.params.transformer, self.conditioning, self.guidance)
        jax.block_until_ready((self.params, self.noise))

    def forward(self, tokens: int) -> tuple[Callable[[], Any], float]:
        """Compile one evaluation on the first `tokens` tokens.

        Returns:
            The compiled call, and the seconds that compilation took.
        """
        token_positions = positions(jnp.arange(tokens), self.grid)[None]
        y = self.noise[:, :tokens]
        args = (y, token_positions, jnp.float32(0.9), self.args)
        return compile_for(self._evaluate, *args, options=compiler_options())

    def _evaluate(
        self, y: jax.Array, token_positions: jax.Array, sigma: jax.Array, args: Any
    ) -> jax.Array:
        return self.velocity(y, token_positions, sigma, None, args)

    def plan(self, plan: jitjax.Plan) -> Callable[[], Any]:
        """Return a call that runs `plan` from noise to clean tokens; its first call compiles."""
        budget = plan.budgets(self.tokens, self.text)[0]
        anchors = np.random.default_rng(0).permutation(self.tokens)[None, :budget]
        return lambda: jitjax.denoise(
            self.params,
            self.conditioning,
            self.noise,
            plan=plan,
            grid=self.grid,
            guidance=self.guidance,
            first_anchors=jnp.asarray(anchors) if budget < self.tokens else None,
            microflow_noise=self.microflow_noise,
            attention=self.velocity.attention,
        )


def kernels(call: Callable[[], Any], folder: Path, limit: int = 40) -> str:
    """Profile one call with JAX's profiler.

    Args:
        call: the function to profile.
        folder: where the profiler writes its trace.
        limit: number of operations to list.

    Returns:
        A table of the operations that take the most time on the device, with time, share and count.
    """
    jax.block_until_ready(call())
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(call())
    files = sorted(folder.glob("**/*.xplane.pb"))
    planes = [p for file in files for p in jax.profiler.ProfileData.from_file(str(file)).planes]
    durations, counts = Counter(), Counter()
    for plane in [p for p in planes if "GPU" in p.name or "TPU" in p.name] or planes:
        for line in plane.lines:
            if "GPU" in plane.name and "Stream" not in line.name:
                continue
            for event in line.events:
                durations[event.name] += event.duration_ns
                counts[event.name] += 1
    total = sum(durations.values())
    rows = [f"{total / 1e6:10.3f} ms in all, {len(durations)} names"]
    rows += [
        f"{ns / 1e6:10.3f} ms {ns / max(total, 1):6.1%} {counts[name]:6d} x  {name[:160]}"
        for name, ns in durations.most_common(limit)
    ]
    return "\n".join(rows)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    p.add_argument("--model", default="flux-dev", choices=list(MODELS))
    p.add_argument("--size", type=int, default=1024, help="side in pixels (default: 1024)")
    p.add_argument("--text", type=int, default=512, help="text tokens (default: 512)")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--attention", default="auto", choices=IMPLEMENTATIONS)
    p.add_argument("--plans", nargs="*", default=list(PLANS), help="empty: only the transformer")
    p.add_argument("--rounds", type=int, default=5, help="timed calls per row (default: 5)")
    p.add_argument("--matmul", type=int, default=8192, help="side of the matrices (default: 8192)")
    p.add_argument("--minutes", type=float, default=60, help="start no row later (default: 60)")
    p.add_argument("--profile", type=Path, help="write a profile of one dense evaluation")
    return p


def main() -> None:
    """Print a JSON row per measurement."""
    args = make_parser().parse_args()
    start = time.perf_counter()

    def out_of_time() -> bool:
        return time.perf_counter() - start > 60 * args.minutes

    config = MODELS[args.model]
    run_info = {
        "model": args.model,
        "size": args.size,
        "dtype": args.dtype,
        "attention": args.attention,
        **device_info(),
    }
    matmul_speed = matmul_rate(args.dtype, args.matmul)
    record_row(args.out, {"row": "matmul", "tflops_per_second": matmul_speed / 1e12, **run_info})
    bench = Bench(config, args.size, args.text, args.dtype, args.attention)
    plans = {name: plan_for_device(jitjax.PLANS[name], args.dtype) for name in args.plans}
    slots = {name: flops.slots(plan, bench.tokens, args.text) for name, plan in plans.items()}
    counts = sorted({bench.tokens, *(s for run in slots.values() for s in run)}, reverse=True)
    evaluation_seconds: dict[int, float] = {}
    for count in counts:
        if out_of_time():
            return
        call, compile_seconds = bench.forward(count)
        timing = measure(call, args.rounds)
        assert bool(jnp.isfinite(call()).all()), "the velocity is not finite"
        speed = flops.forward(config, count, args.text) / timing.median
        evaluation_seconds[count] = timing.median
        row = {"row": "forward", "tokens": count, "compile": compile_seconds, **timing.row()}
        row |= {
            "tflops_per_second": speed / 1e12,
            "share": speed / matmul_speed,
            "peak_gb": _peak_gb(),
        }
        record_row(args.out, row | run_info)
    for name, plan in sorted(plans.items(), key=lambda item: len(slots[item[0]])):
        if out_of_time():
            return
        call, call_start = bench.plan(plan), time.perf_counter()
        tokens = jax.block_until_ready(call())
        first_seconds = time.perf_counter() - call_start
        assert bool(jnp.isfinite(tokens).all()), f"{name}: the result is not finite"
        timing = measure(call, max(3, args.rounds // 2))
        operations = flops.run(config, slots[name], args.text)
        speed, forward_seconds = (
            operations / timing.median,
            sum(evaluation_seconds[s] for s in slots[name]),
        )
        row = {
            "row": "plan",
            "plan": name,
            "first": first_seconds,
            **timing.row(),
            "tflop": operations / 1e12,
        }
        row |= {
            "tflops_per_second": speed / 1e12,
            "share": speed / matmul_speed,
        }
        row |= {"outside": 1 - forward_seconds / timing.median, "peak_gb": _peak_gb()}
        record_row(args.out, row | run_info)
    if args.profile:
        table = kernels(bench.forward(bench.tokens)[0], args.profile.with_suffix(".trace"))
        args.profile.write_text(table + "\n")
        print(table, flush=True)


def _peak_gb() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats["peak_bytes_in_use"] / 1e9


if __name__ == "__main__":
    main()
