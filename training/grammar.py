"""Teaches the T5 encoder the grammar of captions, as FLUX's T5 knows it before it meets a picture.

    python -m training.grammar --steps 3000     # a new checkpoint, where there is none yet

In each word of a thing's phrase ("a large red ring") linear heads are to find that thing's
attributes, and where it stands. By the velocity alone this is hardly ever taught: a picture shows
it by itself at all but the highest noise. The heads are thrown away; a penalty keeps the encoder's
states near those that the transformer knows.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training.common import RUNS, load_if_there, save_atomically
from training.make_tokenizers import token_ids
from training.model import TinyFlux
from training.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    caption,
    random_scene,
    training_scene,
)

PLACES = ("only", *RELATIONS)
HEADS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES, "place": PLACES}
WIDTH = 24  # tokens of the longest caption, with some to spare
BETWEEN = re.compile(rf" (?:and|{'|'.join(RELATIONS)}) ")
GROUND = re.compile(r" (?:on|against) an? .*$")
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


def answers(scene: Scene, text: str) -> list[tuple[int, int, list[int]]]:
    """Where in `text` each thing's phrase begins and ends, and what `HEADS` are to say of it.

    Things that are alike have one phrase, whose place is "only".
    """
    ground = GROUND.search(text)
    end = ground.start() if ground else len(text)
    between = BETWEEN.search(text, 0, end)

    def facts(thing: Thing, place: str) -> list[int]:
        values = (thing.shape, thing.colour, thing.size, thing.texture, place)
        return [tuple(h).index(v) for h, v in zip(HEADS.values(), values, strict=True)]

    first, *rest = scene.things
    if between is None:
        return [(0, end, facts(first, "only"))]
    return [
        (0, between.start(), facts(first, scene.relation)),
        (between.end(), end, facts(rest[0], OPPOSITE[scene.relation])),
    ]


def batch(tokenizer, rng: np.random.Generator, size: int, unseen: bool = False):
    """Token ids [size, WIDTH], and what each head is to say of each: [size, WIDTH, 5], or -100."""
    texts, told = [], []
    for _ in range(size):
        if unseen:
            scene = random_scene(rng, things=1 + int(rng.uniform() < 0.7), unseen=True)
        else:
            scene = training_scene(rng)
        texts.append(caption(scene, rng))
        told.append(answers(scene, texts[-1]))
    labels = torch.full((size, WIDTH, len(HEADS)), -100)
    for row, (offsets, phrases) in enumerate(
        zip(tokenizer(texts, return_offsets_mapping=True)["offset_mapping"], told, strict=True)
    ):
        for start, end, facts in phrases:
            for at, (a, b) in enumerate(offsets[:WIDTH]):
                if start <= a and b <= end and a < b:
                    labels[row, at] = torch.tensor(facts)
    return token_ids(tokenizer, texts)[:, :WIDTH], labels


def store(saved: dict, t5: nn.Module) -> None:
    """Puts the encoder into a checkpoint of `training.flow`, as its weights and their average.

    The weights have the embedding under both its names: the one that is loaded last counts.
    """
    for part, values in (("weights", t5.state_dict()), ("average", dict(t5.named_parameters()))):
        saved[part] |= {f"t5.{name}": value.detach().clone() for name, value in values.items()}


def main() -> None:
    """Train the encoder in place, and say how often each head is right on unseen combinations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=RUNS / "flow.pt")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--near", type=float, default=1.0, help="weight of the states' change")
    parser.add_argument("--probe", action="store_true", help="train the heads only; write nothing")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = TinyFlux()
    saved = load_if_there(args.flow)
    if saved is None:
        average = {name: p.detach() for name, p in model.named_parameters()}
        saved = {"weights": model.state_dict(), "average": average, "step": 0, "positions": {}}
    model.load_state_dict(saved["weights"])
    model.load_state_dict(saved["average"], strict=False)
    t5, known = model.t5, copy.deepcopy(model.t5).requires_grad_(False)
    heads = nn.ModuleList(nn.Linear(t5.config.d_model, len(names)) for names in HEADS.values())
    trained = list(heads.parameters()) + ([] if args.probe else list(t5.parameters()))
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(args.seed)
    for step in range(args.steps):
        ids, labels = batch(model.t5_tokenizer, rng, 64)
        states, before = t5(ids)[0], known(ids)[0]
        apart = (states - before).square().mean() / before.var()
        losses = [
            nn.functional.cross_entropy(head(states).flatten(0, 1), labels[..., i].flatten())
            for i, head in enumerate(heads)
        ]
        (sum(losses) + losses[-1] + args.near * apart).backward()  # places are the hardest
        for group in optimizer.param_groups:
            group["lr"] = args.rate * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step + 1 == args.steps:
            spoken = " ".join(f"{n} {x:.3f}" for n, x in zip(HEADS, losses, strict=True))
            print(f"step {step + 1}: {spoken}, states moved by {apart:.3f}", flush=True)
    with torch.no_grad():
        ids, labels = batch(model.t5_tokenizer, np.random.default_rng(args.seed + 1), 1000, True)
        states = t5(ids)[0]
        for i, (name, head) in enumerate(zip(HEADS, heads, strict=True)):
            asked = labels[..., i] >= 0
            right = head(states).argmax(-1) == labels[..., i]
            print(f"{name}: {right[asked].float().mean():.1%} of words of unseen combinations")
    if not args.probe:
        store(saved, t5)
        save_atomically(saved, args.flow)
        print(f"wrote {args.flow}")


if __name__ == "__main__":
    main()
