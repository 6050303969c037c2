"""Exports the trained models as a FLUX pipeline folder in the diffusers layout.

    python -m training.export --out jitjax/checkpoints/tiny

The folder has the averaged weights in float16. It is written next to the target and tested: loaded
with `FluxPipeline.from_pretrained`, it must sample an image before it replaces the target.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from training.common import RUNS, load_or_none
from training.model import TinyFlux, load_autoencoder

SCHEDULER = {  # as FLUX.1-dev's
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def load_trained(path: Path) -> tuple[TinyFlux, int]:
    """Load the model of a flow checkpoint with averaged weights; return it and its step."""
    checkpoint = load_or_none(path)
    model = TinyFlux().eval().requires_grad_(False)
    model.load_state_dict(checkpoint["weights"] | checkpoint["average"], strict=True)
    return model, checkpoint["step"]


def write_pipeline(folder: Path, flow: Path, autoencoder: Path) -> int:
    """Write the pipeline to a folder, without local paths in its configs.

    Args:
        folder: the folder to write.
        flow: checkpoint of `training.flow`.
        autoencoder: checkpoint of `training.autoencoder`.

    Returns:
        The step of the flow checkpoint.
    """
    model, step = load_trained(flow)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=load_autoencoder(autoencoder).half(),
        text_encoder=model.clip.half(),
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.t5.half(),
        tokenizer_2=model.t5_tokenizer,
        transformer=model.transformer.half(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers 5 writes tokenizer.json only; older versions read these two files.
    clip = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in clip["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(clip["vocab"], ensure_ascii=False))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=RUNS / "flow.pt")
    parser.add_argument("--autoencoder", type=Path, default=RUNS / "autoencoder.pt")
    parser.add_argument("--out", type=Path, default=Path("jitjax/checkpoints/tiny"))
    parser.add_argument("--prompt", default="a large red striped circle on a plain grey background")
    args = parser.parse_args()

    new_folder = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(new_folder, ignore_errors=True)
    step = write_pipeline(new_folder, args.flow, args.autoencoder)
    pipeline = FluxPipeline.from_pretrained(new_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    start = time.monotonic()
    image = pipeline(
        args.prompt,
        height=256,
        width=256,
        num_inference_steps=20,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=48,
    ).images[0]
    image.save(RUNS / "export.png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    old_folder = args.out.with_name(args.out.name + ".old")
    shutil.rmtree(old_folder, ignore_errors=True)
    if args.out.exists():
        args.out.rename(old_folder)
    new_folder.rename(args.out)
    shutil.rmtree(old_folder, ignore_errors=True)
    total_bytes = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(
        f"step {step}: {args.out}, {total_bytes / 1e6:.2f} MB; an image took "
        f"{time.monotonic() - start:.1f} s ({RUNS / 'export.png'})"
    )


if __name__ == "__main__":
    main()
