"""Parameters, and how they are loaded and saved.

A checkpoint is a folder:

    jitjax.json            format version, configuration, parts, sources, digests of all arrays
    tokenizer/             CLIP's, as in a diffusers folder
    tokenizer_2/           T5's
    params/transformer/    the arrays of each part, written by orbax
    params/t5/ ...

The tokenizers are there if the text encoders are. It is written under a temporary name and renamed
when complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jitjax.checkpoint import storage
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig

FORMAT = 3
"""Version of the checkpoint folder; another one is refused."""

DESCRIPTION = "jitjax.json"
PARTS = ("transformer", "t5", "clip", "autoencoder")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT = ("t5", "clip")
HINT = ", or pass a Conditioning computed elsewhere in place of the prompt"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FluxParams:
    """All parameters of a FLUX pipeline: a pytree of arrays with the configuration attached.

    Attributes:
        transformer, t5, clip, autoencoder: nested dictionaries of arrays, blocks stacked along
            the first axis; empty where a part was left out.
        config: the static facts, of the parts left out too.
        tokenizer: folder that holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5); empty if there
            is none.
    """

    transformer: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    autoencoder: dict[str, Any]
    config: FluxConfig = dataclasses.field(metadata={"static": True})
    tokenizer: str = dataclasses.field(metadata={"static": True})

    def part(self, name: str) -> dict[str, Any]:
        """The parameters of one of `PARTS`. Raises `ValueError` if it was left out."""
        found = getattr(self, name)
        if not found:
            held = [part for part in PARTS if getattr(self, part)]
            raise ValueError(
                f"these parameters have no {name}, only {', '.join(held)}; load or convert a "
                f"checkpoint with it{HINT if name in TEXT else ''}"
            )
        return found


def abstract_params(config: FluxConfig, dtype: DTypeLike = jnp.float32) -> FluxParams:
    """Shapes and dtypes of all parameters of `config`, without making any."""
    from jitjax.models import autoencoder, clip, flux, t5

    return FluxParams(
        transformer=flux.abstract_params(config.transformer, dtype),
        t5=t5.abstract_params(config.t5, dtype),
        clip=clip.abstract_params(config.clip, dtype),
        autoencoder=autoencoder.abstract_params(config.autoencoder, dtype),
        config=config,
        tokenizer="",
    )


def description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `jitjax.json` says of a checkpoint, its "config" a `FluxConfig`.

    Raises:
        ValueError: it is not a checkpoint of this format and version.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; expected a checkpoint folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is a diffusers folder; convert it once with "
            f"`python -m jitjax.convert {folder} --out CHECKPOINT`, then load CHECKPOINT"
        )
    file = folder / DESCRIPTION
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {DESCRIPTION}: not a jitjax checkpoint, or not a whole one"
        )
    try:
        raw = json.loads(file.read_text())
        version = raw["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}); write it anew") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version!r}; this version reads {FORMAT}")
    try:
        keys = ("parts", "sources", "digests")
        return {key: raw[key] for key in keys} | {"config": _config_from_json(raw["config"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a FLUX configuration of this version ({error})") from (error)


def save(params: FluxParams, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write parameters to a checkpoint folder that `load` reads.

    The folder appears when it is complete: a run that is killed leaves what was there before.
    Parts that are empty are left out.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false, or it is something else than a
            checkpoint.
        FileNotFoundError: the text encoders' tokenizer folder is gone.
        ValueError: all parts are empty.
    """
    held = [part for part in PARTS if getattr(params, part)]
    with writing(path, params.config, held, params.tokenizer, overwrite=overwrite) as add:
        for part in held:
            for key, leaf in jax.tree_util.tree_leaves_with_path(getattr(params, part)):
                name = jax.tree_util.keystr(key, simple=True, separator="/")
                add(part, name, np.asarray(leaf), 0, leaf.shape)


@contextmanager
def writing(
    path: str | os.PathLike[str],
    config: FluxConfig,
    parts: Sequence[str],
    tokenizer: str,
    *,
    overwrite: bool = False,
    sources: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[str, str, np.ndarray, int, tuple[int, ...]], None]]:
    """A checkpoint written piece by piece; yields the function that takes them.

    It takes the part's name and what `storage.Writer.add` does.

    The folder appears when the block ends without an error; until then nothing is changed.

    Args:
        path, overwrite: as for `save`.
        config: the pipeline's configuration.
        parts: names of the parts that will be given, one after another.
        tokenizer: folder of the tokenizers.
        sources: what the weights were made from, kept with the checkpoint.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `save` does.
    """
    target = Path(path)
    foreign = target.exists() and not (target / DESCRIPTION).is_file()
    if foreign and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} is no jitjax checkpoint; it is not replaced")
    if not parts:
        raise ValueError("there are no parameters to save; expected some of the parts")
    speaks = any(part in TEXT for part in parts)
    folders = [Path(tokenizer) / name for name in TOKENIZERS if speaks]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer at {str(folder)!r}; expected a folder")
    with storage.replacing(target, overwrite=overwrite) as new:
        for folder in folders:
            shutil.copytree(folder, new / folder.name)
        writers = {part: storage.Writer(new / "params" / part) for part in parts}
        yield lambda part, *piece: writers[part].add(*piece)
        told = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "parts": list(parts),
            "sources": sources or {},
            "digests": {part: writer.finish() for part, writer in writers.items()},
        }
        (new / DESCRIPTION).write_text(json.dumps(told, indent=2) + "\n")


def _config_from_json(raw: dict[str, Any]) -> FluxConfig:
    parts = {
        "transformer": TransformerConfig,
        "t5": T5Config,
        "clip": CLIPConfig,
        "autoencoder": AutoencoderConfig,
    }

    def build(cls: type, values: dict[str, Any]) -> Any:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    models = {name: build(cls, raw[name]) for name, cls in parts.items()}
    return build(FluxConfig, {**raw, **models})
