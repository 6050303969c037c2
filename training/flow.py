"""Trains the transformer and CLIP with flow matching; T5 is frozen (see `training.grammar`).

A run consists of phases. Each phase is one command, which continues from the last checkpoint:

    python -m training.flow --mix 128@4 --minutes 30               # constant rate after warm-up
    python -m training.flow --mix 128@4:1,256@2:4 --minutes 25     # larger images, as FLUX did
    python -m training.flow --mix 256:1,512:2 --minutes 20 --decay # the rate decays to zero
    python -m training.flow --mix 256:1,512:2 --minutes 10 --decay --distil

`--mix` lists kinds of steps and their weights:

    128      images of 128 px, with FLUX's positions
    128@4    images of 128 px, with positions four apart, as in an image of 512 px
    512/16   windows of 16 x 16 tokens around a thing in an image of 512 px, with their positions in
             it and its whole caption (Patch Diffusion, arXiv 2304.12526): they teach outlines with
             a quarter of the tokens; whole images teach what spans more than a window
    512/8    windows within a thing, preferably of scenes with two different things, mostly at noise
             levels that hide which of the two it is, so that the caption must tell
    512/24   windows for large things, which are wider than 16 tokens and occur in one scene of
             seven, and for rings and crosses

Several processes with one thread each are faster here than one process with several threads:
`torchrun --nproc-per-node 2 -m training.flow ...` averages their gradients; the batch doubles.

The noisy tokens are `x_sigma = (1 - sigma) x0 + sigma noise`, and the target is `noise - x0`. Data,
noise and sigma of a step depend on the seed and the step only, so that a resumed run continues
unchanged.

`--distil` teaches guidance, so that one forward pass replaces two, as in FLUX.1-dev. The target is
`u0 + g (u - u0)`, where u and u0 are the velocities of the frozen averaged weights with and without
the prompt, and g is the guidance scale given to the model (Meng et al., arXiv 2210.03142). Unlike
`noise - x0`, it is determined by the model's inputs. Before distillation the guidance scale is
random and unrelated to the target.

`--refine` trains a model that has learned guidance, and keeps the guidance. If the model's velocity
v is `u0 + g (u - u0)`, it implies the plain velocity `u = u0 + (v - u0) / g`; that one is compared
with `noise - x0`. u0 is the frozen velocity without the prompt, at guidance g (Chen et al., arXiv
2501.15420).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from training.common import (
    RUNS,
    ProgressLog,
    WeightAverage,
    autocast,
    load_or_none,
    save_atomically,
)
from training.latents import Latents
from training.model import TinyFlux
from training.muon import Muon
from training.steps import BATCH_SIZE, IMAGE_COUNT, TEXT_STATES, draw_batch, parse_mix


def make_optimizers(model: TinyFlux, muon_rate: float, adam_rate: float):
    """Return Muon for the matrices in the blocks, and AdamW for all else (adaLN included)."""
    matrices, other_parameters = [], []
    for name, p in model.named_parameters():
        in_block = "transformer_blocks." in name and p.ndim == 2 and ".norm" not in name
        (matrices if in_block else other_parameters).append(p)
    muon = Muon(matrices, lr=muon_rate, weight_decay=0.01)
    adam = torch.optim.AdamW(
        other_parameters, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return muon, adam


@torch.no_grad()
def teacher_velocity(
    teacher: TinyFlux, x, sigma, guidance, texts, ids, text_length
) -> torch.Tensor:
    """Predict the teacher's velocity, without gradients.

    Args:
        teacher: the frozen model.
        x: noisy tokens [batch, tokens, 64].
        sigma: noise levels [batch].
        guidance: guidance scales [batch].
        texts: the captions.
        ids: positions, as in `TinyFlux.forward`.
        text_length: number of T5 states, as in `TinyFlux.encode`.

    Returns:
        float32 [batch, tokens, 64].
    """
    return teacher(x, sigma, guidance, *teacher.encode(texts, text_length), ids).float()


def distillation_target(prompted, empty, guidance) -> torch.Tensor:
    """Return the target of `--distil`, `u0 + g (u - u0)` (Meng et al., arXiv 2210.03142).

    Args:
        prompted: plain velocity u with the prompt, [batch, tokens, 64].
        empty: plain velocity u0 without the prompt, [batch, tokens, 64].
        guidance: guidance scales g, [batch].
    """
    return torch.lerp(empty, prompted, guidance[:, None, None])


def implied_velocity(guided, empty, guidance) -> torch.Tensor:
    """Return the plain velocity that a guided one implies, `u0 + (v - u0) / g`.

    This is the inverse of `distillation_target` (Chen et al., arXiv 2501.15420).

    Args:
        guided: guided velocity v, [batch, tokens, 64].
        empty: plain velocity u0 without the prompt, [batch, tokens, 64].
        guidance: guidance scales g, [batch]; 1 where v is not guided.
    """
    return torch.lerp(empty, guided, 1 / guidance[:, None, None])


def synchronise_gradients(parameters: dict[str, torch.nn.Parameter], elapsed: float) -> float:
    """Average the gradients over all ranks in place.

    Args:
        parameters: the parameters by name.
        elapsed: seconds since the start of the phase.

    Returns:
        `elapsed`, averaged over the ranks too, so that all of them stop at the same step.
    """
    if not dist.is_initialized():
        return elapsed
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([elapsed])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
    return flat[-1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="length of this phase")
    parser.add_argument("--mix", default="128", help="kinds of steps and their weights")
    parser.add_argument("--decay", action="store_true", help="decay the rate to zero in this phase")
    guidance_mode = parser.add_mutually_exclusive_group()
    guidance_mode.add_argument(
        "--distil", action="store_true", help="learn guidance from the averaged weights"
    )
    guidance_mode.add_argument(
        "--refine", action="store_true", help="train on and keep learned guidance"
    )
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=1.5e-3)
    parser.add_argument("--several", action="store_true", help="scenes of one to four things")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
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
    model.t5.requires_grad_(False)  # trained by training.grammar; the flow loss would undo that
    parameters = dict(model.named_parameters())
    print({k: sum(p.numel() for p in m.parameters()) for k, m in model.named_children()})
    muon, adam = make_optimizers(model, args.muon, args.adam)
    average = WeightAverage(parameters, args.average)
    step, images_seen, teacher = 0, {}, None
    checkpoint = load_or_none(args.out)
    if checkpoint:
        model.load_state_dict(checkpoint["weights"])
        if "muon" in checkpoint:  # a checkpoint by training.restore has no optimizer states
            muon.load_state_dict(checkpoint["muon"])
            adam.load_state_dict(checkpoint["adam"])
        average.values, step, images_seen = (
            checkpoint["average"],
            checkpoint["step"],
            checkpoint["positions"],
        )
        for optimizer, peak_rate in ((muon, args.muon), (adam, args.adam)):
            for group in optimizer.param_groups:
                group["peak"] = peak_rate
    if args.distil or args.refine:
        if not checkpoint:
            parser.error(f"{args.out} does not exist; --distil and --refine need a checkpoint")
        # The teacher is kept in a file, so that a resumed phase has the same one.
        path = args.out.with_name("teacher.pt")
        if not path.exists():
            save_atomically(average.values, path)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        teacher.load_state_dict(load_or_none(path), strict=False)
    if not args.no_compile:
        model.transformer.compile(dynamic=False)
        if teacher:
            teacher.transformer.compile(dynamic=False)
    sides = {kind.side for kind in kinds}
    data = {side: Latents(side, IMAGE_COUNT[side], args.seed, args.several) for side in sides}

    def save() -> None:
        state = {
            "weights": model.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "average": average.values,
            "step": step,
            "positions": images_seen,
        }
        save_atomically(state, args.out)

    clock = ProgressLog(args.out.with_suffix(".log"), interval=20 if rank == 0 else math.inf)
    start = last_save = time.monotonic()
    budget = args.minutes * 60
    recent_losses: dict[str, float] = {}
    elapsed = 0.0
    while elapsed < budget:
        choice = np.random.default_rng((args.seed, step, 1)).choice(len(kinds), p=shares)
        kind = kinds[int(choice)]
        side, batch, text_length = kind.side, BATCH_SIZE[kind.grid], TEXT_STATES[kind.grid]
        x0, noise, sigma, guidance, texts, weight, ids = draw_batch(
            data[side],
            kind,
            (args.seed, step, rank),
            batch,
            images_seen.get(side, 0) + rank * batch,
            args.dropout,
        )
        x = torch.lerp(x0, noise, sigma[:, None, None])
        with autocast():
            u = model(x, sigma, guidance, *model.encode(texts, text_length), ids).float()
            target = noise - x0
            if teacher:
                empty = teacher_velocity(
                    teacher, x, sigma, guidance, [""] * batch, ids, text_length
                )
            if args.refine:
                # Without a prompt the model's velocity is not guided.
                is_guided = torch.tensor([bool(text) for text in texts])
                u = implied_velocity(u, empty, torch.where(is_guided, guidance, 1.0))
            elif args.distil:
                prompted = teacher_velocity(teacher, x, sigma, guidance, texts, ids, text_length)
                target = distillation_target(prompted, empty, guidance)
        loss = (weight * (u - target).square()).mean()
        loss.backward()
        elapsed = synchronise_gradients(parameters, time.monotonic() - start)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        rate_factor = min(1.0, (step + 1) / 100)
        if args.decay:
            rate_factor = min(rate_factor, 1 - elapsed / budget)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(parameters, step)
        images_seen[side] = images_seen.get(side, 0) + batch * ranks
        step += 1
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise FloatingPointError(
                f"loss is {loss_value} at step {step}; expected a finite number"
            )
        recent_losses[str(kind)] = (
            recent_losses.get(str(kind), loss_value) * 0.95 + loss_value * 0.05
        )
        recent_text = " ".join(f"{k} {v:.4f}" for k, v in sorted(recent_losses.items()))
        tokens = batch * kind.grid**2 * ranks
        clock.tick(
            step, loss_value, tokens, budget - elapsed, f"lr x{rate_factor:.2f}  {recent_text}"
        )
        if time.monotonic() - last_save > 120 and rank == 0:
            save()
            last_save = time.monotonic()
    if rank == 0:
        save()


if __name__ == "__main__":
    main()
