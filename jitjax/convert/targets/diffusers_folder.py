"""Writes `FluxParams` as a diffusers folder, without torch or diffusers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jitjax.checkpoint import METADATA_FILE, PARTS, TOKENIZERS, FluxParams, read_metadata
from jitjax.checkpoint.atomic import atomic_folder, check_target
from jitjax.config import FluxConfig
from jitjax.models.quantised import kind_of
from jitjax.validation import listed, read_json, shown

from ..components import (
    COMPONENTS,
    PIPELINES,
    SCHEDULER,
    SHIFT_FIELDS,
    Component,
    byte_bar,
    pipeline_of,
)
from ..sources.diffusers_folder import read_config
from ..tables.engine import ConversionError, Rule, invert_rule, leaf_shapes, leaves_by_path

SHARD_BYTES = 5 * 10**9
VERSIONS = {
    "FluxControlPipeline": "0.32.0", "FluxFillPipeline": "0.32.0", "FluxKontextPipeline": "0.35.0",
}  # fmt: skip
"""The first versions of diffusers with a pipeline; 0.30.0 has `FluxPipeline`."""
OWNED = ("model_index.json", "scheduler", *TOKENIZERS, *(c.folder for c in COMPONENTS))
"""All that `write_folder` writes into the folder."""


def write_folder(
    params: FluxParams,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write a diffusers folder that `from_pretrained` of diffusers' pipeline loads.

    The folder appears when it is complete. Weights keep their dtype.

    Args:
        params: the parameters. The two tokenizers are copied from `params.tokenizer`.
        folder: the folder to write; parent folders are created.
        overwrite: replace an existing diffusers folder: its `model_index.json` and the subfolders
            of the models, scheduler and tokenizers. Other files stay.
        shard_bytes: approximate maximum size of one weight file. Larger models are written as
            several files, but a stacked leaf is never split.
        progress: show a progress bar.

    Raises:
        FileExistsError: `folder` exists and may not be replaced, or another process writes it.
        FileNotFoundError: the tokenizers are missing.
        ConversionError: the parameters do not match their config.
        ValueError: a part is missing or quantised, or a diffusers folder cannot express the config.
    """
    check_new_folder(folder, overwrite=overwrite)
    _check_parts([part for part in PARTS if getattr(params, part)], "params")
    _check_unquantised({part: kind_of(getattr(params, part)) for part in PARTS}, "params")
    _check_trees(params)
    tokenizers = [Path(params.tokenizer) / name for name in TOKENIZERS]
    for path in tokenizers:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} not found; expected the folder of a tokenizer")
    arrays = jax.tree.leaves([getattr(params, c.name) for c in COMPONENTS])
    with atomic_folder(
        folder, overwrite=overwrite, owned=OWNED, check_replaceable=_check_replaceable
    ) as new:
        for path in tokenizers:
            shutil.copytree(path, new / path.name)
        _write_configs(params.config, new)
        if read_config(new) != params.config:
            raise ValueError(f"a diffusers folder cannot express this config: {params.config}")
        with byte_bar(sum(array.nbytes for array in arrays), "writing", progress) as bar:
            for component in COMPONENTS:
                _write_weights(params, component, new, shard_bytes, bar.update)


