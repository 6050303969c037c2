"""Times the transformer and whole plans: seconds, FLOP/s, compilation, memory.

    python -m benchmarks.speed --model flux-dev --attention cudnn --out speed.jsonl    on a GPU
    python -m benchmarks.speed --model middle --size 512 --dtype float32               on a CPU
    python -m benchmarks.speed --model flux-dev --plans --profile kernels.txt          kernels

Weights are random and made on the device. Rows come in this order, each written as soon as it is
known: a large matrix product, one evaluation of the transformer at each number of tokens that the
plans run, then each plan from noise to clean tokens. "share" is the FLOP/s over those of the matrix
product; "outside" the share of a plan's time that its evaluations alone do not explain. FLOPs are
those of `benchmarks.quality.flops`, attention counted.
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
from benchmarks.timing import append, compiled, device, matmul_rate, measure, random_params
from jitjax.config import FluxConfig, TransformerConfig
from jitjax.denoise import FluxVelocity, flux_sigmas
from jitjax.models.flux import abstract_params
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
    """A model of random weights, and one sample to run it on."""

    def __init__(self, config: TransformerConfig, side: int, text: int, dtype: Any, attention: str):
        self.config, self.grid, self.text = config, (side // 16, side // 16), text
        self.tokens = self.grid[0] * self.grid[1]
        self.velocity = FluxVelocity(config, attention)
        self.params = random_params(abstract_params(config, dtype))
        keys = iter(jax.random.split(jax.random.key(1), 8))
        self.conditioning = jitjax.Conditioning(
            jax.random.normal(next(keys), (1, text, config.joint_attention_dim)),
            jax.random.normal(next(keys), (1, config.pooled_projection_dim)),
        )
        self.noise = jax.random.normal(next(keys), (1, self.tokens, config.in_channels))
        self.microflow_noise = jax.random.normal(next(keys), self.noise.shape)
        self.guidance = jnp.full((1,), 3.5)
        self.args = (self.params, self.conditioning, self.guidance)
        jax.block_until_ready((self.params, self.noise))

    def forward(self, tokens: int) -> tuple[Callable[[], Any], float]:
        """One evaluation on the first `tokens` tokens, and the seconds to compile it."""
        places = positions(jnp.arange(tokens), self.grid)[None]
        y = self.noise[:, :tokens]
        return compiled(self._evaluate, y, places, jnp.float32(0.9), self.args)

    def _evaluate(self, y: jax.Array, places: jax.Array, sigma: jax.Array, args: Any) -> jax.Array:
        return self.velocity(y, places, sigma, None, args)

    def plan(self, plan: jitjax.Plan) -> Callable[[], Any]:
        """Noise to clean tokens."""
        budget = plan.budgets(self.tokens, self.text)[0]
        anchors = np.random.default_rng(0).permutation(self.tokens)[None, :budget]
        sparse = budget < self.tokens
        sigmas = jnp.asarray(flux_sigmas(plan, self.tokens, FluxConfig()))
        return lambda: jitjax.jit_solve(
            self.velocity,
            self.noise,
            sigmas,
            plan=plan,
            grid=self.grid,
            first_anchors=jnp.asarray(anchors) if sparse else None,
            microflow_noise=self.microflow_noise,
            args=self.args,
            text_tokens=self.text,
        )


def kernels(call: Callable[[], Any], folder: Path, most: int = 40) -> str:
    """The operations of one call that take most of the device's time, by JAX's profiler."""
    jax.block_until_ready(call())
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(call())
    found = sorted(folder.glob("**/*.xplane.pb"))
    planes = [p for f in found for p in jax.profiler.ProfileData.from_file(str(f)).planes]
    spent, times = Counter(), Counter()
    for plane in [p for p in planes if "GPU" in p.name or "TPU" in p.name] or planes:
        for line in plane.lines:
            if "GPU" in plane.name and "Stream" not in line.name:
                continue
            for event in line.events:
                spent[event.name] += event.duration_ns
                times[event.name] += 1
    total = sum(spent.values())
    rows = [f"{total / 1e6:10.3f} ms in all, {len(spent)} names"]
    rows += [
        f"{ns / 1e6:10.3f} ms {ns / max(total, 1):6.1%} {times[name]:6d} x  {name[:160]}"
        for name, ns in spent.most_common(most)
    ]
    return "\n".join(rows)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="JSON lines; rows are added")
    p.add_argument("--model", default="flux-dev", choices=list(MODELS))
    p.add_argument("--size", type=int, default=1024, help="side in pixels (default: 1024)")
    p.add_argument("--text", type=int, default=512, help="text tokens (default: 512)")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--attention", default="xla", help="xla or cudnn (default: xla)")
    p.add_argument("--plans", nargs="*", default=list(PLANS), help="none: the transformer alone")
    p.add_argument("--rounds", type=int, default=5, help="calls that are timed (default: 5)")
    p.add_argument("--matmul", type=int, default=8192, help="size of the matrix product")
    p.add_argument("--minutes", type=float, default=60, help="begin no row after this long")
    p.add_argument("--profile", type=Path, help="write what one dense evaluation spends time on")
    return p


def main() -> None:
    """Print a JSON row for each thing measured."""
    args = parser().parse_args()
    start = time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - start > 60 * args.minutes

    config = MODELS[args.model]
    facts = {
        "model": args.model,
        "size": args.size,
        "dtype": args.dtype,
        "attention": args.attention,
        **device(),
    }
    ceiling = matmul_rate(args.dtype, args.matmul)
    append(args.out, {"row": "matmul", "tflops_per_second": ceiling / 1e12, **facts})
    bench = Bench(config, args.size, args.text, args.dtype, args.attention)
    plans = {name: jitjax.PLANS[name] for name in args.plans}
    slots = {name: flops.slots(plan, bench.tokens, args.text) for name, plan in plans.items()}
    counts = sorted({bench.tokens, *(s for run in slots.values() for s in run)}, reverse=True)
    alone: dict[int, float] = {}
    for count in counts:
        if late():
            return
        call, seconds = bench.forward(count)
        timing = measure(call, args.rounds)
        assert bool(jnp.isfinite(call()).all()), "the velocity is not finite"
        rate = flops.forward(config, count, args.text) / timing.median
        alone[count] = timing.median
        row = {"row": "forward", "tokens": count, "compile": seconds, **timing.row()}
        row |= {"tflops_per_second": rate / 1e12, "share": rate / ceiling, "peak_gb": _peak_gb()}
        append(args.out, row | facts)
    for name, plan in sorted(plans.items(), key=lambda item: len(slots[item[0]])):
        if late():
            return
        call, first = bench.plan(plan), time.perf_counter()
        tokens = jax.block_until_ready(call())
        first = time.perf_counter() - first
        assert bool(jnp.isfinite(tokens).all()), f"{name}: the result is not finite"
        timing = measure(call, max(3, args.rounds // 2))
        work = flops.run(config, slots[name], args.text)
        rate, inside = work / timing.median, sum(alone[s] for s in slots[name])
        row = {"row": "plan", "plan": name, "first": first, **timing.row(), "tflop": work / 1e12}
        row |= {"tflops_per_second": rate / 1e12, "share": rate / ceiling}
        row |= {"outside": 1 - inside / timing.median, "peak_gb": _peak_gb()}
        append(args.out, row | facts)
    if args.profile:
        table = kernels(bench.forward(bench.tokens)[0], args.profile.with_suffix(".trace"))
        args.profile.write_text(table + "\n")
        print(table, flush=True)


def _peak_gb() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats["peak_bytes_in_use"] / 1e9


if __name__ == "__main__":
    main()
