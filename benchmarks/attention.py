"""Measures speed and error of attention at the shapes of FLUX.1-dev's stages at 1024 px.

    python -m benchmarks.attention --out attention.jsonl     on a GPU: cuDNN and XLA
    python -m benchmarks.attention --implementations xla --heads 2 --width 16 --tokens 64

The error is ||output - reference|| / ||reference|| for the first head. The reference is computed in
float32 with matrix products at the highest precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.timing import compile_for, device_info, measure, record_row
from jitjax.models.attention import IMPLEMENTATIONS, attend

TEXT_TOKENS = 512
IMAGE_TOKENS = (1310, 1433, 2457, 2539, 4096)
"""Image tokens per stage: `7x`'s first, `4x`'s first, `7x`'s second, `4x`'s second, dense."""


def reference(query: Array, key: Array, value: Array, valid: int) -> Array:
    """Compute attention in float32 for [batch, tokens, heads, width]; only `valid` keys count."""
    q, k, v = (x.astype(jnp.float32) for x in (query, key[:, :valid], value[:, :valid]))
    logits = jnp.einsum("bqhw,bkhw->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(logits), v, precision="highest")


def relative_error(actual: Array, expected: Array) -> float:
    """Return ||actual - expected|| / ||expected||."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def main() -> None:
    """Print a JSON row per shape, padding and implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["xla", "cudnn"]
    )
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(IMAGE_TOKENS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    for tokens in args.tokens:
        for pad_to in (1, 128):
            valid = tokens + TEXT_TOKENS
            slots = -(-valid // pad_to) * pad_to
            if pad_to > 1 and slots == valid:
                continue
            keys = jax.random.split(jax.random.key(tokens), 3)
            shape = (1, slots, args.heads, args.width)
            q, k, v = (jax.random.normal(key, shape, args.dtype) for key in keys)
            mask = None if slots == valid else (jnp.arange(slots) < valid)[None, None, None, :]
            expected = reference(q[:, :, :1], k[:, :, :1], v[:, :, :1], valid)
            for name in args.implementations:
                call, compile_seconds = compile_for(
                    lambda q, k, v, mask, name=name: attend(q, k, v, mask, name), q, k, v, mask
                )
                timing = measure(call, args.rounds)
                flops = 4 * slots**2 * args.heads * args.width
                record_row(
                    args.out,
                    {
                        "implementation": name,
                        "tokens": valid,
                        "slots": slots,
                        "error": relative_error(call()[:, :valid, :1], expected[:, :valid]),
                        "compile": compile_seconds,
                        "tflops_per_second": flops / timing.median / 1e12,
                        **timing.row(),
                        **device_info(),
                    },
                )


if __name__ == "__main__":
    main()
