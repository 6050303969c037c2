"""Tokenization and text encoding: prompts to token ids to conditioning.

prompts --tokenizer_2--> ids [b, T]  --T5-->   text   [b, T, D]
        --tokenizer----> ids [b, 77] --CLIP--> pooled [b, P]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jitjax.checkpoint import TEXT_ENCODERS, FluxParams
from jitjax.conditioning import Conditioning
from jitjax.config import FluxConfig, TokenLimit
from jitjax.models.quantised import float_dtype
from jitjax.offload import with_parts_on_device
from jitjax.sampler.meshes import with_auto_axes
from jitjax.validation import check, read_json, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_LENGTH = 77
"""Token ids per prompt that CLIP was trained with."""

LONGEST_QUOTE = 200
"""Largest number of characters of a prompt in a warning."""

PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "<pad>"}
"""Subfolder -> padding token if the tokenizer's files name none."""


@with_auto_axes()
def encode_prompt(params: FluxParams, prompt: str | Sequence[str]) -> Conditioning:
    """Encode one prompt or a batch of prompts.

    The encoders run in the dtype of their parameters (in float32 for float16, in which T5
    overflows).

    Args:
        params: parameters; only the text encoders and the tokenizers are used.
        prompt: a string, for a batch of one, or a sequence of strings. The empty string is the
            empty prompt.

    Returns:
        float32 embeddings: `text` [b, t, d] of T5, where t is `params.config.text_length`, and
        `pooled` [b, p] of CLIP.

    Raises:
        ValueError: `params` has no text encoders, there are no prompts, one has a character that
            UTF-8 cannot encode, or a token id is outside an encoder's vocabulary.
        TypeError: a prompt is not a string, or `params` are no parameters.
        FileNotFoundError: a tokenizer is missing.
    """
    check_params(params)
    for part in TEXT_ENCODERS:
        params.part(part)
    return encode_tokens(params, *tokenize(params.tokenizer, prompt, params.config))


@with_parts_on_device(*TEXT_ENCODERS)
def encode_tokens(
    params: FluxParams,
    t5_ids: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    clip_ids: Int[Array, "b l"] | Int[np.ndarray, "b l"],
) -> Conditioning:
    """Run both text encoders on token ids, from `tokenize`; see `encode_prompt`."""
    return encode_ids(params.part("t5"), params.part("clip"), t5_ids, clip_ids, params.config)


def check_params(params: Any) -> None:
    """Raise `TypeError` unless `params` are parameters, rather than the name of a checkpoint."""
    if not isinstance(params, FluxParams):
        got = repr(params) if isinstance(params, (str, PurePath)) else type(params).__name__
        raise TypeError(f"params is {got}; expected FluxParams, from jitjax.load")


def as_prompts(prompt: str | Sequence[str], name: str = "prompt") -> list[str]:
    """Return one prompt or a batch of prompts, the argument called `name`, as a list.

    Raises:
        ValueError: there are no prompts, or one has a character that UTF-8 cannot encode.
        TypeError: a prompt is not a string.
    """
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        prompts = list(prompt)
    elif isinstance(prompt, np.ndarray) and prompt.ndim == 1:
        prompts = prompt.tolist()
    else:
        got = type(prompt).__name__
        if isinstance(prompt, np.ndarray):
            got = f"an array of shape {list(prompt.shape)}"
        raise TypeError(f"{name} is {got}; expected a string or a sequence of strings")
    if not prompts:
        raise ValueError(f"{name} is empty; expected at least one string")
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] is {type(text).__name__}; expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{i}] has {text[error.start]!a} at position {error.start}, half a "
                "character or a byte that could not be decoded; expected Unicode text"
            ) from None
    return prompts


@with_auto_axes()
@partial(jax.jit, static_argnames="config")
def encode_ids(
    t5: Any,
    clip: Any,
    t5_ids: Int[Array, "b t"],
    clip_ids: Int[Array, "b l"],
    config: FluxConfig,
) -> Conditioning:
    """Run both text encoders on token ids. T5 also attends to padding, as in FLUX.

    Args:
        t5, clip: parameters of the encoders.
        t5_ids: [b, t] token ids for T5.
        clip_ids: [b, l] token ids for CLIP.
        config: gives the sizes of the encoders.

    Returns:
        float32 embeddings.
    """
    # Imported here, because Flax takes a quarter of a second to import.
    from jitjax.models.clip import CLIPText
    from jitjax.models.t5 import T5Encoder

    text: Any = T5Encoder(config.t5, _compute_dtype(t5)).apply({"params": t5}, t5_ids)
    pooled: Any = CLIPText(config.clip, _compute_dtype(clip)).apply({"params": clip}, clip_ids)[1]
    return Conditioning(text.astype(jnp.float32), pooled.astype(jnp.float32))


def _compute_dtype(params: Any) -> Any:
    """Return the dtype of the parameters; but float32 for float16, in which T5 overflows."""
    dtype = float_dtype(params)
    if dtype == jnp.float16:
        return jnp.float32
    return jnp.bfloat16 if dtype.itemsize < 2 else dtype


