"""Measures quantised weights: error of the velocity, bytes, speed, and pictures.

    python -m benchmarks.quantisation                  errors, bytes and speed, of tiny and middle
    python -m benchmarks.quantisation --pictures 24    and pictures of the bundled checkpoint

The models are those of `benchmarks.speed_models`; the weights of "middle" are random. All is
compared in one process with the same weights unquantised: errors on the same inputs, speed in
turns, pictures from the same noise. Rows are JSON lines.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jitjax
from benchmarks.quality.__main__ import sample_batch
from benchmarks.quality.judging import judge_image, similarity
from benchmarks.quality.methods import parse_method
from benchmarks.quality.prompts import prompts
from benchmarks.quality.runner import Runner
from benchmarks.quality.scores import interval
from benchmarks.speed_models import MODELS, Bench, load_params
from benchmarks.timing import compile_for, device_info, measure_in_turns, record_row
from jitjax.checkpoint import quantise_params
from jitjax.models.devices import compiler_options
from jitjax.models.quantised import KINDS, Quantised, dequantise, quantise_stack
from jitjax.sampler.grid import positions

SIGMAS = (1.0, 0.7, 0.4, 0.1)
BATCH = 4


def errors(model: str, side: int) -> Iterator[dict[str, Any]]:
    """Yield the relative error of the velocity, the root mean square over tokens and channels."""
    reference = Bench(model, side, None, "float32", "auto")
    where = positions(jnp.arange(reference.tokens), reference.grid)[None]
    prompt = reference.args[1]
    if MODELS[model] is None:  # a trained model, and a real prompt
        encoders = jitjax.load(model, parts=("t5", "clip"))
        prompt = jitjax.encode_prompt(encoders, "a large red circle, blue background")
    evaluate = jax.jit(lambda y, sigma, args: reference.velocity(y, where, sigma, None, args))

    def velocities(weights: Any) -> np.ndarray:
        args = (weights, prompt, reference.guidance)
        return np.stack([evaluate(reference.noise, jnp.float32(s), args) for s in SIGMAS])

    params = reference.params
    exact = velocities(params.transformer)
    narrow = in_bfloat16(params.transformer)
    weights = {kind: quantise_params(params, kind).transformer for kind in KINDS}
    for kind, tree in {"bfloat16": narrow, **weights}.items():
        pairs = zip(velocities(tree), exact, strict=True)
        row = [float(np.linalg.norm(got - e) / np.linalg.norm(e)) for got, e in pairs]
        yield {"row": "error", "model": model, "kind": kind, "sigmas": SIGMAS, "errors": row}


@jax.jit
def in_bfloat16(tree: Any) -> Any:
    """Return a tree of arrays in bfloat16."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def lora_losses(model: str) -> Iterator[dict[str, Any]]:
    """Yield the part of a LoRA that is lost if it is merged and the sum rounded again.

    The LoRA is random, of rank 16, and its entries are a share of the weights' (root mean squares).
    """
    kernel = load_params(model, None, "float32").transformer["single_blocks"]["out"]["kernel"][:1]
    keys = jax.random.split(jax.random.key(0))
    inputs, outputs = kernel.shape[1:]
    change = jax.random.normal(keys[0], (inputs, 16)) @ jax.random.normal(keys[1], (16, outputs))
    for kind in KINDS:
        for share in (0.01, 0.03, 0.1):
            added = share * change * jnp.std(kernel) / jnp.std(change)
            weights = [restored(quantise_stack(kernel, kind))]
            weights.append(restored(quantise_stack(weights[0] + added[None], kind)))
            lost = weights[1] - weights[0] - added[None]
            ratio = float(jnp.linalg.norm(lost) / jnp.linalg.norm(added))
            yield {"row": "lora", "model": model, "kind": kind, "share": share, "lost": ratio}


def restored(stack: Quantised) -> jax.Array:
    """Return the weights of all blocks of a quantised kernel."""
    return jax.vmap(lambda block: dequantise(block, jnp.float32))(stack)


