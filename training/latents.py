"""Latents of a fixed set of training images, encoded on first use and cached on disk.

python -m training.latents            # measures the latents' mean and standard deviation, once
"""

from __future__ import annotations

import numpy as np
import torch

from training.common import RUNS, autocast, load_or_none, save_atomically
from training.model import load_autoencoder
from training.scenes import Scene, random_scene, render, training_scene

SHARD = 256


class Latents:
    """The latents and scenes of a fixed set of images. Scene i depends on (seed, side, i) only.

    Args:
        side: side of the images in pixels.
        count: number of images.
        seed: seed of the scenes.
        several: whether scenes have one to four things, or always one.
        folder: where to cache latents.
    """

    def __init__(
        self, side: int, count: int, seed: int, several: bool = False, folder=RUNS / "latents"
    ):
        self.side, self.count, self.seed = side, count, seed
        self.draw = training_scene if several else random_scene
        self.folder = folder / (f"{side}-several" if several else str(side))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: dict[int, tuple[torch.Tensor, list[Scene]]] = {}
        self.vae = load_autoencoder().to(memory_format=torch.channels_last)
        self.permutations: dict[int, np.ndarray] = {}

    def scene(self, index: int) -> Scene:
        return self.draw(np.random.default_rng((self.seed, self.side, index)))

    @torch.no_grad()
    def encode(self, scenes: list[Scene]) -> torch.Tensor:
        """Render and encode scenes: normalised float16 latents [scenes, 16, side / 8, side / 8]."""
        chunks = []
        chunk = max(1, 16 * 128**2 // self.side**2)
        for start in range(0, len(scenes), chunk):
            images = [render(s, self.side, self.side) for s in scenes[start : start + chunk]]
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2 - 1
            with autocast():
                mean = self.vae.encoder(x.contiguous(memory_format=torch.channels_last))
            z = mean[:, :16].float().contiguous()
            chunks.append((z - self.vae.config.shift_factor) * self.vae.config.scaling_factor)
        return torch.cat(chunks).half()

    def get_shard(self, number: int) -> tuple[torch.Tensor, list[Scene]]:
        """Return the latents and scenes of a shard, from memory, from the disk or newly encoded."""
        if number not in self.shards:
            scenes = [self.scene(i) for i in range(number * SHARD, (number + 1) * SHARD)]
            path = self.folder / f"{number:04d}.pt"
            z = load_or_none(path)
            if z is None:
                z = self.encode(scenes)
                save_atomically(z, path)
            self.shards[number] = z, scenes
        return self.shards[number]

    def batch(self, position: int, size: int) -> tuple[torch.Tensor, list[Scene]]:
        """Return latents and scenes `position` to `position + size` of an endless stream.

        The stream consists of epochs. The first is not shuffled, so that shards are encoded when
        training reaches them.
        """
        z, scenes = [], []
        for number in range(position, position + size):
            epoch, index = divmod(number, self.count)
            if epoch:
                if epoch not in self.permutations:
                    rng = np.random.default_rng((self.seed, self.side, epoch, 2))
                    self.permutations = {epoch: rng.permutation(self.count)}
                index = int(self.permutations[epoch][index])
            latents, shard_scenes = self.get_shard(index // SHARD)
            z.append(latents[index % SHARD])
            scenes.append(shard_scenes[index % SHARD])
        return torch.stack(z).float(), scenes


@torch.no_grad()
def measure_statistics(path=RUNS / "autoencoder.pt", seed: int = 5) -> None:
    """Store the latents' mean and inverse standard deviation in the autoencoder's checkpoint.

    They are measured over images of 128, 256 and 512 px, drawn from `seed`.
    """
    checkpoint = load_or_none(path)
    vae = load_autoencoder(path)
    chunks = []
    for side, count in ((128, 96), (256, 16), (512, 4)):
        for i in range(count):
            image = render(random_scene(np.random.default_rng((seed, side, i))), side, side)
            x = torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1
            z = vae.encoder(x)[:, :16]
            chunks.append(z.transpose(0, 1).reshape(16, -1)[:, :: (side // 128) ** 2])
    z = torch.cat(chunks, dim=1)
    checkpoint["shift"] = round(z.mean().item(), 4)
    checkpoint["scale"] = round(1 / z.std().item(), 4)
    save_atomically(checkpoint, path)
    print("shift", checkpoint["shift"], "scale", checkpoint["scale"])
    print("per channel mean", z.mean(1).numpy().round(2), "spread", z.std(1).numpy().round(2))


if __name__ == "__main__":
    measure_statistics()
