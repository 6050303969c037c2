"""Parameters, and how they are loaded and saved.

A checkpoint is a folder:

    jitjax.json      format version and configuration
    tokenizer/       CLIP's, as in a diffusers folder
    tokenizer_2/     T5's
    params/          the arrays, written by orbax

It is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig

FORMAT = 1
"""Version of the checkpoint folder; another one is refused."""

DESCRIPTION = "jitjax.json"
BUNDLED = Path(__file__).parent / "checkpoints"
PARTS = ("transformer", "t5", "clip", "autoencoder")
TOKENIZERS = ("tokenizer", "tokenizer_2")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FluxParams:
    """All parameters of a FLUX pipeline: a pytree of arrays with the configuration attached.

    Attributes:
        transformer, t5, clip, autoencoder: nested dictionaries of arrays, blocks stacked along
            the first axis.
        config: the static facts.
        tokenizer: folder that holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5).
    """

    transformer: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    autoencoder: dict[str, Any]
    config: FluxConfig = dataclasses.field(metadata={"static": True})
    tokenizer: str = dataclasses.field(metadata={"static": True})


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


def load(path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> FluxParams:
    """Load parameters.

    Args:
        path: the name of a bundled checkpoint ("tiny"), or a folder that `save` or
            `python -m jitjax.convert` wrote.
        dtype: floating-point type of the parameters, which is also the one computed in; by
            default as stored (the bundled checkpoint is stored in float16 and loaded as
            float32).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a checkpoint of this format and version, or not a whole one.
    """
    # `convert/` is mapped into the package at installation, which type checkers do not follow.
    from jitjax.convert.reading import read_folder  # pyright: ignore[reportMissingImports]

    if isinstance(path, str) and (BUNDLED / path / "model_index.json").is_file():
        return jax.device_put(read_folder(BUNDLED / path, dtype=dtype or jnp.float32))
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(
            f"no checkpoint at {str(folder)!r}; expected a folder that jitjax.save or "
            f"`python -m jitjax.convert` wrote, or one of {bundled()}"
        )
    config = _read_description(folder)
    return _restore(folder, config, dtype)


def bundled() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def _read_description(folder: Path) -> FluxConfig:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; expected a checkpoint folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is a diffusers folder; convert it once with "
            f"`python -m jitjax.convert {folder} --out CHECKPOINT`, then load CHECKPOINT"
        )
    description = folder / DESCRIPTION
    if not description.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {DESCRIPTION}: not a jitjax checkpoint, or not a whole one"
        )
    try:
        raw = json.loads(description.read_text())
        version = raw["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{description} cannot be read ({error!r}); write it anew") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version!r}; this version reads {FORMAT}")
    try:
        return _config_from_json(raw["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{description}: not a FLUX configuration of this version ({error})"
        ) from (error)


def _restore(folder: Path, config: FluxConfig, dtype: DTypeLike | None) -> FluxParams:
    import orbax.checkpoint as ocp

    missing = [n for n in (*TOKENIZERS, "params") if not (folder / n).is_dir()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing)}: not a whole checkpoint")
    wanted = _trees(abstract_params(config))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata((folder / "params").absolute()).item_metadata.tree
        except Exception as error:
            raise ValueError(f"{str(folder / 'params')!r} cannot be read: {error}") from error
        _compare(folder, wanted, stored)
        target = jax.tree.map(
            lambda w, s: jax.ShapeDtypeStruct(w.shape, dtype or s.dtype, sharding=device),
            wanted,
            stored,
        )
        try:
            trees = checkpointer.restore((folder / "params").absolute(), target)
        except Exception as error:
            raise ValueError(f"{str(folder / 'params')!r} is damaged: {error}") from error
    return FluxParams(**trees, config=config, tokenizer=str(folder.absolute()))


def _compare(folder: Path, wanted: Any, stored: Any) -> None:
    """Raise one error that lists every leaf in which the arrays differ from the configuration."""

    def shapes(tree: Any) -> dict[str, list[int]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(k, simple=True, separator="/"): list(v.shape) for k, v in leaves
        }

    want, have = shapes(wanted), shapes(stored)
    problems = [f"{k} is missing" for k in want if k not in have]
    problems += [f"{k} is unknown" for k in have if k not in want]
    problems += [
        f"{k} is {have[k]}, expected {want[k]}" for k in want if k in have and have[k] != want[k]
    ]
    if problems:
        raise ValueError(
            f"{str(folder)!r}: the arrays are not those of its configuration\n  "
            + "\n  ".join(problems)
        )


def save(params: FluxParams, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write parameters to a checkpoint folder that `load` reads.

    The folder appears when it is complete: a run that is killed leaves what was there before.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false, or it is something else than a
            checkpoint.
        FileNotFoundError: the parameters' tokenizer folder is gone.
    """
    import orbax.checkpoint as ocp

    target = Path(path)
    foreign = target.exists() and not (target / DESCRIPTION).is_file()
    if foreign and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} is no jitjax checkpoint; it is not replaced")
    sources = [Path(params.tokenizer) / name for name in TOKENIZERS]
    for source in sources:
        if not source.is_dir():
            raise FileNotFoundError(f"no tokenizer at {str(source)!r}; expected a folder")
    with replacing(target, overwrite=overwrite) as folder:
        for source in sources:
            shutil.copytree(source, folder / source.name)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", _trees(params))
        description = {"format": FORMAT, "config": dataclasses.asdict(params.config)}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends without an error.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false.
    """
    path = path.absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists; give overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    new = work / "new"
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(work / "old")
        try:
            new.rename(path)
        except OSError:
            if (work / "old").exists():
                (work / "old").rename(path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _trees(params: FluxParams) -> dict[str, Any]:
    return {part: getattr(params, part) for part in PARTS}


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
