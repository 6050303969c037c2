"""Compares one evaluation of the transformer with diffusers' in PyTorch, on a CPU in one process.

    python -m benchmarks.torch_cpu                       needs torch and diffusers
    python -m benchmarks.torch_cpu --models tiny --rounds 9 --out torch-cpu.jsonl
    taskset -c 0 python -m benchmarks.torch_cpu --processor-time      on a busy machine

Both get the same weights, inputs, dtype (float32) and number of threads, and take turns: A B A B.
There is a row per model and number of image tokens: "tiny" is the bundled checkpoint at 512 px,
"middle" has random weights and runs at 1024 px and at the two sizes of the first stages of `4x`.

"ratio" is the median, over turns, of JAX's seconds over PyTorch's in the same turn: below 1 JAX is
faster; "ratio_lowest" and "ratio_highest" are its range. "error" is the largest difference of the
outputs over the largest output. More than 1e-4 ends the program.

Other processes disturb a comparison on several cores: PyTorch's threads wait for each other. On a
busy machine, pin the program to one core and take the time that the processor spends on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

import jitjax
from benchmarks.speed_models import CHECKPOINT, MODELS
from benchmarks.timing import compile_for, device_info, measure_in_turns, record_row
from jitjax.config import TransformerConfig
from jitjax.convert.components import from_state
from jitjax.loading import BUNDLED
from jitjax.sampler.grid import positions
from jitjax.text import Conditioning
from jitjax.velocity import FluxVelocity

TOLERANCE = 1e-4
"""Largest accepted error: sums of float32 in another order differ by 1e-6 to 1e-5."""
CASES = {"tiny": (512, [1024]), "middle": (1024, [4096, 2539, 1433])}
"""Side of the image in pixels, and numbers of image tokens, for each model."""
TEXT = {"tiny": 48, "middle": 512}
"""Text tokens of each model."""


def config_of(name: str) -> TransformerConfig:
    """Return the configuration of a model of `benchmarks.speed`."""
    return MODELS[name] or jitjax.load(name, parts=("transformer",)).config.transformer


def load_reference(name: str) -> FluxTransformer2DModel:
    """Return diffusers' model with the weights of a bundled checkpoint or random ones."""
    if name == CHECKPOINT:
        folder = BUNDLED / name / "transformer"
        model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**dataclasses.asdict(config_of(name)))
    return model.eval()


def calls(
    model: FluxTransformer2DModel, config: TransformerConfig, side: int, tokens: int, text: int
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Return JAX's and PyTorch's evaluation of the same inputs."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    grid = (side // 16, side // 16)
    y = normal(1, tokens, config.in_channels)
    embeddings, pooled = (
        normal(1, text, config.joint_attention_dim),
        normal(1, config.pooled_projection_dim),
    )
    token_positions = np.array(positions(jnp.arange(tokens), grid))

    state = {name: value.numpy() for name, value in model.state_dict().items()}
    params = jax.tree.map(jnp.asarray, from_state("transformer", state, config))
    conditioning = Conditioning(jnp.asarray(embeddings), jnp.asarray(pooled))
    velocity = FluxVelocity(config)
    with jax.default_matmul_precision("highest"):
        run, _ = compile_for(
            lambda y, p, args: velocity(y, p, jnp.float32(0.9), None, args),
            jnp.asarray(y),
            jnp.asarray(token_positions)[None],
            (params, conditioning, jnp.full((1,), 3.5)),
        )
    inputs: dict[str, Any] = {
        "hidden_states": torch.from_numpy(y),
        "encoder_hidden_states": torch.from_numpy(embeddings),
        "pooled_projections": torch.from_numpy(pooled),
        "timestep": torch.full((1,), 0.9),
        "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
        "img_ids": torch.from_numpy(token_positions.astype(np.float32)),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }

    def run_torch() -> np.ndarray:
        with torch.inference_mode():
            return model(**inputs)[0].numpy()

    return lambda: np.asarray(run()), run_torch


def main() -> None:
    """Print a JSON row per model and number of image tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tokens", type=int, nargs="+", help="image tokens (default: all sizes)")
    parser.add_argument("--rounds", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--processor-time", action="store_true",
                        help="time of all threads on the processor, not of the clock")  # fmt: skip
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    run_info = {**device_info(), "torch": torch.__version__, "threads": threads}
    run_info |= {"time": "processor" if args.processor_time else "clock"}
    for name in args.models:
        model, config, (side, counts) = load_reference(name), config_of(name), CASES[name]
        for tokens in args.tokens or counts:
            pair = calls(model, config, side, tokens, TEXT[name])
            got, expected = (call() for call in pair)
            error = float(np.abs(got - expected).max() / np.abs(expected).max())
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}: the error is {error:.1e}; expected up to {TOLERANCE}")
            seconds = measure_in_turns(pair, args.rounds, clock=clock)
            ratios = seconds[:, 0] / seconds[:, 1]
            row = {"row": "forward", "model": name, "size": side, "tokens": tokens}
            row |= {"jax_seconds": float(np.median(seconds[:, 0]))}
            row |= {"torch_seconds": float(np.median(seconds[:, 1]))}
            row |= {"ratio": float(np.median(ratios))}
            row |= {"ratio_lowest": float(ratios.min()), "ratio_highest": float(ratios.max())}
            record_row(args.out, row | {"error": error, "load": os.getloadavg()[0]} | run_info)


if __name__ == "__main__":
    main()