def tokenize(
    tokenizer_folder: str | Path,
    prompts: str | Sequence[str],
    config: FluxConfig,
    *,
    name: str = "prompt",
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize prompts, truncated and padded to a fixed length.

    A prompt that is too long for an encoder gives a `UserWarning` that quotes the truncated text.
    The ids are those of diffusers' `FluxPipeline`.

    Args:
        tokenizer_folder: folder with the subfolders `tokenizer` (CLIP) and `tokenizer_2` (T5).
        prompts: b strings, at least one; or one string.
        config: gives the lengths and the vocabulary sizes.
        name: name of the argument that the prompts come from, for messages.

    Returns:
        t5_ids: int32 [b, text_length].
        clip_ids: int32 [b, l], where l is the least of 77, CLIP's positions and the tokenizer's
            `model_max_length`.

    Raises:
        ValueError: there are no prompts, one has a character that UTF-8 cannot encode, a token id
            is outside an encoder's vocabulary, or the padding token is not in the tokenizer's.
        TypeError: a prompt is not a string.
        FileNotFoundError: a tokenizer or one of its files is missing.
    """
    prompts = as_prompts(prompts, name)
    folder = Path(tokenizer_folder)
    limit = _read_settings(folder / "tokenizer").get("model_max_length", CLIP_LENGTH)
    limit = check(limit, TokenLimit, f"{folder / 'tokenizer'}: model_max_length")
    clip_length = int(min(limit, CLIP_LENGTH, config.clip.max_position_embeddings))
    t5_ids = _encode(
        folder / "tokenizer_2", "T5", name, prompts, config.text_length, config.t5.vocab_size
    )
    clip_ids = _encode(
        folder / "tokenizer", "CLIP", name, prompts, clip_length, config.clip.vocab_size
    )
    return t5_ids, clip_ids


def _encode(
    folder: Path, encoder: str, name: str, prompts: Sequence[str], length: int, vocab_size: int
) -> np.ndarray:
    """Token ids [b, length] by the tokenizer in `folder`, for the text encoder named `encoder`."""
    encodings = _load_tokenizer(str(folder), length).encode_batch(list(prompts))
    for i, (prompt, encoding) in enumerate(zip(prompts, encodings, strict=True)):
        if encoding.overflowing:
            overflow = encoding.overflowing[0]
            tokens = zip(overflow.offsets, overflow.special_tokens_mask, strict=True)
            start = next(offset[0] for offset, is_special in tokens if not is_special)
            unseen = prompt[start:].strip()
            more = len(unseen) - LONGEST_QUOTE
            warnings.warn(
                f"{name}[{i}] has more than {length} {encoder} tokens; {encoder} does not see "
                f"{unseen[:LONGEST_QUOTE]!r}"
                + (f" and {more} more characters" if more > 0 else ""),
                UserWarning,
                stacklevel=4,
            )
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    if ids.max() >= vocab_size:
        raise ValueError(
            f"{folder} gives token id {ids.max()}; expected ids below {vocab_size}, the vocabulary "
            f"size of {encoder}: the tokenizer belongs to another model"
        )
    return ids


@lru_cache(maxsize=16)
def _load_tokenizer(folder: str, length: int) -> Tokenizer:
    """Load the tokenizer of one folder, with truncation and padding to `length`.

    The `tokenizers` package reads `tokenizer.json`, gives the same ids as `transformers` and
    imports in 10 ms instead of a second. Only `transformers` reads the older formats; FLUX.1-dev's
    CLIP has `vocab.json` and `merges.txt` only. They are read by the tokenizer's own class,
    because `AutoTokenizer` imports torch if it is installed.
    """
    path = Path(folder)
    is_clip = path.name == "tokenizer"
    older_files = ("vocab.json", "merges.txt") if is_clip else ("spiece.model",)
    if (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # `tokenizers` raises no other class
            raise ValueError(
                f"{path / 'tokenizer.json'} is not a tokenizer ({shown(str(error))})"
            ) from None
    elif all((path / file).is_file() for file in older_files):
        from transformers import CLIPTokenizer, T5Tokenizer

        cls = CLIPTokenizer if is_clip else T5Tokenizer
        tokenizer = cls.from_pretrained(folder, local_files_only=True).backend_tokenizer
    else:
        expected = f"tokenizer.json or {' and '.join(older_files)}"
        raise FileNotFoundError(
            f"no tokenizer in {path}; expected {expected}"
            if path.is_dir()
            else f"no tokenizer: {path} does not exist; expected a folder with {expected}"
        )
    pad_token = _read_settings(path).get("pad_token") or PAD_TOKENS[path.name]
    if isinstance(pad_token, dict):
        pad_token = pad_token.get("content")
    pad_token = check(pad_token, str, f"{path}: pad_token")
    pad_id = tokenizer.token_to_id(pad_token)
    if pad_id is None:
        raise ValueError(
            f"{path} has the padding token {pad_token!r}; expected a token of its vocabulary"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
    return tokenizer


def _read_settings(path: Path) -> dict[str, Any]:
    """Merge the tokenizer's settings files; those of `tokenizer_config.json` take precedence."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            settings = read_json(path / name)
            merged |= {key: value for key, value in settings.items() if value is not None}
    return merged
