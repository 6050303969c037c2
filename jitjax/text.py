"""Prompts to token ids to conditioning.

prompts --tokenizer_2--> ids [b, T]  --T5-->   text   [b, T, D]
        --tokenizer----> ids [b, 77] --CLIP--> pooled [b, P]
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jitjax.config import FluxConfig
from jitjax.models.clip import CLIPText
from jitjax.models.t5 import T5Encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jitjax.checkpoint import FluxParams

CLIP_LENGTH = 77
"""Ids per prompt that CLIP was trained on."""

PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "<pad>"}
"""Subfolder -> the padding token if its files name none (CLIP pads with the end of text)."""


class Conditioning(eqx.Module):
    """What the transformer is told about the prompts; from `encode_prompt` or from elsewhere.

    Attributes:
        text: T5's output, one vector per token, padding included.
        pooled: CLIP's output, one vector per prompt.
    """

    text: Float[Array, "b t d"]
    pooled: Float[Array, "b p"]

    def check(self, config: FluxConfig, batch: int | None = None) -> None:
        """Raise `ValueError` unless the shapes fit `config` (and `batch`, if given)."""
        t5_width, clip_width = config.t5.d_model, config.clip.hidden_size
        b = "batch" if batch is None else batch
        for name, value, expected in (
            ("text", self.text, (b, "tokens", t5_width)),
            ("pooled", self.pooled, (b, clip_width)),
        ):
            shape = tuple(jnp.shape(value))
            fits = len(shape) == len(expected) and all(
                isinstance(want, str) or got == want
                for got, want in zip(shape, expected, strict=True)
            )
            if not fits:
                wanted = ", ".join(map(str, expected))
                raise ValueError(
                    f"Conditioning.{name} has shape {list(shape)}, expected [{wanted}]"
                )
        if self.text.shape[0] != self.pooled.shape[0]:
            raise ValueError(
                f"Conditioning.pooled has a batch of {self.pooled.shape[0]}, expected that of "
                f"Conditioning.text, {self.text.shape[0]}"
            )


def encode_prompt(params: FluxParams, prompt: str | Sequence[str]) -> Conditioning:
    """The conditioning of one prompt or of several.

    Args:
        params: parameters; only the text encoders' and the tokenizers' folder are used.
        prompt: a string, which is a batch of one, or a sequence of strings. The empty string is
            allowed; it stands for no prompt.

    Returns:
        float32 arrays; the encoders run in the dtype of their parameters.

    Raises:
        ValueError: no text encoders, no prompts, or ids that the encoders do not have.
        TypeError: a prompt that is no string.
        FileNotFoundError: no tokenizer.
    """
    t5, clip = params.part("t5"), params.part("clip")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    t5_ids, clip_ids = tokenize(params.tokenizer, prompts, params.config)
    return encode_ids(t5, clip, t5_ids, clip_ids, params.config)


@partial(jax.jit, static_argnames="config")
def encode_ids(
    t5: Any,
    clip: Any,
    t5_ids: Int[Array, "b t"],
    clip_ids: Int[Array, "b l"],
    config: FluxConfig,
) -> Conditioning:
    """Both encoders on token ids; T5 attends to the padding too, as in FLUX."""
    text: Any = T5Encoder(config.t5, _dtype(t5)).apply({"params": t5}, t5_ids)
    pooled: Any = CLIPText(config.clip, _dtype(clip)).apply({"params": clip}, clip_ids)[1]
    return Conditioning(text.astype(jnp.float32), pooled.astype(jnp.float32))


def _dtype(params: Any) -> Any:
    """The dtype of the parameters; float32 for float16, in which T5 overflows."""
    return jnp.promote_types(jax.tree.leaves(params)[0].dtype, jnp.bfloat16)


def tokenize(
    tokenizer_folder: str | Path, prompts: Sequence[str], config: FluxConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as diffusers' `FluxPipeline` makes them: cut to length, padded to length.

    A prompt that is longer than an encoder takes is cut, with a `UserWarning` that says what was.

    Args:
        tokenizer_folder: holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5).
        prompts: at least one.
        config: gives the lengths and the sizes of the vocabularies.

    Returns:
        t5_ids, clip_ids: int32 [b, text_length] and [b, 77] (or what CLIP has positions for).

    Raises:
        ValueError: no prompts, or ids that the encoders do not have.
        TypeError: a prompt that is no string.
        FileNotFoundError: a tokenizer or one of its files is missing.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise TypeError(f"prompts are {type(prompts).__name__}, expected a sequence of strings")
    if len(prompts) == 0:
        raise ValueError("prompts are empty, expected at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompt[{i}] is {type(prompt).__name__}, expected a string")
    folder = Path(tokenizer_folder)
    length = min(_max_length(folder / "tokenizer") or CLIP_LENGTH, CLIP_LENGTH)
    length = min(length, config.clip.max_position_embeddings)
    t5 = _ids(folder / "tokenizer_2", "T5", prompts, config.text_length, config.t5.vocab_size)
    clip = _ids(folder / "tokenizer", "CLIP", prompts, length, config.clip.vocab_size)
    return t5, clip


def _ids(folder: Path, name: str, prompts: Sequence[str], length: int, vocab: int) -> np.ndarray:
    encodings = _load(str(folder), length).encode_batch(list(prompts))
    for i, (prompt, encoding) in enumerate(zip(prompts, encodings, strict=True)):
        if encoding.overflowing:
            rest = encoding.overflowing[0]
            marks = zip(rest.offsets, rest.special_tokens_mask, strict=True)
            start = next(offset[0] for offset, special in marks if not special)
            warnings.warn(
                f"{name} takes {length} tokens and prompt[{i}] has more: {name} does not see "
                f"{prompt[start:].strip()!r}",
                UserWarning,
                stacklevel=4,
            )
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    if ids.max() >= vocab:
        raise ValueError(
            f"{folder} gives the id {ids.max()}, expected ids below {vocab}, the vocabulary of "
            f"{name}: the tokenizer is another model's"
        )
    return ids


@lru_cache(maxsize=16)
def _load(folder: str, length: int) -> Tokenizer:
    """The tokenizer of one folder, set to cut and pad to `length`.

    `tokenizer.json` is read by `tokenizers` alone, which takes 10 ms to import and gives the same
    ids; `transformers` takes a second. Folders in older formats (FLUX.1-dev's CLIP has only
    `vocab.json` and `merges.txt`) are read by `transformers`: by the two classes by name, since
    `AutoTokenizer` would import torch where it is installed.
    """
    path = Path(folder)
    kind = path.name
    older = ("vocab.json", "merges.txt") if kind == "tokenizer" else ("spiece.model",)
    if (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    elif all((path / file).is_file() for file in older):
        from transformers import CLIPTokenizer, T5Tokenizer

        cls = CLIPTokenizer if kind == "tokenizer" else T5Tokenizer
        tokenizer = cls.from_pretrained(folder, local_files_only=True).backend_tokenizer
    else:
        wanted = f"tokenizer.json or {' and '.join(older)}"
        raise FileNotFoundError(
            f"no tokenizer in {path}: expected {wanted}"
            if path.is_dir()
            else f"no tokenizer: there is no folder {path}, expected one with {wanted}"
        )
    pad = _settings(path).get("pad_token") or PAD_TOKENS[kind]
    pad = pad["content"] if isinstance(pad, dict) else pad
    pad_id = tokenizer.token_to_id(pad)
    if pad_id is None:
        raise ValueError(f"{path}: the padding token {pad!r} is not in the vocabulary")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    return tokenizer


def _settings(path: Path) -> dict[str, Any]:
    """What the side files say; `tokenizer_config.json` has the last word."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            read = json.loads((path / name).read_text(encoding="utf-8"))
            merged |= {key: value for key, value in read.items() if value is not None}
    return merged


def _max_length(path: Path) -> int | None:
    return _settings(path).get("model_max_length")