def check_new_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check that a diffusers folder may be written, without writing; for use before long work.

    Raises:
        FileExistsError, OSError: as for `write_folder`.
    """
    check_target(folder, overwrite, _check_replaceable)


def check_complete(checkpoint: Path) -> None:
    """Raise `ValueError` if a diffusers folder needs models that a checkpoint does not have.

    It has no place for quantised weights either.
    """
    if (checkpoint / METADATA_FILE).is_file():
        metadata = read_metadata(checkpoint)
        _check_parts(metadata["parts"], str(checkpoint))
        _check_unquantised(metadata["quantisation"], str(checkpoint))


def _check_parts(parts: Sequence[str], label: str) -> None:
    if missing := [part for part in PARTS if part not in parts]:
        raise ValueError(
            f"{label} has no {', '.join(missing)}; a diffusers folder needs {', '.join(PARTS)}"
        )


def _check_unquantised(kinds: Mapping[str, str | None], label: str) -> None:
    if quantised := [f"{part} ({kind})" for part, kind in kinds.items() if kind]:
        raise ValueError(
            f"{label} is quantised: {', '.join(quantised)}; a diffusers folder needs the weights "
            "that it was made from"
        )


def _check_replaceable(folder: Path) -> None:
    """Raise `FileExistsError` unless `folder` is a diffusers folder of FLUX, or empty."""
    index = folder / "model_index.json"
    if not folder.is_dir() or (any(folder.iterdir()) and not index.is_file()):
        raise FileExistsError(f"{folder} is not a diffusers folder; it is not replaced")
    try:
        pipeline = read_json(index).get("_class_name") if index.is_file() else None
    except ValueError:
        return  # damaged, and about to be replaced
    if pipeline not in (None, *PIPELINES):
        raise FileExistsError(
            f"{folder} is a diffusers folder of {shown(pipeline)}; it is not replaced"
        )


def _check_trees(params: FluxParams) -> None:
    problems = []
    for component in COMPONENTS:
        expected = leaf_shapes(component.abstract_params(getattr(params.config, component.name)))
        actual = leaf_shapes(getattr(params, component.name))
        for path in sorted(expected.keys() | actual.keys()):
            leaf = f"{component.name}/{path}"
            if path not in actual:
                problems.append(f"{leaf} is missing; expected shape {list(expected[path])}")
            elif path not in expected:
                problems.append(f"{leaf} is not expected; its shape is {list(actual[path])}")
            elif actual[path] != expected[path]:
                problems.append(
                    f"{leaf} has shape {list(actual[path])}; expected {list(expected[path])}"
                )
    if problems:
        raise ConversionError(f"parameters do not match their config{listed(problems)}")


def _write_weights(
    params: FluxParams,
    component: Component,
    folder: Path,
    shard_bytes: int,
    progress: Callable[[int], object],
) -> None:
    arrays = leaves_by_path(getattr(params, component.name))
    shards: list[list[Rule]] = [[]]
    shard_size = total_size = 0
    for rule in component.rules(getattr(params.config, component.name)):
        size = arrays[rule.target].nbytes
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(rule)
        shard_size, total_size = shard_size + size, total_size + size
    weight_map: dict[str, str] = {}
    for number, rules in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{component.stem}{suffix}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for rule in rules:
            tensors |= invert_rule(rule, np.asarray(arrays[rule.target]))
        save_file(tensors, folder / component.folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        progress(sum(tensor.nbytes for tensor in tensors.values()))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / component.folder / f"{component.stem}.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_configs(config: FluxConfig, folder: Path) -> None:
    """Write the JSON files: our fields, which have diffusers' names, and diffusers' other keys."""
    levels = len(config.autoencoder.block_out_channels)
    other_keys: dict[str, dict[str, Any]] = {
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
        },
        "clip": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "projection_dim": config.clip.hidden_size,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        "t5": {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "num_decoder_layers": config.t5.num_layers,
            "is_encoder_decoder": True,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        "autoencoder": {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "mid_block_add_attention": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
            "sample_size": config.image_size,
        },
    }
    for component in COMPONENTS:
        fields = dataclasses.asdict(getattr(config, component.name))
        _write_json(folder / component.folder / "config.json", other_keys[component.name] | fields)
    shift = {key: getattr(config, name) for key, (name, _) in SHIFT_FIELDS.items()}
    scheduler = {"_class_name": SCHEDULER, "num_train_timesteps": 1000} | shift
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    pipeline = pipeline_of(config)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": VERSIONS.get(pipeline, "0.30.0"),
        "scheduler": ["diffusers", SCHEDULER],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", _tokenizer_class(folder / "tokenizer", "CLIPTokenizer")],
        "tokenizer_2": [
            "transformers",
            _tokenizer_class(folder / "tokenizer_2", "T5TokenizerFast"),
        ],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if config.transformer.control == "none":
        index |= {key: [None, None] for key in ("feature_extractor", "image_encoder")}
    _write_json(folder / "model_index.json", index)


def _tokenizer_class(folder: Path, default: str) -> str:
    path = folder / "tokenizer_config.json"
    return (read_json(path) if path.is_file() else {}).get("tokenizer_class") or default
