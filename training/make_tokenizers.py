"""Builds the two small tokenizers from captions, in the folder layout that diffusers expects.

    python -m training.make_tokenizers --out /var/tmp/jitjax-train/tokenizers

`tokenizer` is CLIP's: lower-case byte-level BPE with `</w>` endings, 77 ids. `tokenizer_2` is T5's:
Unigram with `▁` word starts, 48 ids. Both vocabularies contain all printable ASCII characters, so
that any prompt can be tokenized.
"""

from __future__ import annotations

import argparse
import math
import re
import string
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from training.common import RUNS
from training.scenes import NUMBERS, RELATIONS, caption, random_scene

CLIP_LENGTH, T5_LENGTH = 77, 48
CLIP_MERGES = 110


def corpus(count: int = 6000, seed: int = 7) -> Iterator[str]:
    """Yield captions of one to four things, then words that must be tokens, 50 times each."""
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        things = int(rng.choice((1, 2, 3, 4), p=(0.5, 0.3, 0.1, 0.1)))
        yield caption(random_scene(rng, things, same=bool(rng.uniform() < 0.5)), rng)
    for word in (*RELATIONS, *NUMBERS.values(), "between", "and", "with", "of", "the", "photo"):
        yield from [word] * 50


def make_t5(folder: Path) -> None:
    """Write a Unigram tokenizer with T5's special tokens: <pad> 0, </s> 1, <unk> 2.

    The corpus has about seventy words. Each is a token, scored by its frequency; characters spell
    all other text. The EM trainer is not used: with so few words it reduces them to letters.
    """
    counts = Counter(word for text in corpus() for word in re.findall(r"[a-z-]+", text))
    total = sum(counts.values())
    characters = ["▁", *sorted(set(string.printable) - set(string.whitespace))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("▁" + word, math.log(count / total)) for word, count in counts.most_common()]
    vocabulary += [(character, -12.0) for character in characters]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH).save_pretrained(folder)


def make_clip(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with CLIP's special tokens at the vocabulary's end."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        min_frequency=20,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
    )
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.train_from_iterator(corpus(), trainer)
        tokenizer.model.save(temporary)
        lines = (Path(temporary) / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#")]
    merges = merges[:CLIP_MERGES]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    clip_tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)
    clip_tokenizer.save_pretrained(folder)


def token_ids(tokenizer, texts: list[str]):
    """Tokenize as FluxPipeline does: int64 [batch, model_max_length], padded, without a mask."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RUNS / "tokenizers")
    args = parser.parse_args()
    make_clip(args.out / "tokenizer")
    make_t5(args.out / "tokenizer_2")
    for name, cls in (("tokenizer", CLIPTokenizer), ("tokenizer_2", T5Tokenizer)):
        tokenizer = cls.from_pretrained(args.out / name)
        print(name, len(tokenizer), "tokens;", tokenizer.model_max_length, "ids")
        for text in ("a large red striped circle on a graded background", "Zebra #7, ~é?"):
            ids = tokenizer(text).input_ids
            print(" ", len(ids), tokenizer.convert_ids_to_tokens(ids))


if __name__ == "__main__":
    main()
