"""FLUX in single safetensors or GGUF files: one per model, or several models in one.

Layouts are recognised from the names (see `layouts.py`), configurations inferred from the shapes.
Any subset of the models will do: a checkpoint without text encoders works with conditioning
computed elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitjax.checkpoint import PARTS, TOKENIZERS
from jitjax.config import (
    PATCH,
    AutoencoderConfig,
    CLIPConfig,
    FluxConfig,
    T5Config,
    TransformerConfig,
)

from ..components import COMPONENTS, component_of, read_json
from ..tables.engine import ConversionError
from .diffusers_folder import TEXT_LENGTH, Job, Source, open_folder, prepare, weight_files
from .layouts import Found, Layout, recognise
from .tensors import OriginalWeights, Weights, scan_all

SCHNELL_TEXT_LENGTH = 256


def open_files(
    files: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    dtype: Any = None,
    *,
    tokenizers: str | os.PathLike[str] | None = None,
    parts: Sequence[str] | None = None,
) -> Source:
    """Models in single files, found and checked.

    Args:
        files: safetensors or GGUF files or folders of one model as diffusers has them, in any
            order; or, of each model named, where to take it from.
        dtype: of all parameters; None keeps them as stored (fp8 becomes bfloat16).
        tokenizers: folder with `tokenizer/` and `tokenizer_2/`; prompts need it, conditioning
            computed elsewhere does not.
        parts: names of the models to take, of `jitjax.checkpoint.PARTS`; None takes all there are.

    Raises:
        FileNotFoundError: a file or a tokenizer is missing.
        ValueError: a file is broken, holds no model of FLUX, or a model that is in another one too.
        ConversionError: keys or shapes do not fit; the message lists them for all models.
    """
    models: dict[str, tuple[Path, Found, Weights]] = {}
    named = isinstance(files, Mapping)
    pairs = files.items() if named else ((None, file) for file in files)
    for only, path in ((only, Path(file)) for only, file in pairs):
        tensors = scan_all(_files(path))
        for found in recognise({name: t.shape for name, t in tensors.items()}, str(path)):
            model = found.layout.model
            if model not in (PARTS if parts is None else parts) or only not in (None, model):
                continue
            if model in models:
                raise ValueError(f"{model} is both in {models[model][0]} and in {path}")
            own = {name: tensors[stored] for name, stored in found.names.items()}
            models[model] = path, found, Weights(own, component_of(model).aliases)
    missing = [part for part in parts or (files if named else ()) if part not in models]
    if missing or not models:
        held = ", ".join(models) or "nothing"
        raise ValueError(f"no file holds {', '.join(missing) or 'a model'}; found {held}")
    folder = _tokenizer_folder(tokenizers, needed="t5" in models or "clip" in models)
    configs, jobs, problems = {}, [], []
    for model, (path, found, weights) in models.items():
        try:
            configs[model], job = _prepare(found.layout, weights, path, dtype)
            jobs.append(job)
        except ConversionError as error:
            problems.append(str(error))
    if problems:
        raise ConversionError("\n".join(problems))
    config = whole_config(configs)
    used = dict.fromkeys(file for path, *_ in models.values() for file in _files(path))
    return Source(config, tuple(jobs), folder, tuple(used))


def open_sources(
    source: str | os.PathLike[str] | None,
    files: Mapping[str, str | os.PathLike[str]],
    dtype: Any = None,
    *,
    tokenizers: str | os.PathLike[str] | None = None,
    parts: Sequence[str] | None = None,
) -> Source:
    """A diffusers folder or a single file, with some models taken from files of their own.

    Args:
        source: the folder or file, or None if `files` is all there is.
        files: of each model named, the file to take it from instead.
        dtype, tokenizers, parts: as for `open_files`.

    Raises:
        FileNotFoundError, ValueError, ConversionError: as `open_files` and `open_folder` do.
    """
    wanted = [part for part in PARTS if parts is None or part in parts]
    others = {part: file for part, file in files.items() if part in wanted}
    if source is None or not Path(source).is_dir() or (Path(source) / "config.json").is_file():
        held = [] if source is None else models_of(source)
        chosen = {part: source for part in wanted if part in held and source is not None} | others
        return open_files(chosen, dtype, tokenizers=tokenizers, parts=parts)
    if tokenizers is not None:
        raise ValueError(f"{source} is a folder, which has its own tokenizers; give none beside it")
    folder = open_folder(source, dtype, parts=[part for part in wanted if part not in others])
    if not others:
        return folder
    found = open_files(others, dtype, tokenizers=source)
    models = {part: getattr(found.config, part) for part in others}
    return Source(
        dataclasses.replace(folder.config, **models),
        (*folder.jobs, *found.jobs),
        folder.tokenizer or found.tokenizer,
        (*folder.files, *found.files),
    )


def models_of(path: str | os.PathLike[str]) -> list[str]:
    """Names of the models in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, or holds no model of FLUX.
    """
    shapes = {name: tensor.shape for name, tensor in scan_all(_files(Path(path))).items()}
    return [found.layout.model for found in recognise(shapes, str(path))]


def _files(path: Path) -> list[Path]:
    """The weight files at a path: the file itself, or those in the folder of one model."""
    if path.is_file():
        return [path]
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is neither a safetensors or GGUF file nor the folder of a model"
        )
    stems = dict.fromkeys(component.stem for component in COMPONENTS)
    return weight_files(path, next((s for s in stems if any(path.glob(f"{s}[.-]*"))), "model"))


def _prepare(layout: Layout, weights: Weights, path: Path, dtype: Any) -> tuple[Any, Job]:
    """Configuration of a model, told or inferred from shapes, and the model ready to be read."""
    component, what = component_of(layout.model), f"{path} ({layout.title})"
    try:
        if path.is_dir():
            config = component.config.from_diffusers(read_json(path / "config.json"))
        else:
            config = layout.config(weights.shapes)
    except KeyError as error:
        raise ConversionError.of(what, [f"missing key: {error.args[0]}"]) from None
    named: Weights | OriginalWeights = weights
    if layout.parts:
        shapes = component.source_shapes(config)
        named = OriginalWeights(
            weights, layout.parts(config), shapes, what=what, ignored=layout.ignored
        )
    return config, prepare(component, config, named, dtype, what=what, ignored=layout.ignored)


def _tokenizer_folder(folder: str | os.PathLike[str] | None, *, needed: bool) -> str:
    if folder is None:
        if needed:
            raise FileNotFoundError(
                "text encoders need their tokenizers, which single files do not hold; expected a "
                "folder with tokenizer/ and tokenizer_2/, as in a diffusers folder of FLUX"
            )
        return ""
    for name in TOKENIZERS:
        if not (Path(folder) / name).is_dir():
            raise FileNotFoundError(f"no tokenizer at {Path(folder) / name}; expected a folder")
    return str(Path(folder).resolve())


def whole_config(models: Mapping[str, Any]) -> FluxConfig:
    """The pipeline's configuration; models that are not there are FLUX's, of fitting widths.

    FLUX.1-dev, which is told its guidance, shifts its sigmas by resolution; FLUX.1-schnell, which
    is not, has no shift and shorter prompts.
    """
    ours = dict(models)
    if "transformer" not in ours:
        widths: dict[str, Any] = {}
        if "autoencoder" in ours:
            widths["in_channels"] = ours["autoencoder"].latent_channels * PATCH**2
        if "t5" in ours:
            widths["joint_attention_dim"] = ours["t5"].d_model
        if "clip" in ours:
            widths["pooled_projection_dim"] = ours["clip"].hidden_size
        ours["transformer"] = TransformerConfig(**widths)
    transformer = ours["transformer"]
    ours.setdefault("t5", T5Config(d_model=transformer.joint_attention_dim))
    if "clip" not in ours:
        hidden = transformer.pooled_projection_dim
        ours["clip"] = CLIPConfig(hidden_size=hidden, num_attention_heads=max(1, hidden // 64))
    channels = transformer.in_channels // PATCH**2
    ours.setdefault("autoencoder", AutoencoderConfig(latent_channels=channels))
    dev = transformer.guidance_embeds
    return FluxConfig(
        **ours,
        text_length=TEXT_LENGTH if dev else SCHNELL_TEXT_LENGTH,
        dynamic_shift=dev,
        shift=3.0 if dev else 1.0,
    )
