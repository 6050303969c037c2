"""Opens FLUX in single safetensors or GGUF files: one model per file, or several in one file.

Layouts are recognised by tensor names (see `layouts.py`) and configurations are inferred from
shapes. Any subset of the models is enough: a checkpoint without text encoders works with
conditioning computed elsewhere.

Single files do not say with which schedule a transformer was trained. `schedule` does; "auto" takes
FLUX.1-dev's if the transformer has guidance, else FLUX.1-schnell's, and warns if that is a guess.
Nor do they say whether it is FLUX.1 Kontext, whose shapes are FLUX.1-dev's.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitjax.checkpoint import METADATA_FILE, PARTS, TOKENIZERS
from jitjax.config import (
    PATCH,
    AutoencoderConfig,
    CLIPConfig,
    FluxConfig,
    T5Config,
    TransformerConfig,
)

from ..components import COMPONENTS, component_of
from ..tables.engine import ConversionError
from .diffusers_folder import (
    TEXT_LENGTH,
    ModelSource,
    Source,
    open_folder,
    prepare_model,
    weight_files,
)
from .file_kinds import explain_absence, explain_folder
from .layouts import Layout, RecognisedModel, misfits, recognise, stray_names
from .tensors import OriginalWeights, Weights, scan_all

SCHNELL_TEXT_LENGTH = 256
SCHEDULES = {
    "dev": {"text_length": TEXT_LENGTH, "dynamic_shift": True, "shift": 3.0},
    "schnell": {"text_length": SCHNELL_TEXT_LENGTH, "dynamic_shift": False, "shift": 1.0},
}
"""Name of a released model -> the fields of `FluxConfig` that no tensor has."""
DESCRIPTIONS = {
    "dev": "FLUX.1-dev's schedule (sigmas shifted by resolution, 512 text tokens)",
    "schnell": "FLUX.1-schnell's schedule (sigmas not shifted, 256 text tokens)",
}


def open_files(
    files: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    dtype: Any = None,
    *,
    tokenizers: str | os.PathLike[str] | None = None,
    parts: Sequence[str] | None = None,
    schedule: str = "auto",
) -> Source:
    """Check models in single files without reading values.

    Args:
        files: safetensors or GGUF files, or diffusers folders of one model, in any order; or a
            mapping from model name to the file or folder to take it from.
        dtype: dtype of all parameters; None keeps the stored dtypes (fp8 becomes bfloat16).
        tokenizers: folder with `tokenizer/` and `tokenizer_2/`; required for text encoders.
        parts: names of the models to take, of `jitjax.checkpoint.PARTS`; None takes all.
        schedule: "dev", "schnell", or "auto"; see `whole_config`. "auto" warns if the transformer
            has no guidance.

    Raises:
        FileNotFoundError: a file or a tokenizer is missing.
        ValueError: a file is damaged or contains no model of FLUX, a model is in two files or
            twice in one, or a requested model is in none.
        ConversionError: keys or shapes do not match; it lists them for all models.
    """
    source = _open_files(files, dtype, tokenizers=tokenizers, parts=parts, schedule=schedule)
    has_transformer = any(model.name == "transformer" for model in source.models)
    if schedule == "auto" and has_transformer and not source.config.transformer.guidance_embeds:
        _warn(
            f"the transformer has no guidance, so {DESCRIPTIONS['schnell']} is assumed; for a "
            "de-distilled FLUX.1-dev, choose schedule dev (--schedule dev)"
        )
    return source


def _open_files(
    files: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    dtype: Any,
    *,
    tokenizers: str | os.PathLike[str] | None,
    parts: Sequence[str] | None,
    schedule: str,
) -> Source:
    problems: list[ConversionError] = []
    recognised: dict[str, tuple[Path, RecognisedModel, Weights]] = {}
    by_model = isinstance(files, Mapping)
    pairs = files.items() if by_model else ((None, file) for file in files)
    for requested, path in ((requested, Path(file)) for requested, file in pairs):
        tensors = scan_all(_weight_files_at(path))
        found = recognise({name: t.shape for name, t in tensors.items()}, str(path))
        if strays := stray_names(tensors, found):
            unmatched = [f"unmatched key: {name}" for name in strays]
            problems.append(ConversionError.from_problems(f"{path} (beside its models)", unmatched))
        for model in found:
            part = model.layout.model
            if part not in (PARTS if parts is None else parts) or requested not in (None, part):
                continue
            if part in recognised:
                raise ValueError(_explain_duplicate(part, recognised[part], (path, model)))
            model_tensors = {name: tensors[stored] for name, stored in model.names.items()}
            recognised[part] = path, model, Weights(model_tensors, component_of(part).aliases)
    missing = [part for part in parts or (files if by_model else ()) if part not in recognised]
    if missing or not recognised:
        absent, available = ", ".join(missing) or "a model", ", ".join(recognised) or "none"
        raise ValueError(f"no file contains {absent}; requested models found: {available}")
    needs_tokenizers = "t5" in recognised or "clip" in recognised
    tokenizer = _tokenizer_folder(tokenizers, needed=needs_tokenizers)
    configs: dict[str, Any] = {}
    models: list[ModelSource] = []
    for part, (path, model, weights) in recognised.items():
        try:
            configs[part], model_source = _configure_and_prepare(model.layout, weights, path, dtype)
            models.append(model_source)
        except ConversionError as error:
            problems.append(error)
    if problems:
        raise ConversionError.from_errors(problems)
    paths = [path for path, _, _ in recognised.values()]
    used_files = dict.fromkeys(file for path in paths for file in _weight_files_at(path))
    return Source(whole_config(configs, schedule), tuple(models), tokenizer, tuple(used_files))


def _explain_duplicate(
    part: str, first: tuple[Path, RecognisedModel, Weights], second: tuple[Path, RecognisedModel]
) -> str:
    if first[0] != second[0]:
        return f"{part} is both in {first[0]} and in {second[0]}"
    prefixes = [model.prefix or "(no prefix)" for model in (first[1], second[1])]
    return (
        f"{first[0]} contains the {part} twice, under {prefixes[0]} and {prefixes[1]} (an averaged "
        "copy, EMA, is often saved beside a model); expected a file with one of them"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def open_sources(
    source: str | os.PathLike[str] | None,
    files: Mapping[str, str | os.PathLike[str]],
    dtype: Any = None,
    *,
    tokenizers: str | os.PathLike[str] | None = None,
    parts: Sequence[str] | None = None,
    schedule: str = "auto",
) -> Source:
    """Check a diffusers folder or a single file, with some models replaced by other files.

    Args:
        source: the diffusers folder or file; None to take all models from `files`.
        files: model name -> file to take it from, instead of `source`.
        dtype: dtype of all parameters; None keeps the stored dtypes (fp8 becomes bfloat16).
        tokenizers: folder with `tokenizer/` and `tokenizer_2/`, if `source` is not a folder.
        parts: names of the models to take, of `jitjax.checkpoint.PARTS`; None takes all.
        schedule: "dev" or "schnell" sets the schedule (see `whole_config`); "auto" keeps a folder's
            and warns if the replaced transformer differs in guidance from the folder's.

    Raises:
        FileNotFoundError: as `open_files` and `open_folder` do.
        ValueError: as `open_files` and `open_folder` do, or for `tokenizers` with a folder.
        ConversionError: as `open_files` and `open_folder` do.
    """
    requested = [part for part in PARTS if parts is None or part in parts]
    replaced = {part: file for part, file in files.items() if part in requested}
    if source is None or not Path(source).is_dir() or (Path(source) / "config.json").is_file():
        available = [] if source is None else models_of(source)
        from_source = {
            part: source for part in requested if part in available and source is not None
        }
        return open_files(
            from_source | replaced, dtype, tokenizers=tokenizers, parts=parts, schedule=schedule
        )
    if tokenizers is not None:
        raise ValueError(f"{source} is a folder, which has its own tokenizers; expected no others")
    _check_pipeline_folder(Path(source))
    folder = open_folder(source, dtype, parts=[part for part in requested if part not in replaced])
    config = folder.config
    if schedule != "auto":
        config = dataclasses.replace(config, **SCHEDULES[schedule])
    if not replaced:
        return dataclasses.replace(folder, config=config)
    single = _open_files(replaced, dtype, tokenizers=source, parts=None, schedule=schedule)
    if schedule == "auto" and "transformer" in replaced:
        _compare_guidance(source, config, single.config.transformer)
    configs = {part: getattr(single.config, part) for part in replaced}
    if "transformer" in replaced:  # a single file does not say
        configs["uses_reference"] = False
    return Source(
        dataclasses.replace(config, **configs),
        (*folder.models, *single.models),
        folder.tokenizer or single.tokenizer,
        (*folder.files, *single.files),
    )


def _check_pipeline_folder(folder: Path) -> None:
    """Raise `FileNotFoundError` for a folder without anything of a diffusers folder."""
    names = (METADATA_FILE, "model_index.json", *(component.folder for component in COMPONENTS))
    if not any((folder / name).exists() for name in names):
        raise FileNotFoundError(explain_folder(folder))


def _compare_guidance(
    folder: str | os.PathLike[str], config: FluxConfig, transformer: TransformerConfig
) -> None:
    """Warn if a folder's schedule is kept for a transformer of another kind than its own."""
    if config.transformer.guidance_embeds == transformer.guidance_embeds:
        return
    own, other = ("dev", "schnell") if config.dynamic_shift else ("schnell", "dev")
    has = "has guidance" if transformer.guidance_embeds else "has no guidance"
    _warn(
        f"the transformer {has}, unlike that of {folder}, whose schedule is kept "
        f"({'shifted' if config.dynamic_shift else 'not shifted'} by resolution, "
        f"{config.text_length} text tokens); --schedule {own} or {other} sets it"
    )


