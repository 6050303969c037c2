"""Trains the small autoencoder (diffusers' AutoencoderKL, 16 channels, factor 8, as FLUX has).

    python -m training.autoencoder --minutes 8

Crops of 64 px out of 128, 256 and 512 px drawings, so that edges and textures of all later
resolutions are seen, then more and more whole pictures; Muon for the filters. The loss is L1 in
pixels, plus L1 of the differences between neighbours (edges), plus a small KL term; latents get a
little noise on the way to the decoder, which keeps them smooth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.common import RUNS, Average, Clock, autocast, load_if_there, save_atomically
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


def pictures(seed: int, step: int, progress: float) -> torch.Tensor:
    """The batch of step `step`: float32 [batch, 3, side, side] in [-1, 1].

    Crops of 64 px at first (an autoencoder is local, and small crops mean many steps), whole
    pictures of 128 and 256 px later, since the statistics of the group norms depend on the content.
    """
    rng = np.random.default_rng((seed, step))
    if rng.uniform() < 1.1 - progress:
        batch, side, large = 24, 64, int(rng.choice((128, 128, 256, 512)))
    elif rng.uniform() < 0.8:
        batch, side, large = 8, 128, int(rng.choice((128, 128, 256)))
    else:
        batch, side, large = 2, 256, 256
    found = np.empty((batch, side, side, 3), np.float32)
    for i in range(batch):
        scene = random_scene(rng, things=1 if rng.uniform() < 0.5 else 2)
        image = render(scene, large, large)
        thing = scene.things[0]
        centre = np.array([thing.y, thing.x]) + rng.uniform(-1, 1, 2) * thing.radius
        y, x = np.clip(centre * large - side / 2, 0, large - side).astype(int)
        found[i] = image[y : y + side, x : x + side]
    return torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbours, downwards and to the right."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_of(vae: AutoencoderKL, x: torch.Tensor, kl: float, noise: float) -> torch.Tensor:
    """Reconstruction, edge and KL terms of a batch in [-1, 1]."""
    mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    spread = mean.detach().std()
    z = mean + torch.randn_like(mean) * ((0.5 * logvar).exp() + noise * spread)
    y = vae.decoder(z).float()
    result = (y - x).abs().mean()
    result = result + sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
    return result + kl * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="time budget, all runs together")
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--noise", type=float, default=0.05, help="share of the latents' spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RUNS / "autoencoder.pt")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    named = dict(vae.named_parameters())
    print(f"{sum(p.numel() for p in named.values()):,} parameters")
    for name, p in named.items():  # every residual branch starts as the identity
        if name.endswith(("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias")):
            torch.nn.init.zeros_(p)
    matrices = [p for p in named.values() if p.ndim >= 2]
    muon = Muon(matrices, lr=args.muon)
    adam = torch.optim.AdamW(
        [p for p in named.values() if p.ndim < 2], lr=args.adam, betas=(0.9, 0.95), weight_decay=0
    )
    average = Average(named, 0.995)
    step, used = 0, 0.0
    saved = load_if_there(args.out)
    if saved:
        vae.load_state_dict(saved["weights"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        average.values, step, used = saved["average"], saved["step"], saved["used"]

    def save() -> None:
        state = {
            "weights": vae.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "average": average.values,
            "step": step,
            "used": used,
        }
        save_atomically(state, args.out)

    clock, last_save, last = Clock(args.out.with_suffix(".log")), time.monotonic(), time.monotonic()
    budget = args.minutes * 60
    while used < budget:
        torch.manual_seed(args.seed * 1_000_003 + step)  # latent noise of this step
        x = pictures(args.seed, step, used / budget).contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = loss_of(vae, x, args.kl, args.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        # Warm-up, then a decay over the last 35 %.
        rate = min(1, (step + 1) / 50, (1 - used / budget) / 0.35 + 0.005)
        for optimizer, peak in ((muon, args.muon), (adam, args.adam)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(named, step)
        step += 1
        now = time.monotonic()
        used, last = used + now - last, now
        clock.tick(step, loss.item(), len(x), budget - used, f"lr x{rate:.2f}")
        if now - last_save > 90:
            save()
            last_save = now
    save()


if __name__ == "__main__":
    main()
