"""Trains the transformer and CLIP with flow matching; T5 is `training.grammar`'s and frozen.

One run is a sequence of phases, each one command; the checkpoint carries over:

    python -m training.flow --mix 128@4 --minutes 30               # constant rate after warm-up
    python -m training.flow --mix 128@4:1,256@2:4 --minutes 25     # tokens grow as FLUX's did
    python -m training.flow --mix 256:1,512:2 --minutes 20 --decay # falls to zero in this phase
    python -m training.flow --mix 256:1,512:2 --minutes 10 --decay --distil

`128@4` means pictures of 128 px with the tokens' positions four apart, as they would lie in a
picture of 512 px; `128` has the positions that FLUX gives to 128 px. `512/16` means windows of
16 x 16 tokens out of pictures of 512 px, around one of their things, at the positions they have
there and under the whole caption (Patch Diffusion, arXiv 2304.12526): outlines are learned from a
quarter of the tokens, and whole pictures are needed for what reaches across them. `512/8` are
windows within one of two things that differ, mostly at noise that hides which: there the caption
has to tell. `512/24` are windows around large things, which are wider than 16 tokens and in one
scene of seven, and around rings and crosses.

Several processes of one thread each beat one process of several threads here:
`torchrun --nproc-per-node 2 -m training.flow ...` averages their gradients; the batch doubles.

`x_sigma = (1 - sigma) x0 + sigma noise` and the target is `noise - x0`. The data, noise and sigma
of step i derive from the seed and i, so a resumed run goes on as it would have. With `--distil`
guidance is learned, so that one forward pass does for two, as in FLUX.1-dev: the target becomes
`u0 + g (u - u0)` with u and u0 the velocities, with and without prompt, of the frozen averaged
weights, and g told as guidance (Meng et al., arXiv 2210.03142). Unlike `noise - x0` it is certain,
given the noisy picture. Before that the guidance told is random and means nothing.

`--refine` trains on a model that has learned guidance, without unlearning it: where its velocity v
is `u0 + g (u - u0)`, the plain velocity u that it implies is `u0 + (v - u0) / g`, and that one is
compared with `noise - x0`. u0 is the frozen velocity without prompt, told g. (Chen et al., arXiv
2501.15420.)
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from training.common import RUNS, Average, Clock, autocast, load_if_there, save_atomically
from training.latents import Latents
from training.model import TinyFlux, pack, positions
from training.muon import Muon
from training.scenes import Scene, caption

SHIFT = {128: 3.0, 256: 5.0, 512: 8.0}
"""Of the training sigmas. Four times the tokens show a layout through twice the noise, so that with
one shift for all, pictures of 512 px would teach outlines in one step of twenty."""
BATCH = {8: 48, 16: 16, 24: 7, 32: 4}  # by the tokens along a side
COUNT = {128: 12_288, 256: 6_144, 512: 4_096}  # pictures; each meets many captions and noises
HIGH, HIGH_WITHIN = (0.25, 0.7), (0.8, 0.85)
"""Share of a batch whose sigmas lie evenly from the second number to 1, before the shift; and the
same of windows within a thing."""
TEXT = {8: 24, 16: 24, 24: 24, 32: None}  # text states that the transformer sees; None: all


@dataclass(frozen=True)
class Kind:
    """What a step is made of: "512", "128@4" or "512/16" of `--mix`."""

    side: int  # of the pictures, in pixels
    stride: int = 1  # between the positions of neighbouring tokens
    window: int = 0  # tokens along the side of the part that is seen; 0: all of the picture

    @property
    def grid(self) -> int:
        """Tokens along a side of what is seen."""
        return self.window or self.side // 16

    @property
    def within(self) -> bool:
        """Whether the window is no wider than the smallest thing (`scenes.SIZES`)."""
        return 0 < self.window <= 8

    @property
    def looked_through(self) -> int:
        """Scenes looked through for each that is taken, the most `wanted` first; 1: none is."""
        return 3 if self.within else 8 if self.window > 16 else 1

    def wanted(self, scene: Scene) -> int:
        """How much a window is meant for `scene`: for two things that differ, or else for what
        went wrong most often, large things, and rings and crosses."""
        if self.within:
            return bool(scene.relation)
        large = any(thing.size == "large" for thing in scene.things)
        return large + any(thing.shape in ("ring", "cross") for thing in scene.things)

    def __str__(self) -> str:
        window = f"/{self.window}" if self.window else ""
        return f"{self.side}{window}@{self.stride}"


def optimizers(model: TinyFlux, muon_rate: float, adam_rate: float):
    """Muon for the matrices inside the blocks, AdamW for all else (adaLN included)."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = "transformer_blocks." in name and p.ndim == 2 and ".norm" not in name
        (matrices if inside else rest).append(p)
    muon = Muon(matrices, lr=muon_rate, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return muon, adam


def emphasis(scenes: list[Scene], grid: int, place: torch.Tensor) -> torch.Tensor:
    """Weights of the tokens in the loss, up to a common factor: [batch, grid, grid].

    A small thing covers one token in fourteen, and the flat ground around it would teach the rest
    of every step. A token in the box around a thing weighs the root of (all tokens / those in the
    box). Weights known from what the noise still leaves open would draw the velocity towards
    things; so the box is the wider the higher `place`, the sigma before its shift, and where even
    the layout is open (0.75 and up) all tokens weigh the same.
    """
    weights = torch.ones(len(scenes), grid, grid)
    margins = 1 + (15 * (place - 0.4)).clamp(0, 3) * max(grid / 32, 0.5)
    for weight, scene, margin in zip(weights, scenes, margins.tolist(), strict=True):
        for thing in scene.things:
            reach = thing.radius * grid + margin
            x0, x1, y0, y1 = (
                min(max(round(centre * grid + sign * reach), 0), grid)
                for centre in (thing.x, thing.y)
                for sign in (-1, 1)
            )
            weight[y0:y1, x0:x1] = grid / ((y1 - y0) * (x1 - x0)) ** 0.5
    known = ((0.75 - place) / 0.15).clamp(0, 1)
    weights = torch.lerp(torch.ones(()), weights, known[:, None, None])
    return weights


def corner(scene: Scene, grid: int, window: int, rng: np.random.Generator) -> tuple[int, int]:
    """(row, column) of a random window's first token; it has one of the things in it, or it in it.

    `grid` and `window`: tokens along a side of the picture and of the window.
    """
    thing = scene.things[int(rng.integers(len(scene.things)))]
    reach = thing.radius * grid
    found = []
    for centre in (thing.y * grid, thing.x * grid):
        ends = sorted((centre - reach, centre + reach - window))
        first, last = (min(max(round(end), 0), grid - window) for end in ends)
        found.append(int(rng.integers(first, last + 1)))
    return found[0], found[1]


def draw(
    latents: Latents, kind: Kind, seed: tuple[int, ...], batch: int, position: int, dropout: float
):
    """The batch of a step: (x0, noise, sigma, guidance, captions, weight, ids); from `seed`."""
    rng = np.random.default_rng(seed)
    whole, n = kind.side // 16, kind.grid
    if kind.looked_through > 1:
        start = int(rng.integers(latents.count))
        z, scenes = latents.batch(start, kind.looked_through * batch)
        chosen = sorted(range(len(scenes)), key=lambda i: -kind.wanted(scenes[i]))[:batch]
        z, scenes = z[chosen], [scenes[i] for i in chosen]
    else:
        z, scenes = latents.batch(position, batch)
    corners = [(0, 0)] * batch
    if kind.window:
        corners = [corner(scene, whole, n, rng) for scene in scenes]
        z = torch.stack(
            [
                one[:, 2 * r : 2 * (r + n), 2 * c : 2 * (c + n)]
                for one, (r, c) in zip(z, corners, strict=True)
            ]
        )
    ids = positions(n, n, kind.stride).repeat(batch, 1, 1)
    ids[..., 1:] += kind.stride * torch.tensor(corners)[:, None]
    texts = [caption(scene, rng) if rng.uniform() >= dropout else "" for scene in scenes]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    x0 = pack(z)
    noise = torch.randn(x0.shape, generator=generator)
    # Stratified over the batch: less variance than independent draws.
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    # Outlines are decided at sigma 0.85 to 0.98 of 512 px, from 0.4 to 0.85 before the shift; what
    # a caption asks for is learned where the picture does not show it yet: hence the last quarter.
    high, least = HIGH_WITHIN if kind.within else HIGH
    low = (uniform / (1 - high)).clamp(1e-4, 1 - 1e-4)
    sigma = torch.sigmoid(0.4 + 0.9 * torch.special.ndtri(low))
    sigma = torch.where(uniform < 1 - high, sigma, 1 - (1 - least) * (1 - uniform) / high)
    sigma = sigma[torch.randperm(batch, generator=generator)]
    weight = emphasis(scenes, whole, sigma)
    weight = torch.stack(
        [one[r : r + n, c : c + n] for one, (r, c) in zip(weight, corners, strict=True)]
    )
    weight = (weight / weight.mean()).flatten(1)[..., None]
    shift = SHIFT[kind.side]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    guidance = 2 + 2 * torch.rand(batch, generator=generator)  # about what users ask for, 3.5
    return x0, noise, sigma, guidance, texts, weight, ids


@torch.no_grad()
def frozen(teacher: TinyFlux, x, sigma, guidance, texts, ids, length) -> torch.Tensor:
    """The teacher's velocity, like `x` [batch, tokens, 64], float32.

    `sigma` and the `guidance` told [batch]; `texts`, `ids` and `length` as in `TinyFlux`.
    """
    return teacher(x, sigma, guidance, *teacher.encode(texts, length), ids).float()


def distilled(prompted, empty, guidance) -> torch.Tensor:
    """Target of `--distil`, `u0 + g (u - u0)` (Meng et al., arXiv 2210.03142).

    `prompted` and `empty` [batch, tokens, 64] from a model without guidance; `guidance` [batch].
    """
    return torch.lerp(empty, prompted, guidance[:, None, None])


def implied(guided, empty, guidance) -> torch.Tensor:
    """The plain velocity that a guided one implies, `u0 + (v - u0) / g`: undoes `distilled`.

    `guided` and `empty` [batch, tokens, 64]; `guidance` [batch], 1 where nothing was added (Chen et
    al., arXiv 2501.15420).
    """
    return torch.lerp(empty, guided, 1 / guidance[:, None, None])


def share_gradients(named: dict[str, torch.nn.Parameter], used: float) -> float:
    """Averages gradients over the ranks, and the clock too, so that all stop at the same step."""
    if not dist.is_initialized():
        return used
    gradients = [p.grad for p in named.values() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([used])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return flat[-1].item()


def parse_mix(text: str) -> tuple[list[Kind], np.ndarray]:
    """ "128@4:1,512/16:3" to ([Kind(128, 4), Kind(512, 1, 16)], probabilities)."""
    kinds, weights = [], []
    for entry in text.split(","):
        kind, _, weight = entry.partition(":")
        kind, _, stride = kind.partition("@")
        side, _, window = kind.partition("/")
        kinds.append(Kind(int(side), int(stride or 1), int(window or 0)))
        weights.append(float(weight or 1))
    return kinds, np.array(weights) / sum(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="length of this phase")
    parser.add_argument("--mix", default="128", help="kinds of steps and their weights")
    parser.add_argument("--decay", action="store_true", help="the rate falls to zero in this phase")
    learned = parser.add_mutually_exclusive_group()
    learned.add_argument("--distil", action="store_true", help="learn guidance from the average")
    learned.add_argument("--refine", action="store_true", help="keep guidance that was learned")
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=1.5e-3)
    parser.add_argument("--several", action="store_true", help="scenes of one to four things")
    parser.add_argument("--dropout", type=float, default=0.1, help="of captions")
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RUNS / "flow.pt")
    args = parser.parse_args()
    kinds, shares = parse_mix(args.mix)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")

    torch.manual_seed(args.seed)
    model = TinyFlux()
    model.t5.requires_grad_(False)  # training.grammar taught it, and velocities would untie it
    named = dict(model.named_parameters())
    print({k: sum(p.numel() for p in m.parameters()) for k, m in model.named_children()})
    muon, adam = optimizers(model, args.muon, args.adam)
    average = Average(named, args.average)
    step, seen, teacher = 0, {}, None
    saved = load_if_there(args.out)
    if saved:
        model.load_state_dict(saved["weights"])
        if "muon" in saved:  # not after training.restore
            muon.load_state_dict(saved["muon"])
            adam.load_state_dict(saved["adam"])
        average.values, step, seen = saved["average"], saved["step"], saved["positions"]
        for optimizer, peak in ((muon, args.muon), (adam, args.adam)):
            for group in optimizer.param_groups:
                group["peak"] = peak
    if args.distil or args.refine:
        if not saved:
            parser.error(f"nothing to learn guidance from: expected a checkpoint at {args.out}")
        # The frozen teacher: kept in a file, so that a resumed phase has the same one.
        path = args.out.with_name("teacher.pt")
        if not path.exists():
            save_atomically(average.values, path)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        teacher.load_state_dict(load_if_there(path), strict=False)
    if not args.no_compile:
        model.transformer.compile(dynamic=False)
        if teacher:
            teacher.transformer.compile(dynamic=False)
    sides = {kind.side for kind in kinds}
    data = {side: Latents(side, COUNT[side], args.seed, args.several) for side in sides}

    def save() -> None:
        state = {
            "weights": model.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "average": average.values,
            "step": step,
            "positions": seen,
        }
        save_atomically(state, args.out)

    clock = Clock(args.out.with_suffix(".log"), every=20 if rank == 0 else math.inf)
    start = last_save = time.monotonic()
    budget = args.minutes * 60
    recent: dict[str, float] = {}
    used = 0.0
    while used < budget:
        choice = np.random.default_rng((args.seed, step, 1)).choice(len(kinds), p=shares)
        kind = kinds[int(choice)]
        side, batch, length = kind.side, BATCH[kind.grid], TEXT[kind.grid]
        x0, noise, sigma, guidance, texts, weight, ids = draw(
            data[side],
            kind,
            (args.seed, step, rank),
            batch,
            seen.get(side, 0) + rank * batch,
            args.dropout,
        )
        x = torch.lerp(x0, noise, sigma[:, None, None])
        with autocast():
            u = model(x, sigma, guidance, *model.encode(texts, length), ids).float()
            target = noise - x0
            if teacher:
                empty = frozen(teacher, x, sigma, guidance, [""] * batch, ids, length)
            if args.refine:
                # Without prompt nothing was added.
                added = torch.tensor([bool(text) for text in texts])
                u = implied(u, empty, torch.where(added, guidance, 1.0))
            elif args.distil:
                prompted = frozen(teacher, x, sigma, guidance, texts, ids, length)
                target = distilled(prompted, empty, guidance)
        loss = (weight * (u - target).square()).mean()
        loss.backward()
        used = share_gradients(named, time.monotonic() - start)
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        rate = min(1.0, (step + 1) / 100)
        if args.decay:
            rate = min(rate, 1 - used / budget)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(named, step)
        seen[side] = seen.get(side, 0) + batch * ranks
        step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss {value} at step {step}")
        recent[str(kind)] = recent.get(str(kind), value) * 0.95 + value * 0.05
        detail = " ".join(f"{k} {v:.4f}" for k, v in sorted(recent.items()))
        tokens = batch * kind.grid**2 * ranks
        clock.tick(step, value, tokens, budget - used, f"lr x{rate:.2f}  {detail}")
        if time.monotonic() - last_save > 120 and rank == 0:
            save()
            last_save = time.monotonic()
    if rank == 0:
        save()


if __name__ == "__main__":
    main()
