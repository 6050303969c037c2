"""Tokenization and text encoding, with small tokenizers in the file formats of FLUX folders."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jitjax.checkpoint import FluxParams
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.models import param_shapes
from jitjax.models.clip import CLIPText
from jitjax.models.t5 import T5Encoder
from jitjax.text import Conditioning, encode_prompt, tokenize

LETTERS = "abcdefghijklmnopqrstuvwxyz"
T5_VOCAB = ["<pad>", "</s>", "<unk>", "▁", "▁red", "▁blue", "▁circle", *LETTERS]
CLIP_VOCAB = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "re", "red</w>"]
CLIP_MERGES = ["r e", "re d</w>"]
START, END = len(CLIP_VOCAB), len(CLIP_VOCAB) + 1

CONFIG = FluxConfig(
    transformer=TransformerConfig(joint_attention_dim=8, pooled_projection_dim=6),
    t5=T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2),
    clip=CLIPConfig(
        vocab_size=END + 1,
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=10,
    ),
    autoencoder=AutoencoderConfig(),
    text_length=6,
)


def write_t5(folder: Path, **settings) -> None:
    """Write a T5 `tokenizer_2` folder: a Unigram model that appends </s>."""
    folder.mkdir(parents=True)
    scores = [-2.0 if len(piece) > 1 else -9.0 for piece in T5_VOCAB]
    tokenizer = Tokenizer(models.Unigram(list(zip(T5_VOCAB, scores, strict=True)), unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_clip(folder: Path, **settings) -> None:
    """Write a CLIP `tokenizer` folder as in FLUX.1-dev, with `vocab.json` and `merges.txt` only."""
    folder.mkdir(parents=True)
    vocab = {token: i for i, token in enumerate([*CLIP_VOCAB, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *CLIP_MERGES, ""]))
    settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_clip_json(folder: Path, **settings) -> None:
    """Write a CLIP `tokenizer` folder in the newer format, with `tokenizer.json`."""
    folder.mkdir(parents=True)
    vocab = {token: i for i, token in enumerate([*CLIP_VOCAB, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge.split()) for merge in CLIP_MERGES]
    model = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", END), ("<|startoftext|>", START), False, False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("tokenizers")
    write_clip_json(
        root / "tokenizer",
        model_max_length=8,
        pad_token={"__type": "AddedToken", "content": "<|endoftext|>"},
    )
    write_t5(root / "tokenizer_2")
    return str(root)


@pytest.fixture(scope="module")
def params(folder):
    rng = np.random.default_rng(0)

    def random_tree(tree):
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)), tree
        )

    return FluxParams(
        transformer={},
        t5=random_tree(param_shapes.t5(CONFIG.t5)),
        clip=random_tree(param_shapes.clip(CONFIG.clip)),
        autoencoder={},
        config=CONFIG,
        tokenizer=folder,
    )


def test_token_ids(folder):
    t5_ids, clip_ids = tokenize(folder, ["red ab", "", "Red"], CONFIG)
    assert t5_ids.dtype == clip_ids.dtype == np.int32
    a = LETTERS.index("a")
    expected = [[4, 3, 7 + a, 7 + a + 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(t5_ids[:2], expected)
    red = CLIP_VOCAB.index("red</w>")
    expected = [START, red, a, 26 + LETTERS.index("b"), END, END, END, END]
    np.testing.assert_array_equal(clip_ids[0], expected)
    np.testing.assert_array_equal(clip_ids[1], [START] + [END] * 7)
    assert t5_ids[2, 0] == 3  # T5 keeps the case, and the vocabulary has no capitals.
    assert clip_ids[2, 1] == red  # CLIP lowercases.


@pytest.mark.parametrize(
    ("settings", "positions", "expected"),
    [
        ({}, 10, 10),
        ({}, 90, 77),
        ({"model_max_length": 8}, 10, 8),
        ({"model_max_length": 99}, 4, 4),
    ],
)
def test_clip_length_is_the_least_limit(tmp_path, settings, positions: int, expected: int):
    write_clip_json(tmp_path / "tokenizer", **settings)
    write_t5(tmp_path / "tokenizer_2")
    clip_config = CLIPConfig(
        hidden_size=6, num_attention_heads=1, max_position_embeddings=positions
    )
    config = FluxConfig(transformer=CONFIG.transformer, t5=CONFIG.t5, clip=clip_config)
    _, clip_ids = tokenize(str(tmp_path), ["red"], config)
    assert clip_ids.shape == (1, expected)


def test_older_formats_give_the_same_ids(folder, tmp_path):
    """transformers reads `vocab.json` and `merges.txt`; `tokenizers` reads `tokenizer.json`."""
    write_clip(tmp_path / "tokenizer", model_max_length=8)
    write_t5(tmp_path / "tokenizer_2")
    prompts = ["red abc", "", "Red red", "a b"]
    np.testing.assert_array_equal(
        tokenize(tmp_path, prompts, CONFIG)[1], tokenize(folder, prompts, CONFIG)[1]
    )


def test_same_ids_as_transformers(folder):
    """`tokenize` gives the ids of the transformers call in diffusers' pipeline."""
    from transformers import CLIPTokenizer, T5Tokenizer

    prompts = ["red ab", "", "blue circle", "  two   spaces ", "é zz</s> red", "red, red!"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        t5_ids, clip_ids = tokenize(folder, prompts, CONFIG)
    t5_tokenizer = T5Tokenizer.from_pretrained(f"{folder}/tokenizer_2")
    clip_tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
    for tokenizer, ids in ((t5_tokenizer, t5_ids), (clip_tokenizer, clip_ids)):
        expected = tokenizer(
            prompts, padding="max_length", max_length=ids.shape[1], truncation=True
        ).input_ids
        np.testing.assert_array_equal(ids, expected)


def test_sentencepiece_file(tmp_path):
    """A folder with `spiece.model` and no `tokenizer.json`."""
    import sentencepiece

    write_clip_json(tmp_path / "tokenizer")
    (tmp_path / "tokenizer_2").mkdir()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["red circle", "blue circle", "a red blue circle"] * 20),
        model_prefix=str(tmp_path / "tokenizer_2" / "spiece"),
        vocab_size=24,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer_2" / "spiece.model"))
    t5_ids, _ = tokenize(tmp_path, ["red circle"], CONFIG)
    expected = [*model.encode("red circle"), 1, 0, 0, 0, 0, 0][: CONFIG.text_length]
    np.testing.assert_array_equal(t5_ids[0], expected)


