"""Compares `jitjax.estimate_memory` with XLA's own account of the compiled programs.

    python -m benchmarks.memory                      FLUX.1-dev's size; the table of docs/scaling.md
    python -m benchmarks.memory --quantise int8
    python -m benchmarks.memory --model middle       a small model, in a minute

Weights are abstract, so nothing is allocated: programs of 50 GB compile on any machine. The dtype
is float32 on a CPU, where XLA widens 16-bit weights, and bfloat16 on a GPU. A row is a compiled
program: GB of arguments, temporaries and results together, and of temporaries alone.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jitjax.checkpoint import abstract_params
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.denoise import plan_for_device
from jitjax.encode import _encode
from jitjax.latents import token_grid
from jitjax.memory import Program, estimate_memory
from jitjax.models.devices import compiler_options
from jitjax.models.quantised import KINDS
from jitjax.sample import _decode
from jitjax.sampler import solve
from jitjax.sampler.plan import get_plan
from jitjax.sampler.solvers import named_solver, with_last_velocity
from jitjax.sampler.static import split_arrays
from jitjax.sampler.terms import SagArgs
from jitjax.text import Conditioning, encode_ids
from jitjax.velocity import FluxVelocity, VelocityInputs

FULL = FluxConfig()
MIDDLE = FluxConfig(
    transformer=TransformerConfig(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(8, 28, 28),
    ),
    t5=T5Config(vocab_size=1000, d_model=512, d_ff=1024, num_layers=2, num_heads=8),
    clip=CLIPConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    autoencoder=AutoencoderConfig(block_out_channels=(32, 64, 128, 128)),
    text_length=128,
    image_size=512,
)
"""Of a model this small, activations are most of what a program needs."""
MODELS = {"flux-dev": FULL, "middle": MIDDLE}
PARTS = ("encoders", "transformer", "image encoder", "decoder")
Shape = jax.ShapeDtypeStruct


class Case(NamedTuple):
    """A program of one of `PARTS`; of the transformer, stage `stage` of a plan."""

    part: str
    side: int
    batch: int
    plan: str = "dense"
    stage: int = 0
    negative: bool = False


CASES = (
    Case("encoders", 1024, 1),
    Case("encoders", 1024, 16),
    Case("transformer", 1024, 1),
    Case("transformer", 1024, 16, "4x", 1),
    Case("transformer", 1024, 16),
    Case("transformer", 2048, 4),
    Case("transformer", 1024, 1, negative=True),
    Case("transformer", 1024, 16, "4x", 1, negative=True),
    Case("image encoder", 1024, 1),
    Case("image encoder", 2048, 1),
    Case("decoder", 1024, 1),
    Case("decoder", 2048, 1),
)


def lower_encoders(config: FluxConfig, batch: int, dtype: str, quantise: str | None = None) -> Any:
    """Lower T5 and CLIP for a batch of prompts."""
    params = abstract_params(config, dtype, quantise)
    ids = [Shape((batch, length), jnp.int32) for length in (config.text_length, 77)]
    jitted: Any = encode_ids
    return jitted.__wrapped__.lower(params.t5, params.clip, *ids, config)


def lower_stage(
    config: FluxConfig,
    side: int,
    batch: int,
    plan: str,
    number: int,
    dtype: str,
    quantise: str | None = None,
    negative: bool = False,
) -> Any:
    """Lower stage `number` of a plan, as `denoise` runs it; `negative`: with negative prompts."""
    settings = plan_for_device(get_plan(plan), jnp.dtype(dtype))
    grid = token_grid(side, side, config)
    n, text = grid[0] * grid[1], config.text_length
    budget = settings.budgets(n, text)[number]
    lifter = None
    if budget < n:
        build = functools.partial(
            solve._build_lifter,
            slots=settings.slots(budget, text),
            grid=grid,
            lift=settings.lift,
        )
        lifter = jax.eval_shape(build, Shape((batch, budget), jnp.int32))
    _, velocity = split_arrays("velocity", FluxVelocity(config.transformer))
    _, solver = split_arrays("solver", with_last_velocity(named_solver(settings.solver)))
    conditioning = jax.eval_shape(
        Conditioning,
        Shape((batch, text, config.t5.d_model), jnp.float32),
        Shape((batch, config.clip.hidden_size), jnp.float32),
    )
    transformer = abstract_params(config, dtype, quantise).transformer
    scale = Shape((batch,), jnp.float32)
    guided = (conditioning, scale) if negative else ()
    inputs: list[Any] = [transformer, conditioning, scale, *guided]  # shapes instead of arrays
    args = VelocityInputs(*inputs)
    y = Shape((batch, n, config.transformer.out_channels), jnp.float32)
    options = tuple(sorted((compiler_options() or {}).items()))
    return solve._programs(velocity, options).integrate.lower(
        solve._Stage(solver, grid, budget),
        False,
        solve._Arrays([], []),
        y,
        Shape((3,), jnp.float32),
        SagArgs(lifter, args),
        None,
        None,
    )


def lower_decoder(config: FluxConfig, side: int, batch: int, dtype: str) -> Any:
    """Lower the decoder."""
    grid = token_grid(side, side, config)
    tokens = Shape((batch, grid[0] * grid[1], config.transformer.out_channels), jnp.float32)
    return _decode.lower(
        config.autoencoder, grid, abstract_params(config, dtype).autoencoder, tokens
    )


def lower_image_encoder(config: FluxConfig, side: int, batch: int, dtype: str) -> Any:
    """Lower the autoencoder's encoder."""
    images = Shape((batch, side, side, config.autoencoder.in_channels), jnp.float32)
    weights = abstract_params(config, dtype).autoencoder
    return _encode.lower(config.autoencoder, token_grid(side, side, config), weights, images, None)


