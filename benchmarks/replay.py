"""Runs this project's sampler on a recording of another program, and compares array by array.

    python -m benchmarks.replay RECORDING.npz --transformer WEIGHTS.safetensors --config CONFIG.json

A recording holds what the other program was given (`grid, prompt_embeds, pooled_prompt_embeds,
guidance, noise_tokens, microflow_noise, anchors_initial`), its constants (`sigmas, stage_steps,
densities, microflow_relax_steps`) and its result (`latents_final`); arrays of what happened on the
way (`states`, and `importance_k`, `anchors_next_k`, `x0_k`, `microflow_*_k` for the k-th
transition) are compared where they are there. Everything is computed in float32.
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

NEEDED = (
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
    """The arrays of a recording. Raises `ValueError` that lists the missing ones."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}") from None
    missing = [name for name in NEEDED if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; expected {', '.join(NEEDED)}")
    return arrays


def read_transformer(weights: Path, config: Path) -> FluxParams:
    """A transformer in the diffusers layout, as parameters without text encoders."""
    from jitjax.convert.components import from_state  # pyright: ignore[reportMissingImports]

    transformer = TransformerConfig.from_diffusers(json.loads(config.read_text()))
    whole = FluxConfig(
        transformer=transformer,
        t5=T5Config(d_model=transformer.joint_attention_dim),
        clip=CLIPConfig(hidden_size=transformer.pooled_projection_dim, num_attention_heads=1),
    )
    params = from_state("transformer", load_file(weights), transformer, jnp.float32)
    return FluxParams(jax.device_put(params), {}, {}, {}, whole, "")


def recorded_plan(arrays: Mapping[str, np.ndarray]) -> Plan:
    """The plan that a recording was made by; its micro-flow noise is handed over, not drawn."""
    steps = len(arrays["sigmas"])
    relax = float(arrays["microflow_relax_steps"])
    return Plan(
        steps,
        # Rounded: 0.35 in float32 is a little less, and a token may hang on it.
        tuple(round(float(density), 6) for density in arrays["densities"]),
        tuple(int(s) / steps for s in arrays["stage_steps"]),
        schedule=tuple(arrays["sigmas"].tolist()),
        microflow="blend" if relax else "hit",
        relax=relax or 1.0,
    )


def replay(
    params: FluxParams, arrays: Mapping[str, np.ndarray], plan: Plan
) -> tuple[jax.Array, Trace]:
    """This project's run on what the recording was given."""
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


def pairs(
    arrays: Mapping[str, np.ndarray], tokens: jax.Array, trace: Trace
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """(name, ours, theirs) of all that can be compared, the result last.

    New tokens are compared in rising order: programs may list a full set in any.
    """
    arrays, ours = dict(arrays), {"states": trace.states}
    for k, happened in enumerate(trace.transitions):
        if happened is None:
            continue
        order = np.argsort(happened.new, axis=-1)
        new, target = f"microflow_new_{k}", f"microflow_target_{k}"
        if new in arrays:
            theirs = np.argsort(arrays[new], axis=-1)
            arrays[new] = np.take_along_axis(arrays[new], theirs, -1)
            if target in arrays:
                arrays[target] = np.take_along_axis(arrays[target], theirs.reshape(1, -1, 1), 1)
        ours |= {
            f"importance_{k}": happened.scores,
            f"x0_{k}": trace.clean[k],
            f"anchors_next_{k}": np.sort(trace.anchors[k + 1], axis=-1),
            new: np.take_along_axis(np.asarray(happened.new), order, -1),
            target: np.take_along_axis(np.asarray(happened.target), order[..., None], 1),
            f"microflow_before_{k}": happened.before,
            f"microflow_after_{k}": happened.after,
        }
    ours["latents_final"] = tokens
    for name, value in ours.items():
        if name in arrays:
            theirs = np.sort(arrays[name]) if name.startswith("anchors") else arrays[name]
            yield name, np.asarray(value).reshape(theirs.shape), theirs


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Greatest absolute difference, and its ratio to the greatest value; NaN is not forgiven."""
    gap = float(np.abs(np.asarray(ours, np.float64) - theirs).max())
    return gap, gap / max(float(np.abs(theirs).max()), 1e-30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 within the tolerance, 1 above it, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path, metavar="RECORDING.npz")
    parser.add_argument(
        "--transformer", type=Path, required=True, help="weights, diffusers' names (.safetensors)"
    )
    parser.add_argument("--config", type=Path, required=True, help="diffusers' config.json of it")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="relative, of latents_final (default: 1e-3)"
    )
    options = parser.parse_args(arguments)
    try:
        arrays = read_recording(options.recording)
        params = read_transformer(options.transformer, options.config)
        plan = recorded_plan(arrays)
        compared = list(pairs(arrays, *replay(params, arrays, plan)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    relative = np.inf
    for name, ours, theirs in compared:
        if np.issubdtype(theirs.dtype, np.integer):
            print(f"{name} not_in_common={len(np.setdiff1d(ours, theirs))}/{theirs.size}")
            continue
        absolute, relative = difference(ours, theirs)
        print(f"{name} max_abs={absolute:.3e} rel={relative:.3e}")
    return 0 if relative <= options.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