def test_warning_quotes_the_truncated_text(folder):
    with pytest.warns(UserWarning, match="does not see") as warned:
        t5_ids, clip_ids = tokenize(folder, ["red", "red red red red red Blue circle red"], CONFIG)
    messages = [str(warning.message) for warning in warned]
    assert messages == [
        "prompt[1] has more than 6 T5 tokens; T5 does not see 'Blue circle red'",
        "prompt[1] has more than 8 CLIP tokens; CLIP does not see 'lue circle red'",
    ]
    with pytest.warns(UserWarning, match="does not see") as warned:
        tokenize(folder, ["red " * 1000], CONFIG)
    assert str(warned[0].message) == (
        f"prompt[0] has more than 6 T5 tokens; T5 does not see {'red ' * 50!r} and "
        f"{4 * (1000 - 5 - 50) - 1} more characters"
    )
    assert t5_ids[1, -1] == 1  # Truncation keeps the end-of-text token.
    assert clip_ids[1, -1] == END


def test_no_warning_for_a_prompt_of_exactly_the_length(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t5_ids, clip_ids = tokenize(folder, ["red red red red red"], CONFIG)
    assert t5_ids[0].tolist() == [4] * 5 + [1]
    assert clip_ids.shape == (1, 8)


@pytest.mark.usefixtures("unchecked")
def test_invalid_prompts(params):
    with pytest.raises(ValueError, match=r"prompt is empty; expected at least one"):
        encode_prompt(params, [])
    with pytest.raises(TypeError, match=r"prompt\[1\] is int; expected a string"):
        encode_prompt(params, ["red", 3])
    with pytest.raises(TypeError, match=r"prompt\[0\] is NoneType; expected a string"):
        encode_prompt(params, [None])
    for prompts in (None, 3, b"red", {"red": 1}):
        with pytest.raises(TypeError, match=rf"prompt is {type(prompts).__name__}"):
            encode_prompt(params, prompts)


def test_missing_tokenizer(tmp_path, params):
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer_2 does not exist; .* tokenizer\.json or spiece"
    ):
        tokenize(tmp_path, ["red"], CONFIG)
    write_t5(tmp_path / "tokenizer_2")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer; expected .* vocab\.json and merges\.txt"
    ):
        tokenize(tmp_path, ["red"], CONFIG)
    without_clip = dataclasses.replace(params, clip={})
    with pytest.raises(ValueError, match=r"have no clip, only t5; .* pass a Conditioning"):
        encode_prompt(without_clip, "red")


