"""Measures memory and speed of a conversion, compared with copying the same files.

    python -m benchmarks.conversion                   4 GB in many shards, blocks of full width
    python -m benchmarks.conversion --double 1 --single 2 --shard-mb 256

Writes a diffusers transformer with a few blocks of full width and random bfloat16 weights. Each
round copies it, converts it and verifies the result, each in a process of its own. The files are
dropped from the page cache before each of the three, so that they are read from the disk (Linux
only).

Times run from the start of the process until all data is on the disk. Peak memory is the highest
resident size of the converting process, memory-mapped files included; "floor MB" is the peak of a
process that only imports what the command needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jitjax.config import TransformerConfig
from jitjax.convert.components import component_of
from jitjax.convert.tables.engine import leaf_shapes

COMMAND = [sys.executable, "-m", "jitjax.convert"]


def write_source(folder: Path, config: TransformerConfig, shard_bytes: int) -> tuple[int, int]:
    """Write a random transformer in the diffusers layout, sharded.

    Args:
        folder: an existing folder to write to.
        config: configuration of the transformer.
        shard_bytes: a shard ends with the tensor that takes it over this size.

    Returns:
        Total bytes of the tensors, and bytes of the largest leaf of the converted parameters.
    """
    component = component_of("transformer")
    leaves = leaf_shapes(component.abstract_params(config))
    shapes = component.source_shapes(config)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    rng, total = np.random.default_rng(0), 0
    state, filled, paths, index = {}, 0, [], {}

    def flush() -> None:
        nonlocal state, filled
        paths.append(folder / f"diffusion_pytorch_model-{len(paths):05d}.safetensors")
        save_file(state, paths[-1])
        index.update(dict.fromkeys(state, paths[-1].name))
        state, filled = {}, 0

    for name, shape in shapes.items():
        count = int(np.prod(shape))
        # Random bits of finite, normal numbers (0.5 to 2).
        bits = rng.integers(0x3F00, 0x4000, count, np.uint16)
        state[name] = bits.view(jnp.bfloat16).reshape(shape)
        filled, total = filled + 2 * count, total + 2 * count
        if filled > shard_bytes:
            flush()
    flush()
    index_path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": index}))
    return total, max(2 * int(np.prod(shape)) for shape in leaves.values())


def evict_page_cache(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that the next read is from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_timed(command: list[str]) -> tuple[float, int]:
    """Run a command and flush its writes to the disk.

    Returns:
        Seconds, the flush included, and the process's peak resident size in bytes.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--double", type=int, default=3, help="double blocks (default: 3)")
    parser.add_argument("--single", type=int, default=6, help="single blocks (default: 6)")
    parser.add_argument("--shard-mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="working folder; needs twice the size of the source"
    )
    args = parser.parse_args()
    config = TransformerConfig(num_layers=args.double, num_single_layers=args.single)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        (work / "source").mkdir()
        # A child's peak is never below its parent's size: write the source in another process.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            future = pool.submit(write_source, work / "source", config, args.shard_mb * 2**20)
            total, largest = future.result()
        _, import_peak = run_timed(
            [sys.executable, "-c", "import jitjax.convert.__main__, jax; jax.devices()"]
        )
        out = ["--out", str(work / "made")]
        copied, converted, verified, peaks = [], [], [], []
        for _ in range(args.rounds):
            evict_page_cache(work)
            copied.append(run_timed(["cp", "-r", str(work / "source"), str(work / "copy")])[0])
            shutil.rmtree(work / "copy")
            shutil.rmtree(work / "made", ignore_errors=True)
            evict_page_cache(work)
            seconds, peak = run_timed([*COMMAND, "--transformer", str(work / "source"), *out])
            converted.append(seconds)
            peaks.append(peak)
            evict_page_cache(work)
            verified.append(run_timed([*COMMAND, "--verify", str(work / "made")])[0])
        results = {
            "config": dataclasses.asdict(config),
            "shards": len(list((work / "source").glob("*.safetensors"))),
            "GB": total / 1e9,
            "largest leaf MB": largest / 1e6,
            "floor MB": import_peak / 1e6,
            "peak MB": max(peaks) / 1e6,
            "copy MB/s": [total / t / 1e6 for t in copied],
            "convert MB/s": [total / t / 1e6 for t in converted],
            "verify MB/s": [total / t / 1e6 for t in verified],
            "convert / copy": statistics.median(
                copy / convert for copy, convert in zip(copied, converted, strict=True)
            ),
        }
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
