"""Replays a run that another program recorded, and compares the two array by array.

    python -m benchmarks.replay RECORDING.npz --transformer WEIGHTS.safetensors --config CONFIG.json

A recording contains:

    inputs       grid, prompt_embeds, pooled_prompt_embeds, noise_tokens, microflow_noise,
                 anchors_initial, and guidance (optional)
    constants    sigmas, stage_steps, densities, microflow_relax_steps
    result       latents_final
    optional     states; and importance_k, anchors_next_k, x0_k, microflow_new_k,
                 microflow_target_k, microflow_before_k, microflow_after_k for transition k

The result and the optional arrays are compared. Everything is computed in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jitjax.checkpoint import FluxParams
from jitjax.config import CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.denoise import denoise
from jitjax.sampler.plan import Plan
from jitjax.sampler.trace import Trace
from jitjax.text import Conditioning

REQUIRED = (
    "grid",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "noise_tokens",
    "microflow_noise",
    "sigmas",
    "stage_steps",
    "densities",
    "microflow_relax_steps",
    "anchors_initial",
    "latents_final",
)


def read_recording(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a recording.

    Raises:
        ValueError: the file is damaged or not an .npz file, or required arrays are missing.
        OSError: the file cannot be read.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from None
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; expected {', '.join(REQUIRED)}")
    return arrays


def read_transformer(weights: Path, config_path: Path) -> FluxParams:
    """Read a transformer in the diffusers layout, in float32.

    Args:
        weights: the .safetensors file of the transformer.
        config_path: diffusers' config.json of the transformer.

    Returns:
        Parameters that contain the transformer alone.
    """
    from jitjax.convert.components import from_state

    transformer = TransformerConfig.from_diffusers(json.loads(config_path.read_text()))
    config = FluxConfig(
        transformer=transformer,
        t5=T5Config(d_model=transformer.joint_attention_dim),
        clip=CLIPConfig(hidden_size=transformer.pooled_projection_dim, num_attention_heads=1),
    )
    params = from_state("transformer", load_file(weights), transformer, jnp.float32)
    return FluxParams(jax.device_put(params), {}, {}, {}, config, "")


def recorded_plan(arrays: Mapping[str, np.ndarray]) -> Plan:
    """Return the plan of a recording.

    Where `microflow_relax_steps` is 0, new tokens are set to their target: `microflow="hit"`.
    """
    steps = len(arrays["sigmas"])
    relax_steps = float(arrays["microflow_relax_steps"])
    return Plan(
        steps,
        # 0.35 in float32 is slightly less than 0.35, which could change a stage's token count.
        tuple(round(float(density), 6) for density in arrays["densities"]),
        tuple(int(s) / steps for s in arrays["stage_steps"]),
        schedule=tuple(arrays["sigmas"].tolist()),
        microflow="blend" if relax_steps else "hit",
        relax=relax_steps or 1.0,
    )


def replay(
    params: FluxParams, arrays: Mapping[str, np.ndarray], plan: Plan
) -> tuple[jax.Array, Trace]:
    """Denoise the recording's noise with its conditioning, first anchors and micro-flow noise.

    Args:
        params: parameters that contain the transformer.
        arrays: what `read_recording` returns.
        plan: the plan to run.

    Returns:
        Clean tokens [batch, n, channels] and the trace.
    """
    with jax.default_matmul_precision("highest"):
        return denoise(
            params,
            Conditioning(
                jnp.asarray(arrays["prompt_embeds"]), jnp.asarray(arrays["pooled_prompt_embeds"])
            ),
            jnp.asarray(arrays["noise_tokens"]),
            plan=plan,
            grid=(int(arrays["grid"][0]), int(arrays["grid"][1])),
            guidance=float(arrays.get("guidance", 0.0)),
            microflow_noise=jnp.asarray(arrays["microflow_noise"]),
            first_anchors=jnp.asarray(arrays["anchors_initial"]),
            trace=True,
        )


def compared_arrays(
    arrays: Mapping[str, np.ndarray], tokens: jax.Array, trace: Trace
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Pair the arrays of a run with those of the recording.

    New tokens are sorted by index first: their order does not matter.

    Yields:
        (name, our array, recorded array); the result, `latents_final`, is the last.
    """
    arrays, ours = dict(arrays), {"states": trace.states}
    for k, transition in enumerate(trace.transitions):
        if transition is None:
            continue
        order = np.argsort(transition.new, axis=-1)
        new_name, target_name = f"microflow_new_{k}", f"microflow_target_{k}"
        if new_name in arrays:
            recorded_order = np.argsort(arrays[new_name], axis=-1)
            arrays[new_name] = np.take_along_axis(arrays[new_name], recorded_order, -1)
            if target_name in arrays:
                arrays[target_name] = np.take_along_axis(
                    arrays[target_name], recorded_order.reshape(1, -1, 1), 1
                )
        ours |= {
            f"importance_{k}": transition.scores,
            f"x0_{k}": trace.clean[k],
            f"anchors_next_{k}": np.sort(trace.anchors[k + 1], axis=-1),
            new_name: np.take_along_axis(np.asarray(transition.new), order, -1),
            target_name: np.take_along_axis(np.asarray(transition.target), order[..., None], 1),
            f"microflow_before_{k}": transition.before,
            f"microflow_after_{k}": transition.after,
        }
    ours["latents_final"] = tokens
    for name, value in ours.items():
        if name in arrays:
            recorded = np.sort(arrays[name]) if name.startswith("anchors") else arrays[name]
            yield name, np.asarray(value).reshape(recorded.shape), recorded


def difference(ours: np.ndarray, recorded: np.ndarray) -> tuple[float, float]:
    """Return the maximum absolute difference, and its ratio to the maximum recorded value.

    NaN in either array gives NaN.
    """
    absolute = float(np.abs(np.asarray(ours, np.float64) - recorded).max())
    return absolute, absolute / max(float(np.abs(recorded).max()), 1e-30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if `latents_final` is within the tolerance, 1 if not, 2 for an unusable
        input file.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path, metavar="RECORDING.npz")
    parser.add_argument(
        "--transformer",
        type=Path,
        required=True,
        help=".safetensors file in diffusers' layout",
    )
    parser.add_argument("--config", type=Path, required=True, help="diffusers' config.json for it")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest relative difference of latents_final (default: 1e-3)",
    )
    args = parser.parse_args(arguments)
    try:
        arrays = read_recording(args.recording)
        params = read_transformer(args.transformer, args.config)
        plan = recorded_plan(arrays)
        comparisons = list(compared_arrays(arrays, *replay(params, arrays, plan)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    relative = np.inf
    for name, ours, recorded in comparisons:
        if np.issubdtype(recorded.dtype, np.integer):
            print(f"{name} not_in_common={len(np.setdiff1d(ours, recorded))}/{recorded.size}")
            continue
        absolute, relative = difference(ours, recorded)
        print(f"{name} max_abs={absolute:.3e} rel={relative:.3e}")
    return 0 if relative <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