def sizes(model: str) -> Iterator[dict[str, Any]]:
    """Yield the bytes of the transformer, all else in bfloat16, in memory and on disk."""
    params = load_params(model, None, "bfloat16")
    for kind in (None, *KINDS):
        some = params if kind is None else quantise_params(params, kind)
        in_memory = sum(leaf.nbytes for leaf in jax.tree.leaves(some.transformer))
        with tempfile.TemporaryDirectory() as folder:
            jitjax.save(some, Path(folder) / "checkpoint")
            files = (Path(folder) / "checkpoint" / "params").rglob("*")
            on_disk = sum(file.stat().st_size for file in files if file.is_file())
        yield {"row": "bytes", "model": model, "kind": kind, "memory": in_memory, "disk": on_disk}


def speeds(model: str, side: int, dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of an evaluation over that of unquantised weights, measured in turns."""
    calls = []
    for kind in (None, *KINDS):
        bench = Bench(model, side, None, dtype, "auto", kind)
        inputs = bench._inputs(bench.tokens)
        options = compiler_options()
        call, _ = compile_for(bench._evaluate(bench.velocity), *inputs, options=options)
        jax.block_until_ready(call())
        calls.append(call)
    seconds = measure_in_turns(calls, rounds)
    for i, kind in enumerate((None, *KINDS)):
        ratios = seconds[:, i] / seconds[:, 0]
        row = {"row": "speed", "model": model, "side": side, "dtype": dtype, "kind": kind}
        row |= {"seconds": float(np.median(seconds[:, i])), "ratio": float(np.median(ratios))}
        yield row | {"lowest": float(ratios.min()), "highest": float(ratios.max())}


def pictures(count: int, plan: str, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield what weights of several kinds draw of development prompts, and those of float32 first.

    Pictures are right as `benchmarks.checker` judges them. "change" is the difference to float32's
    share of right ones, with its 95 % bootstrap interval; "psnr" and "ssim" are those to float32's
    pictures.
    """
    tasks = [(i, p, p.seeds[0]) for i, p in enumerate(prompts(-(-count // 6), "dev", seeds=1))]
    tasks = tasks[:count]
    params, method = jitjax.load("tiny"), parse_method(plan)
    reference: np.ndarray | None = None
    right_before = np.zeros(count)
    for kind in (None, *kinds):
        if kind == "bfloat16":
            some = in_bfloat16(params)
        else:
            some = params if kind is None else quantise_params(params, kind)
        side = params.config.image_size // params.config.pixels_per_token
        runner = Runner(some, (side, side))
        batches = [
            sample_batch(runner, method, tasks[i : i + BATCH], BATCH)[0]
            for i in range(0, count, BATCH)
        ]
        images = np.concatenate(batches)
        checked = [judge_image(x, p) for x, (_, p, _) in zip(images, tasks, strict=True)]
        right = np.array([all(verdict.values()) for verdict in checked], float)
        row = {"row": "pictures", "plan": plan, "kind": kind, "pictures": count}
        row |= {"right": float(right.mean())}
        if reference is None:
            reference, right_before = images, right
        else:
            change = right - right_before
            alike = [similarity(x, y) for x, y in zip(images, reference, strict=True)]
            row |= {"change": float(change.mean()), "interval": interval(change)}
            row |= {name: float(np.mean([a[name] for a in alike])) for name in ("psnr", "ssim")}
        yield row


def main() -> None:
    """Print a row per measurement."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    p.add_argument("--model", nargs="*", default=["tiny", "middle"], choices=list(MODELS))
    p.add_argument("--side", type=int, default=512, help="pixels (default: 512)")
    p.add_argument("--dtype", help="for speed (default: bfloat16; float32 on a CPU)")
    p.add_argument("--rounds", type=int, default=5, help="timed calls of each (default: 5)")
    p.add_argument("--pictures", type=int, default=0, help="number of pictures (default: none)")
    p.add_argument("--plan", default="multistep-12", help="plan of the pictures")
    p.add_argument("--kinds", nargs="+", default=["bfloat16", *KINDS], choices=["bfloat16", *KINDS],
                   help="of the pictures' weights; bfloat16 is unquantised")  # fmt: skip
    args = p.parse_args()
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for model in args.model:
        for rows in (
            errors(model, args.side),
            sizes(model),
            lora_losses(model),
            speeds(model, args.side, dtype, args.rounds),
        ):
            for row in rows:
                record_row(args.out, row | device_info())
    if args.pictures:
        for row in pictures(args.pictures, args.plan, tuple(args.kinds)):
            record_row(args.out, row | device_info())


if __name__ == "__main__":
    main()
