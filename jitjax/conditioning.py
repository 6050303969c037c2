"""`Conditioning`, the encoded prompts, and the files that keep them.

A file is in safetensors' format, with the tensors "text" and "pooled". Its metadata has the name
and version of the format, the prompts (JSON), and a digest of the tensors. So text encoders can run
on one machine, once, and the transformer on a card that has no memory for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import xxhash
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jaxtyping import Array, Float

from jitjax.config import FluxConfig
from jitjax.files import atomic_file
from jitjax.validation import MAX_JSON_BYTES, shown

FORMAT = "jitjax conditioning"
VERSION = "1"
"""Value of the metadata's "format" and "version"; a file with others is refused."""
RANKS = {"text": 3, "pooled": 2}
"""Tensor of a file -> its number of dimensions."""


@dataclass(frozen=True, eq=False, repr=False)
class Conditioning:
    """Prompt embeddings for the transformer, from `encode_prompt` or computed elsewhere.

    Attributes:
        text: [b, t, d] T5 embeddings, one per token, padding included; finite. For FLUX.1 d is
            4096, and t is 512 (dev) or 256 (schnell).
        pooled: [b, p] CLIP embeddings, one per prompt; finite. For FLUX.1 p is 768.

    Examples:
        >>> jitjax.Conditioning(jnp.zeros((1, 512, 4096)), jnp.zeros((1, 768)))
        Conditioning(text=float32[1, 512, 4096], pooled=float32[1, 768])
    """

    text: Float[Array, "b t d"]
    pooled: Float[Array, "b p"]

    def __repr__(self) -> str:
        shapes = (
            f"{name}={getattr(value, 'dtype', '')}{list(jnp.shape(value))}"
            for name, value in (("text", self.text), ("pooled", self.pooled))
        )
        return f"Conditioning({', '.join(shapes)})"

    def check(self, config: FluxConfig, batch: int | None = None) -> None:
        """Check the shapes.

        Args:
            config: configuration of the models, which gives the widths.
            batch: the number of prompts, 1 or more; None for any.

        Raises:
            ValueError: a shape does not fit.
        """
        t5_width, clip_width = config.t5.d_model, config.clip.hidden_size
        b = "batch" if batch is None else batch
        for name, value, expected in (
            ("text", self.text, (b, "tokens", t5_width)),
            ("pooled", self.pooled, (b, clip_width)),
        ):
            shape = tuple(jnp.shape(value))
            fits = len(shape) == len(expected) and all(
                isinstance(size, str) or actual == size
                for actual, size in zip(shape, expected, strict=True)
            )
            if not fits:
                sizes = ", ".join(map(str, expected))
                raise ValueError(f"Conditioning.{name} has shape {list(shape)}; expected [{sizes}]")
        if self.text.shape[0] != self.pooled.shape[0]:
            raise ValueError(
                f"Conditioning.pooled has batch size {self.pooled.shape[0]}; expected "
                f"{self.text.shape[0]}, the batch size of Conditioning.text"
            )

    def save(
        self, path: str | os.PathLike[str], *, prompts: Sequence[str] = (), overwrite: bool = False
    ) -> None:
        """Save as a safetensors file that `load` reads; 8.4 MB per prompt for FLUX.1-dev.

        The file is written under a temporary name and renamed when complete.

        Args:
            path: the file to write.
            prompts: the prompts that were encoded, to be stored beside the embeddings; none, or
                one per sample.
            overwrite: replace the file if it exists.

        Raises:
            ValueError: the shapes do not fit each other, a value is not finite, or the number of
                prompts is not that of the samples.
            FileExistsError: the file exists, and `overwrite` is false.
            OSError: the file cannot be written.
        """
        # `safetensors.numpy` is imported at its first use, like all that takes long.
        from safetensors.numpy import save

        arrays = {name: _wide(name, getattr(self, name)) for name in RANKS}
        batch = len(arrays["text"])
        if len(arrays["pooled"]) != batch:
            raise ValueError(
                f"Conditioning.pooled has batch size {len(arrays['pooled'])}; expected {batch}, "
                "the batch size of Conditioning.text"
            )
        if isinstance(prompts, str) or len(prompts) not in (0, batch):
            got = shown(prompts) if isinstance(prompts, str) else f"{len(prompts)} strings"
            raise ValueError(f"prompts is {got}; expected none or {batch}, one per sample")
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "prompts": json.dumps(list(prompts)),
            "digest": _digest(arrays),
        }
        with atomic_file(Path(path), overwrite=overwrite) as file:
            file.write(save(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Conditioning:
        """Load embeddings that `save` has written, on to the default device.

        Args:
            path: the file.

        Returns:
            The embeddings, float32 (or float64, if they were saved so and `jax_enable_x64` is set).

        Raises:
            FileNotFoundError: there is no file.
            ValueError: it is no such file, has another version, or is damaged.
        """
        return read_conditioning(path)[0]


def _wide(name: str, value: Any) -> np.ndarray:
    """Return an array of a conditioning as float32 or float64; raise `ValueError` if it is none."""
    array = np.asarray(value)
    if array.ndim != RANKS[name] or 0 in array.shape:
        raise ValueError(
            f"Conditioning.{name} has shape {list(array.shape)}; expected {RANKS[name]} dimensions "
            "of 1 or more"
        )
    array = np.ascontiguousarray(array if array.dtype == np.float64 else array.astype(np.float32))
    if not np.isfinite(array).all():
        raise ValueError(
            f"Conditioning.{name} has values that are not finite; expected finite ones"
        )
    return array


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {list(arrays[name].shape)}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def read_conditioning(path: str | os.PathLike[str]) -> tuple[Conditioning, list[str]]:
    """Read a file that `Conditioning.save` has written.

    Returns:
        The conditioning, on the default device; and the prompts, one per sample, or none.

    Raises:
        FileNotFoundError, ValueError: as `Conditioning.load`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no encoded prompts at {str(path)!r}; expected a file")
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} is no file; expected one that Conditioning.save has written"
        )
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            names = sorted(file.keys())
            if names != sorted(RANKS):
                raise ValueError(
                    f"{str(path)!r} has the tensors {shown(names)}; expected {sorted(RANKS)}"
                )
            arrays = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is no safetensors file, or an incomplete one ({shown(str(error))}); "
            "expected one that Conditioning.save has written"
        ) from None
    if metadata.get("digest") != _digest(arrays):
        raise ValueError(f"{str(path)!r} is damaged: its values differ from what was written")
    try:
        arrays = {name: _wide(name, array) for name, array in arrays.items()}
        batch = len(arrays["text"])
        prompts = json.loads(metadata.get("prompts", "[]")[:MAX_JSON_BYTES])
        if not isinstance(prompts, list) or len(prompts) not in (0, batch):
            raise ValueError(f"it has {shown(prompts)} as prompts; expected {batch} strings")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    return (
        Conditioning(*(jnp.asarray(arrays[name]) for name in RANKS)),
        [str(prompt) for prompt in prompts],
    )


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is a safetensors file of something else; expected encoded prompts, "
            "which Conditioning.save writes"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} has version {shown(metadata.get('version'))}; expected {VERSION}"
        )


def _unflatten(_: None, leaves: Any) -> Conditioning:
    # Not by the constructor: JAX also makes pytrees whose leaves are no arrays.
    conditioning = object.__new__(Conditioning)
    for name, leaf in zip(("text", "pooled"), leaves, strict=True):
        object.__setattr__(conditioning, name, leaf)
    return conditioning


register_pytree_with_keys(
    Conditioning,
    lambda x: ([(GetAttrKey(name), getattr(x, name)) for name in ("text", "pooled")], None),
    _unflatten,
)