def models_of(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the models in a file, or in the folder of one model.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or contains no model of FLUX.
    """
    tensors = scan_all(_weight_files_at(Path(path)))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return [model.layout.model for model in recognise(shapes, str(path))]


def _weight_files_at(path: Path) -> list[Path]:
    """Return the file itself, or the weight files in the folder of one model."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(explain_absence(path))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is a folder without config.json; expected a safetensors or GGUF file, or the "
            "folder of a model"
        )
    stems = dict.fromkeys(component.stem for component in COMPONENTS)
    return weight_files(path, next((s for s in stems if any(path.glob(f"{s}[.-]*"))), "model"))


def _configure_and_prepare(
    layout: Layout, weights: Weights, path: Path, dtype: Any
) -> tuple[Any, ModelSource]:
    """Return a model's configuration, from config.json or inferred from shapes, and its source."""
    component, label = component_of(layout.model), f"{path} ({layout.title})"
    try:
        if path.is_dir():
            config = component.read_config(path / "config.json")
        else:
            config = layout.config(weights.shapes)
    except KeyError:
        raise ConversionError.from_problems(label, misfits(weights.shapes, layout)) from None
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    renamed: Weights | OriginalWeights = weights
    if layout.parts:
        shapes = component.source_shapes(config)
        renamed = OriginalWeights(
            weights, layout.parts(config), shapes, label=label, ignored=layout.ignored
        )
    return config, prepare_model(
        component, config, renamed, dtype, label=label, ignored=layout.ignored
    )


