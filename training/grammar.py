"""Trains the T5 encoder on captions alone; FLUX's T5 too was trained on text alone.

    python -m training.grammar --steps 3000     # creates a checkpoint if there is none

From the state of each word of a thing's phrase ("a large red ring"), linear heads predict that
thing's attributes and its place. The flow loss hardly teaches this: except at the highest noise,
the noisy image itself shows the attributes. A penalty keeps the encoder's states close to those
that the transformer was trained with. The heads are discarded.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training.common import RUNS, load_or_none, save_atomically
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
WIDTH = 24  # tokens per caption, more than the longest one has
SEPARATOR = re.compile(rf" (?:and|{'|'.join(RELATIONS)}) ")
BACKGROUND = re.compile(r" (?:on|against) an? .*$")
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


def phrase_labels(scene: Scene, text: str) -> list[tuple[int, int, list[int]]]:
    """Locate the phrase of each thing in a caption.

    Things that are alike share a phrase, whose place is "only".

    Args:
        scene: the scene.
        text: its caption.

    Returns:
        For each phrase, its start and end in `text`, and the class index for each of `HEADS`.
    """
    background = BACKGROUND.search(text)
    end = background.start() if background else len(text)
    separator = SEPARATOR.search(text, 0, end)

    def class_indices(thing: Thing, place: str) -> list[int]:
        values = (thing.shape, thing.colour, thing.size, thing.texture, place)
        return [tuple(h).index(v) for h, v in zip(HEADS.values(), values, strict=True)]

    first, *rest = scene.things
    if separator is None:
        return [(0, end, class_indices(first, "only"))]
    return [
        (0, separator.start(), class_indices(first, scene.relation)),
        (separator.end(), end, class_indices(rest[0], OPPOSITE[scene.relation])),
    ]


def labelled_batch(tokenizer, rng: np.random.Generator, size: int, unseen: bool = False):
    """Draw captions with a label for each token and head.

    Args:
        tokenizer: the T5 tokenizer.
        rng: source of randomness.
        size: number of captions.
        unseen: whether scenes come from the held-out combinations.

    Returns:
        Token ids [size, WIDTH], and class indices [size, WIDTH, heads], -100 outside of phrases.
    """
    texts, labels_by_text = [], []
    for _ in range(size):
        if unseen:
            scene = random_scene(rng, things=1 + int(rng.uniform() < 0.7), unseen=True)
        else:
            scene = training_scene(rng)
        texts.append(caption(scene, rng))
        labels_by_text.append(phrase_labels(scene, texts[-1]))
    labels = torch.full((size, WIDTH, len(HEADS)), -100)
    for row, (offsets, phrases) in enumerate(
        zip(
            tokenizer(texts, return_offsets_mapping=True)["offset_mapping"],
            labels_by_text,
            strict=True,
        )
    ):
        for start, end, indices in phrases:
            for token, (a, b) in enumerate(offsets[:WIDTH]):
                if start <= a and b <= end and a < b:
                    labels[row, token] = torch.tensor(indices)
    return token_ids(tokenizer, texts)[:, :WIDTH], labels


def store_encoder(checkpoint: dict, t5: nn.Module) -> None:
    """Store the encoder in a checkpoint of `training.flow`, as its weights and their average.

    The embedding has two names in the state dict, and the one that is loaded last is used: both are
    replaced.
    """
    for part, values in (("weights", t5.state_dict()), ("average", dict(t5.named_parameters()))):
        checkpoint[part] |= {f"t5.{name}": value.detach().clone() for name, value in values.items()}


def main() -> None:
    """Train a checkpoint's encoder, and print each head's accuracy on held-out combinations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=RUNS / "flow.pt")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--near", type=float, default=1.0, help="weight of the penalty on the states"
    )
    parser.add_argument("--probe", action="store_true", help="train the heads only; write nothing")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = TinyFlux()
    checkpoint = load_or_none(args.flow)
    if checkpoint is None:
        average = {name: p.detach() for name, p in model.named_parameters()}
        checkpoint = {"weights": model.state_dict(), "average": average, "step": 0, "positions": {}}
    model.load_state_dict(checkpoint["weights"])
    model.load_state_dict(checkpoint["average"], strict=False)
    t5, original = model.t5, copy.deepcopy(model.t5).requires_grad_(False)
    heads = nn.ModuleList(nn.Linear(t5.config.d_model, len(names)) for names in HEADS.values())
    parameters = list(heads.parameters()) + ([] if args.probe else list(t5.parameters()))
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(args.seed)
    for step in range(args.steps):
        ids, labels = labelled_batch(model.t5_tokenizer, rng, 64)
        states, before = t5(ids)[0], original(ids)[0]
        state_change = (states - before).square().mean() / before.var()
        losses = [
            nn.functional.cross_entropy(head(states).flatten(0, 1), labels[..., i].flatten())
            for i, head in enumerate(heads)
        ]
        (
            sum(losses) + losses[-1] + args.near * state_change
        ).backward()  # places, the hardest, count twice
        for group in optimizer.param_groups:
            group["lr"] = args.rate * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step + 1 == args.steps:
            losses_text = " ".join(f"{n} {x:.3f}" for n, x in zip(HEADS, losses, strict=True))
            print(
                f"step {step + 1}: {losses_text}, change of states {state_change:.3f}", flush=True
            )
    with torch.no_grad():
        ids, labels = labelled_batch(
            model.t5_tokenizer, np.random.default_rng(args.seed + 1), 1000, True
        )
        states = t5(ids)[0]
        for i, (name, head) in enumerate(zip(HEADS, heads, strict=True)):
            is_labelled = labels[..., i] >= 0
            is_correct = head(states).argmax(-1) == labels[..., i]
            print(
                f"{name}: {is_correct[is_labelled].float().mean():.1%} "
                "of words in held-out combinations"
            )
    if not args.probe:
        store_encoder(checkpoint, t5)
        save_atomically(checkpoint, args.flow)
        print(f"wrote {args.flow}")


if __name__ == "__main__":
    main()
