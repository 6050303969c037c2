"""Trains the small autoencoder: diffusers' AutoencoderKL with 16 channels and factor 8, as FLUX's.

    python -m training.autoencoder --minutes 8

Training starts with crops of 64 px from images of 128, 256 and 512 px, so that edges and textures
of all resolutions occur, and moves to whole images. The loss is the L1 error of the pixels, plus
the L1 error of the differences between neighbouring pixels (edges), plus a small KL term. Latents
get a little noise before they are decoded, which keeps the latent space smooth. Muon optimises the
filters, AdamW the other parameters.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.common import (
    RUNS,
    ProgressLog,
    WeightAverage,
    autocast,
    load_or_none,
    save_atomically,
)
from training.muon import Muon
from training.scenes import random_scene, render

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 24, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 512,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}


def training_images(seed: int, step: int, progress: float) -> torch.Tensor:
    """Return the batch of a training step.

    The share of whole images of 128 and 256 px grows with `progress`. Crops of 64 px come first: an
    autoencoder is local, and small crops allow more steps. Whole images are needed since the group
    norms' statistics depend on the content.

    Args:
        seed: seed of the run.
        step: the step, from 0.
        progress: share of the time budget that has passed, 0 to 1.

    Returns:
        float32 [batch, 3, side, side] in [-1, 1].
    """
    rng = np.random.default_rng((seed, step))
    if rng.uniform() < 1.1 - progress:
        batch, side, full_side = 24, 64, int(rng.choice((128, 128, 256, 512)))
    elif rng.uniform() < 0.8:
        batch, side, full_side = 8, 128, int(rng.choice((128, 128, 256)))
    else:
        batch, side, full_side = 2, 256, 256
    images = np.empty((batch, side, side, 3), np.float32)
    for i in range(batch):
        scene = random_scene(rng, things=1 if rng.uniform() < 0.5 else 2)
        image = render(scene, full_side, full_side)
        thing = scene.things[0]
        centre = np.array([thing.y, thing.x]) + rng.uniform(-1, 1, 2) * thing.radius
        y, x = np.clip(centre * full_side - side / 2, 0, full_side - side).astype(int)
        images[i] = image[y : y + side, x : x + side]
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def neighbour_differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the differences between vertical and between horizontal neighbours."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def autoencoder_loss(vae: AutoencoderKL, x: torch.Tensor, kl: float, noise: float) -> torch.Tensor:
    """Compute the loss of a batch: reconstruction, edges and KL term.

    Args:
        vae: the autoencoder.
        x: images [batch, 3, side, side] in [-1, 1].
        kl: weight of the KL term.
        noise: standard deviation of the latents' noise, relative to that of the latents.
    """
    mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    latent_std = mean.detach().std()
    z = mean + torch.randn_like(mean) * ((0.5 * logvar).exp() + noise * latent_std)
    y = vae.decoder(z).float()
    loss = (y - x).abs().mean()
    loss = loss + sum(
        (a - b).abs().mean()
        for a, b in zip(neighbour_differences(y), neighbour_differences(x), strict=True)
    )
    return loss + kl * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="time budget of all runs together")
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--noise", type=float, default=0.05, help="relative to the latents' std")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RUNS / "autoencoder.pt")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    parameters = dict(vae.named_parameters())
    print(f"{sum(p.numel() for p in parameters.values()):,} parameters")
    for name, p in parameters.items():  # each residual block starts as the identity
        if name.endswith(("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias")):
            torch.nn.init.zeros_(p)
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    muon = Muon(matrices, lr=args.muon)
    adam = torch.optim.AdamW(
        [p for p in parameters.values() if p.ndim < 2],
        lr=args.adam,
        betas=(0.9, 0.95),
        weight_decay=0,
    )
    average = WeightAverage(parameters, 0.995)
    step, elapsed = 0, 0.0
    checkpoint = load_or_none(args.out)
    if checkpoint:
        vae.load_state_dict(checkpoint["weights"])
        muon.load_state_dict(checkpoint["muon"])
        adam.load_state_dict(checkpoint["adam"])
        average.values, step, elapsed = (
            checkpoint["average"],
            checkpoint["step"],
            checkpoint["used"],
        )

    def save() -> None:
        state = {
            "weights": vae.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "average": average.values,
            "step": step,
            "used": elapsed,
        }
        save_atomically(state, args.out)

    clock, last_save, last_time = (
        ProgressLog(args.out.with_suffix(".log")),
        time.monotonic(),
        time.monotonic(),
    )
    budget = args.minutes * 60
    while elapsed < budget:
        torch.manual_seed(args.seed * 1_000_003 + step)  # latent noise of this step
        x = training_images(args.seed, step, elapsed / budget).contiguous(
            memory_format=torch.channels_last
        )
        with autocast():
            loss = autoencoder_loss(vae, x, args.kl, args.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        # Warm-up over 50 steps; decay over the last 35 % of the time.
        rate_factor = min(1, (step + 1) / 50, (1 - elapsed / budget) / 0.35 + 0.005)
        for optimizer, peak_rate in ((muon, args.muon), (adam, args.adam)):
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * rate_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(parameters, step)
        step += 1
        now = time.monotonic()
        elapsed, last_time = elapsed + now - last_time, now
        clock.tick(step, loss.item(), len(x), budget - elapsed, f"lr x{rate_factor:.2f}")
        if now - last_save > 90:
            save()
            last_save = now
    save()


if __name__ == "__main__":
    main()