def account(lowered: Any) -> tuple[int, int, int]:
    """Return bytes of arguments, temporaries and results by XLA."""
    found = lowered.compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes


def estimated(
    config: FluxConfig, case: Case, dtype: str, quantise: str | None, platform: str
) -> Program:
    """Return the estimate of a case's program."""
    estimate = estimate_memory(
        config,
        height=case.side,
        width=case.side,
        batch=case.batch,
        plan=case.plan,
        dtype=dtype,
        quantise=quantise,
        platform=platform,
        image=True,
        negative=case.negative,
    )
    name = "text encoders" if case.part == "encoders" else case.part
    return [p for p in estimate.programs if p.name.startswith(name)][case.stage]


def measure(
    config: FluxConfig, case: Case, dtype: str, quantise: str | None, platform: str
) -> dict[str, Any]:
    """Compile a case's program and return its row."""
    if case.part == "encoders":
        lowered = lower_encoders(config, case.batch, dtype, quantise)
    elif case.part == "decoder":
        lowered = lower_decoder(config, case.side, case.batch, dtype)
    elif case.part == "image encoder":
        lowered = lower_image_encoder(config, case.side, case.batch, dtype)
    else:
        lowered = lower_stage(config, *case[1:5], dtype, quantise, case.negative)
    arguments, temporaries, results = account(lowered)
    program = estimated(config, case, dtype, quantise, platform)
    return {
        "program": program.name,
        "side": case.side,
        "batch": case.batch,
        "negative": case.negative,
        "xla": arguments + temporaries + results,
        "estimate": program.total,
        "xla_temporaries": temporaries,
        "estimated_temporaries": program.temporaries,
    }


def main() -> None:
    """Print the table, a row as soon as its program is compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="flux-dev")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantise", choices=KINDS)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="only the programs of these"
    )
    parser.add_argument("--out", type=Path, help="file to which rows are appended as JSON lines")
    args = parser.parse_args()
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    dtype = args.dtype or ("bfloat16" if platform == "gpu" else "float32")
    device = jax.devices()[0].device_kind
    weights = args.quantise or "not quantised"
    print(f"{args.model}, {dtype}, {weights}, {device}, jax {jax.__version__}\n")
    print("| program | XLA | estimate | temporaries, XLA | estimate |\n|---|---|---|---|---|")
    for case in (case for case in CASES if case.part in args.parts):
        row = measure(MODELS[args.model], case, dtype, args.quantise, platform)
        sizes = ("xla", "estimate", "xla_temporaries", "estimated_temporaries")
        cells = " | ".join(f"{row[name] / 1e9:.3g}" for name in sizes)
        name = f"{row['program']}, {case.side} px, batch {case.batch}"
        name += ", negative prompts" if case.negative else ""
        print(f"| {name} | {cells} |", flush=True)
        if args.out:
            fields = {"model": args.model, "dtype": dtype, "quantise": args.quantise}
            with args.out.open("a") as file:
                file.write(
                    json.dumps(row | fields | {"device": device, "jax": jax.__version__}) + "\n"
                )


if __name__ == "__main__":
    main()
