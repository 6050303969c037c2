"""Times attention and compares its values, at the shapes of FLUX.1-dev's stages at 1024 px.

    python -m benchmarks.attention --out attention.jsonl     on a GPU: cuDNN against XLA
    python -m benchmarks.attention --implementations xla --heads 2 --width 16 --tokens 64

The error is ||out - reference|| / ||reference|| against the formula in float32 (products at the
highest precision), for the first head alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.timing import append, compiled, device, measure
from jitjax.models.attention import IMPLEMENTATIONS, attend

TEXT = 512
STAGES = (1310, 1433, 2457, 2539, 4096)
"""Image tokens per stage: `7x`'s first, `4x`'s first, `7x`'s second, `4x`'s second, all."""


def reference(query: Array, key: Array, value: Array, valid: int) -> Array:
    """The formula, in float32, of [b, s, heads, width] arrays whose first `valid` keys count."""
    q, k, v = (x.astype(jnp.float32) for x in (query, key[:, :valid], value[:, :valid]))
    logits = jnp.einsum("bqhw,bkhw->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(logits), v, precision="highest")


def error(got: Array, expected: Array) -> float:
    """||got - expected|| / ||expected||; NaN never passes."""
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def main() -> None:
    """One row per shape, padding and implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON lines; rows are added")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(STAGES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    for tokens in args.tokens:
        for multiple in (1, 128):  # not padded, and padded to a multiple
            valid = tokens + TEXT
            slots = -(-valid // multiple) * multiple
            if multiple > 1 and slots == valid:
                continue
            keys = jax.random.split(jax.random.key(tokens), 3)
            shape = (1, slots, args.heads, args.width)
            q, k, v = (jax.random.normal(key, shape, args.dtype) for key in keys)
            mask = None if slots == valid else (jnp.arange(slots) < valid)[None, None, None, :]
            expected = reference(q[:, :, :1], k[:, :, :1], v[:, :, :1], valid)
            for name in args.implementations:
                call, seconds = compiled(
                    lambda q, k, v, mask, name=name: attend(q, k, v, mask, name), q, k, v, mask
                )
                timing = measure(call, args.rounds)
                flops = 4 * slots**2 * args.heads * args.width
                append(
                    args.out,
                    {
                        "implementation": name,
                        "tokens": valid,
                        "slots": slots,
                        "error": error(call()[:, :valid, :1], expected[:, :valid]),
                        "compile": seconds,
                        "tflops_per_second": flops / timing.median / 1e12,
                        **timing.row(),
                        **device(),
                    },
                )


if __name__ == "__main__":
    main()