def test_tokenizer_of_another_model(tmp_path, folder):
    config = FluxConfig(
        transformer=CONFIG.transformer,
        t5=T5Config(vocab_size=5, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2),
        clip=CONFIG.clip,
    )
    with pytest.raises(ValueError, match=r"tokenizer_2 gives token id 6; expected ids below 5"):
        tokenize(folder, ["circle"], config)
    write_clip_json(tmp_path / "tokenizer", pad_token="<none>")
    write_t5(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match=r"padding token '<none>'; expected a token of its vocab"):
        tokenize(tmp_path, ["red"], CONFIG)


def test_encode_prompt(params):
    batch = encode_prompt(params, ("", "red ab", "blue"))
    assert batch.text.shape == (3, 6, 8)
    assert batch.pooled.shape == (3, 6)
    assert batch.text.dtype == batch.pooled.dtype == jnp.float32
    assert np.abs(batch.text[0] - batch.text[1]).max() > 1e-3

    t5_ids, clip_ids = tokenize(params.tokenizer, ["red ab"], CONFIG)
    encode, pool = jax.jit(T5Encoder(CONFIG.t5).apply), jax.jit(CLIPText(CONFIG.clip).apply)
    text = encode({"params": params.t5}, jnp.asarray(t5_ids))  # FLUX does not mask padding.
    _, pooled = pool({"params": params.clip}, jnp.asarray(clip_ids))
    np.testing.assert_allclose(batch.text[1], text[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch.pooled[1], pooled[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_encode_prompt_in_the_parameters_dtype(params, dtype):
    narrow = {
        name: jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), vars(params)[name])
        for name in ("t5", "clip")
    }
    got = encode_prompt(dataclasses.replace(params, **narrow), ["red", "ab", "blue"])
    exact = encode_prompt(params, ["red", "ab", "blue"])
    assert got.text.dtype == got.pooled.dtype == jnp.float32
    difference = float(np.abs(got.text - exact.text).max() / np.abs(exact.text).max())
    # The encoders compute in float32 for float16 parameters, in bfloat16 for bfloat16 ones.
    assert 0 < difference < (0.1 if dtype == jnp.bfloat16 else 0.005)


@pytest.mark.usefixtures("unchecked")
def test_conditioning_check():
    valid = Conditioning(jnp.zeros((2, 5, 8)), jnp.zeros((2, 6)))
    valid.check(CONFIG)
    valid.check(CONFIG, batch=2)
    jax.eval_shape(lambda c: c.check(CONFIG), valid)
    for text, pooled, message in (
        ((5, 8), (2, 6), r"text has shape \[5, 8\]; expected \[batch, tokens, 8\]"),
        ((2, 5, 9), (2, 6), r"text has shape \[2, 5, 9\]; expected \[batch, tokens, 8\]"),
        ((2, 5, 8), (2, 1, 6), r"pooled has shape \[2, 1, 6\]; expected \[batch, 6\]"),
        ((2, 5, 8), (2, 7), r"pooled has shape \[2, 7\]; expected \[batch, 6\]"),
        (
            (2, 5, 8),
            (3, 6),
            r"pooled has batch size 3; expected 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Conditioning(jnp.zeros(text), jnp.zeros(pooled)).check(CONFIG)
    with pytest.raises(ValueError, match=r"expected \[3, tokens, 8\]"):
        valid.check(CONFIG, batch=3)


def test_conditioning_is_a_pytree():
    conditioning = Conditioning(jnp.zeros((2, 5, 8)), jnp.ones((2, 6)))
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(conditioning)
    np.testing.assert_array_equal(doubled.pooled, 2)


def test_torch_is_not_imported(folder, tmp_path):
    """Reading a tokenizer of either format does not import torch, even if it is installed."""
    write_clip(tmp_path / "tokenizer", model_max_length=8)
    write_t5(tmp_path / "tokenizer_2")
    program = f"""
import sys
from jitjax.config import *
from jitjax.text import tokenize
config = {CONFIG!r}
assert not {{"transformers", "tokenizers", "torch"}} & set(sys.modules)
tokenize({folder!r}, ["red"], config)
assert not {{"transformers", "torch"}} & set(sys.modules)
tokenize({str(tmp_path)!r}, ["red"], config)
assert "transformers" in sys.modules and "torch" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.usefixtures("unchecked")
def test_prompts_that_are_no_text(params):
    with pytest.raises(ValueError, match=r"prompt\[1\] has '\\udce9' at position 3"):
        encode_prompt(params, ["red", "caf\udce9"])
    with pytest.raises(TypeError, match=r"prompt is an array of shape \[\]"):
        encode_prompt(params, np.array("red"))


@pytest.mark.usefixtures("unchecked")
def test_params_by_name():
    with pytest.raises(TypeError, match="params is 'tiny'; expected FluxParams"):
        encode_prompt("tiny", "red")
