"""Renders scenes of 512 px and encodes them, for `training.missing_tokens`.

    python -m training.scene_data --count 4096 --out /var/tmp/jitjax-train/scenes

The folder has `tokens.npy` (float16 [count, 1024, 64], normalised latents in tokens), `things.npy`
(float32 [count, 4, 3]: centre x, centre y and radius as fractions of the side; radius 0 for
none) and `captions.json` (`CAPTIONS` captions per scene). Rendering takes all cores, encoding a GPU
where torch finds one.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.scenes import caption, render, training_scene

SIDE, THINGS, CAPTIONS = 512, 4, 2


def draw(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw a scene: its picture (uint8 [SIDE, SIDE, 3]), its things, and its captions."""
    rng = np.random.default_rng((seed, SIDE, index))
    scene = training_scene(rng)
    things = np.zeros((THINGS, 3), np.float32)
    for row, thing in zip(things, scene.things, strict=False):
        row[:] = thing.x, thing.y, thing.radius
    picture = (render(scene, SIDE, SIDE) * 255).round().astype(np.uint8)
    return picture, things, [caption(scene, rng) for _ in range(CAPTIONS)]


def write_scenes(checkpoint: Path, out: Path, count: int, seed: int, jobs: int, batch: int) -> None:
    """Render, encode and write scenes.

    Args:
        checkpoint: diffusers folder with the autoencoder.
        out: the folder to write.
        count: number of scenes, a multiple of `batch`.
        seed: seed of the scenes.
        jobs: number of processes that render.
        batch: pictures per call of the autoencoder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        import torch  # after the fork: a process with CUDA's state cannot be forked
        from diffusers import AutoencoderKL

        from training.model import pack

        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae").float().to(device)
        tokens = np.lib.format.open_memmap(
            out / "tokens.npy", "w+", np.float16, (count, (SIDE // 16) ** 2, 64)
        )
        things, captions, pictures = [], [], []
        scenes = pool.imap(functools.partial(draw, seed=seed), range(count), chunksize=8)
        for index, (picture, places, texts) in enumerate(tqdm(scenes, total=count), 1):
            pictures.append(picture)
            things.append(places)
            captions.append(texts)
            if index % batch == 0:
                x = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2)
                with torch.no_grad():
                    z = vae.encoder(x.float() / 127.5 - 1)[:, :16]
                z = (z - vae.config.shift_factor) * vae.config.scaling_factor
                tokens[index - batch : index] = pack(z.contiguous()).half().cpu().numpy()
                pictures = []
    tokens.flush()
    np.save(out / "things.npy", np.stack(things))
    (out / "captions.json").write_text(json.dumps(captions))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("jitjax/checkpoints/tiny"))
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32, help="pictures per call of the encoder")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.count % args.batch:
        parser.error(f"--count is {args.count}; expected a multiple of --batch, {args.batch}")
    write_scenes(args.checkpoint, args.out, args.count, args.seed, args.jobs, args.batch)


if __name__ == "__main__":
    main()
