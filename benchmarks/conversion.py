"""Memory and speed of a conversion, beside copying the same files on the same disk.

    python -m benchmarks.conversion                   4 GB of FLUX's own widths, in many shards
    python -m benchmarks.conversion --double 1 --single 2 --shard-mb 256

Makes a diffusers transformer of full width and a few blocks, random and in bfloat16; then, in turn
and a few times, copies it, converts it by the command line in a process of its own, and verifies
it, each time from the disk and not from the kernel's memory of it (Linux only). Peak memory is the
highest resident size of that process, its mapped files included; the floor is that of a process
that only imports what the command needs. Seconds are until all is on the disk, the start of Python
included.
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

# `convert/` is mapped into the package at installation, which type checkers do not follow.
from jitjax.convert.components import component_of  # pyright: ignore[reportMissingImports]
from jitjax.convert.tables.engine import leaf_shapes  # pyright: ignore[reportMissingImports]

COMMAND = [sys.executable, "-m", "jitjax.convert"]


def make(folder: Path, config: TransformerConfig, shard_bytes: int) -> tuple[int, int]:
    """A transformer's folder, random, in shards; bytes in all, and of the largest leaf."""
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
        # Exponents near 1, so that every number is an ordinary one.
        bits = rng.integers(0x3F00, 0x4000, count, np.uint16)
        state[name] = bits.view(jnp.bfloat16).reshape(shape)
        filled, total = filled + 2 * count, total + 2 * count
        if filled > shard_bytes:
            flush()
    flush()
    listed = folder / "diffusion_pytorch_model.safetensors.index.json"
    listed.write_text(json.dumps({"weight_map": index}))
    return total, max(2 * int(np.prod(shape)) for shape in leaves.values())


def evict(folder: Path) -> None:
    """Have the kernel forget the files' contents, so that whoever is next reads from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds until all is on the disk, and the process's highest resident size in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--double", type=int, default=3, help="double blocks (default: 3)")
    parser.add_argument("--single", type=int, default=6, help="single blocks (default: 6)")
    parser.add_argument("--shard-mb", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; twice the size is needed")
    args = parser.parse_args()
    config = TransformerConfig(num_layers=args.double, num_single_layers=args.single)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        (work / "source").mkdir()
        # In a process of its own: a child's peak is never below its parent's size.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            made = pool.submit(make, work / "source", config, args.shard_mb * 2**20)
            total, largest = made.result()
        _, floor = run([sys.executable, "-c", "import jitjax.convert.__main__, jax; jax.devices()"])
        out = ["--out", str(work / "made")]
        copied, converted, verified, peaks = [], [], [], []
        for _ in range(args.rounds):
            evict(work)
            copied.append(run(["cp", "-r", str(work / "source"), str(work / "copy")])[0])
            shutil.rmtree(work / "copy")
            shutil.rmtree(work / "made", ignore_errors=True)
            evict(work)
            seconds, peak = run([*COMMAND, "--transformer", str(work / "source"), *out])
            converted.append(seconds)
            peaks.append(peak)
            evict(work)
            verified.append(run([*COMMAND, "--verify", str(work / "made")])[0])
        found = {
            "config": dataclasses.asdict(config),
            "shards": len(list((work / "source").glob("*.safetensors"))),
            "GB": total / 1e9,
            "largest leaf MB": largest / 1e6,
            "floor MB": floor / 1e6,
            "peak MB": max(peaks) / 1e6,
            "copy MB/s": [total / t / 1e6 for t in copied],
            "convert MB/s": [total / t / 1e6 for t in converted],
            "verify MB/s": [total / t / 1e6 for t in verified],
            "convert / copy": statistics.median(
                one / other for one, other in zip(copied, converted, strict=True)
            ),
        }
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