def _tokenizer_folder(folder: str | os.PathLike[str] | None, *, needed: bool) -> str:
    if folder is None:
        if needed:
            raise FileNotFoundError(
                "text encoders need tokenizers, which single files do not contain; expected a "
                "folder with tokenizer/ and tokenizer_2/, such as a diffusers folder of FLUX"
            )
        return ""
    for name in TOKENIZERS:
        if not (Path(folder) / name).is_dir():
            raise FileNotFoundError(f"no tokenizer at {Path(folder) / name}; expected a folder")
    return str(Path(folder).resolve())


def whole_config(models: Mapping[str, Any], schedule: str = "auto") -> FluxConfig:
    """Return the pipeline's configuration for the configurations of some models.

    Missing models get FLUX's configuration, with widths that match the other models.

    Args:
        models: model name -> its configuration.
        schedule: "dev" (sigmas shifted by resolution, 512 text tokens), "schnell" (not shifted, 256
            text tokens), or "auto": "dev" for a transformer with guidance, else "schnell".

    Raises:
        ValueError: `schedule` is none of these, or the widths of the models differ.
    """
    if schedule not in ("auto", *SCHEDULES):
        raise ValueError(f"schedule is {schedule!r}; expected auto, {', '.join(SCHEDULES)}")
    configs = dict(models)
    if "transformer" not in configs:
        widths: dict[str, Any] = {}
        if "autoencoder" in configs:
            widths["in_channels"] = configs["autoencoder"].latent_channels * PATCH**2
        if "t5" in configs:
            widths["joint_attention_dim"] = configs["t5"].d_model
        if "clip" in configs:
            widths["pooled_projection_dim"] = configs["clip"].hidden_size
        configs["transformer"] = TransformerConfig(**widths)
    transformer = configs["transformer"]
    configs.setdefault("t5", T5Config(d_model=transformer.joint_attention_dim))
    if "clip" not in configs:
        hidden = transformer.pooled_projection_dim
        configs["clip"] = CLIPConfig(hidden_size=hidden, num_attention_heads=max(1, hidden // 64))
    channels = transformer.out_channels // PATCH**2
    configs.setdefault("autoencoder", AutoencoderConfig(latent_channels=channels))
    if schedule == "auto":
        schedule = "dev" if transformer.guidance_embeds else "schnell"
    return FluxConfig(**configs, **SCHEDULES[schedule])
