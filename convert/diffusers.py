"""diffusers folders of FLUX: read into `FluxParams`, and written back.

    model_index.json                         _class_name FluxPipeline
    transformer/       config.json, diffusion_pytorch_model*.safetensors    transformer
    text_encoder/      config.json, model*.safetensors                      clip
    text_encoder_2/    config.json, model*.safetensors                      t5
    vae/               config.json, diffusion_pytorch_model*.safetensors    autoencoder
    scheduler/         scheduler_config.json                                shift of dense plans
    tokenizer/, tokenizer_2/                                                copied as they are

Neither torch nor diffusers is needed. All that can be found wrong without reading weights is
found first: missing files, settings that are not implemented, keys and shapes that do not fit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from jitjax.checkpoint import FluxParams, replacing
from jitjax.config import AutoencoderConfig, CLIPConfig, FluxConfig, T5Config, TransformerConfig
from jitjax.models import autoencoder, clip, flux, t5

from .autoencoder_tables import AUTOENCODER_IGNORED, autoencoder_rules
from .engine import (
    ConversionError,
    Rule,
    Tree,
    check,
    fill,
    invert,
    leaf_shapes,
    leaf_types,
    leaves,
)
from .tables import TRANSFORMER_IGNORED, transformer_rules
from .text_tables import (
    CLIP_ALIASES,
    CLIP_IGNORED,
    T5_ALIASES,
    T5_IGNORED,
    canonical_names,
    clip_rules,
    t5_rules,
)

SHARD_BYTES = 5 * 10**9
TEXT_LENGTH = 512
"""Most T5 tokens that FLUX was trained with; the tokenizer may say less."""
IMAGE_SIZE = 1024
"""Side of FLUX's pictures in pixels, where `vae/config.json` has no `sample_size`."""
PIPELINE = "FluxPipeline"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"

TYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""safetensors' names of the types that weights may have."""


@dataclass(frozen=True)
class Component:
    """One model of the pipeline.

    Attributes:
        folder: its folder.
        name: its field in `FluxParams` and in `FluxConfig`.
        stem: how the names of its weight files begin.
        config: its configuration class.
        rules: its rule table.
        abstract_params: its parameter tree without the numbers.
        ignored, aliases: see its table.
    """

    folder: str
    name: str
    stem: str
    config: Any
    rules: Callable[[Any], list[Rule]]
    abstract_params: Callable[[Any], Tree]
    ignored: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)


COMPONENTS = (
    Component(
        "transformer",
        "transformer",
        "diffusion_pytorch_model",
        TransformerConfig,
        transformer_rules,
        flux.abstract_params,
        TRANSFORMER_IGNORED,
    ),
    Component(
        "text_encoder",
        "clip",
        "model",
        CLIPConfig,
        clip_rules,
        clip.abstract_params,
        CLIP_IGNORED,
        CLIP_ALIASES,
    ),
    Component(
        "text_encoder_2",
        "t5",
        "model",
        T5Config,
        t5_rules,
        t5.abstract_params,
        T5_IGNORED,
        T5_ALIASES,
    ),
    Component(
        "vae",
        "autoencoder",
        "diffusion_pytorch_model",
        AutoencoderConfig,
        autoencoder_rules,
        autoencoder.abstract_params,
        AUTOENCODER_IGNORED,
    ),
)

SHIFT_FIELDS = {
    "use_dynamic_shifting": ("dynamic_shift", False),
    "base_shift": ("base_shift", 0.5),
    "max_shift": ("max_shift", 1.15),
    "base_image_seq_len": ("base_seq", 256),
    "max_image_seq_len": ("max_seq", 4096),
    "shift": ("shift", 1.0),
}
"""Key in `scheduler_config.json` -> field of `FluxConfig`, and diffusers' value if it is absent."""


# ---------------------------------------------------------------------------------- reading


class Weights:
    """The tensors of one component's safetensors files: headers at once, numbers on demand.

    Attributes:
        shapes: canonical name -> shape.
        types: canonical name -> dtype; None for types that no weight may have.
    """

    def __init__(self, folder: Path, stem: str, aliases: Mapping[str, str]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, np.dtype | None] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        files: dict[str, Path] = {}
        for path in _weight_files(folder, stem):
            for name in _header(path):
                if name in files:
                    raise ValueError(f"{name} is both in {files[name]} and in {path}")
                files[name] = path
        for canonical, name in canonical_names(files, aliases).items():
            shape, kind = _header(files[name])[name]
            self.shapes[canonical], self.types[canonical] = shape, TYPES.get(kind)
            self._places[canonical] = files[name], name

    def read(self, name: str) -> np.ndarray:
        """One tensor, by canonical name, with the dtype of the file."""
        path, stored = self._places[name]
        with safe_open(path, "numpy") as file:
            return file.get_tensor(stored)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}") from None


def _weight_files(folder: Path, stem: str) -> list[Path]:
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.exists() and index.exists():
        raise ValueError(f"{folder} has both {whole.name} and {index.name}; expected one of them")
    if whole.exists():
        return [whole]
    if index.exists():
        shards = sorted(set(_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            listed = ", ".join(missing) or "(it lists none)"
            raise FileNotFoundError(f"{index} lists files that are not there: {listed}")
        return [folder / name for name in shards]
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".ckpt")]
    others += [p.name for p in sorted(folder.glob("*.safetensors"))]
    found = f"; it has {', '.join(others)}, which is not read" if others else ""
    raise FileNotFoundError(f"{folder}: expected {whole.name} or {index.name}{found}")


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no complete JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected a JSON object")
    return raw


def read_config(folder: str | os.PathLike[str]) -> FluxConfig:
    """The configuration of the pipeline in a diffusers folder.

    Raises:
        FileNotFoundError: files are missing; the message lists them.
        ValueError: it is another pipeline, or a setting is not implemented.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a diffusers folder of FLUX")
    paths = [folder / c.folder / "config.json" for c in COMPONENTS]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tokenizers = [folder / name / "tokenizer_config.json" for name in ("tokenizer", "tokenizer_2")]
    needed = [folder / "model_index.json", *paths, scheduler, *tokenizers]
    missing = [str(path.relative_to(folder)) for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete diffusers folder of FLUX: {', '.join(missing)} not found"
        )
    got = _json(folder / "model_index.json").get("_class_name")
    if got != PIPELINE:
        raise ValueError(f"{folder}/model_index.json: _class_name is {got!r}, expected {PIPELINE}")
    models = {
        component.name: component.config.from_diffusers(_json(path))
        for component, path in zip(COMPONENTS, paths, strict=True)
    }
    limit = _json(tokenizers[1]).get("model_max_length") or TEXT_LENGTH
    return FluxConfig(
        **models,
        **_read_shift(scheduler),
        text_length=int(min(TEXT_LENGTH, limit)),
        image_size=_json(folder / "vae" / "config.json").get("sample_size", IMAGE_SIZE),
    )


def _read_shift(path: Path) -> dict[str, Any]:
    raw = _json(path)
    unknown = [
        f"{key} is {raw[key]!r}, only {expected!r} is implemented"
        for key, expected in (
            ("_class_name", SCHEDULER),
            ("num_train_timesteps", 1000),
            ("time_shift_type", "exponential"),
        )
        if raw.get(key, expected) != expected
    ]
    switches = ("invert_sigmas", "shift_terminal", "stochastic_sampling", "use_beta_sigmas")
    switches += ("use_exponential_sigmas", "use_karras_sigmas")
    unknown += [f"{key} is {raw[key]!r}, not implemented" for key in switches if raw.get(key)]
    if unknown:
        raise ValueError(f"{path}: " + "; ".join(unknown))
    return {name: raw.get(key, absent) for key, (name, absent) in SHIFT_FIELDS.items()}


def read_folder(
    folder: str | os.PathLike[str], dtype: Any = None, *, progress: bool = False
) -> FluxParams:
    """Read a diffusers folder of FLUX.

    The leaves are NumPy arrays in host memory; `jax.device_put` moves them. Beside the result, no
    more than one block of one layer is in memory.

    Args:
        folder: the folder; its two tokenizers stay where they are.
        dtype: of all parameters; None keeps them as stored.
        progress: show a bar.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or a setting is not implemented.
        ConversionError: keys or shapes do not fit; the message lists them for all models.
    """
    folder = Path(folder)
    config = read_config(folder)
    jobs, problems, total = [], [], 0
    for component in COMPONENTS:
        one = getattr(config, component.name)
        rules, shapes = component.rules(one), leaf_shapes(component.abstract_params(one))
        weights = Weights(folder / component.folder, component.stem, component.aliases)
        try:
            check(rules, shapes, weights.shapes, what=component.folder, ignored=component.ignored)
        except ConversionError as error:
            problems.append(str(error))
            continue
        types = _stored_types(weights, rules, component.folder)
        targets = leaf_types(rules, types, dtype)
        total += sum(targets[path].itemsize * math.prod(shapes[path]) for path in shapes)
        jobs.append((component.name, rules, shapes, targets, weights.read))
    if problems:
        raise ConversionError("\n".join(problems))
    trees = {}
    with _bar(total, "reading", progress) as bar:
        for name, rules, shapes, targets, read in jobs:
            trees[name] = fill(rules, shapes, targets, read, bar.update)
    return FluxParams(**trees, config=config, tokenizer=str(folder.resolve()))


def _stored_types(weights: Weights, rules: list[Rule], what: str) -> dict[str, np.dtype]:
    used = [name for rule in rules for names in rule.names() for name in names]
    wrong = [name for name in used if weights.types[name] is None]
    if wrong:
        raise ValueError(
            f"{what}: {', '.join(wrong)}: expected one of the types {', '.join(TYPES)}"
        )
    return {name: kind for name in used if (kind := weights.types[name]) is not None}


def _bar(total: int, what: str, show: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show)


# ---------------------------------------------------------------------------------- writing


def write_folder(
    params: FluxParams,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write a diffusers folder that `diffusers.FluxPipeline.from_pretrained` loads.

    The folder appears when it is complete. Weights keep their dtype.

    Args:
        params: what to write. The two tokenizers are copied from `params.tokenizer`.
        folder: where to; its parents are made.
        overwrite: replace the diffusers folder that is there.
        shard_bytes: larger models are written as several files of about this size at most. One
            stacked leaf is never divided.
        progress: show a bar.

    Raises:
        FileExistsError: there is something, and it may not be replaced.
        FileNotFoundError: the tokenizers are not there.
        ConversionError: the parameters do not fit their config.
        ValueError: the config cannot be said in the words of diffusers.
    """
    folder = Path(folder).absolute()
    check_target(folder, overwrite)
    _check_trees(params)
    tokenizers = [Path(params.tokenizer) / name for name in ("tokenizer", "tokenizer_2")]
    for path in tokenizers:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} not found; expected the folder of a tokenizer")
    arrays = jax.tree.leaves([getattr(params, c.name) for c in COMPONENTS])
    with replacing(folder, overwrite=overwrite) as new:
        for path in tokenizers:
            shutil.copytree(path, new / path.name)
        _write_configs(params.config, new)
        if read_config(new) != params.config:
            raise ValueError(f"this config has no equal in a diffusers folder: {params.config}")
        with _bar(sum(array.nbytes for array in arrays), "writing", progress) as bar:
            for component in COMPONENTS:
                _write_weights(params, component, new, shard_bytes, bar.update)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `FileExistsError` if `write_folder` may not put a folder there."""
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is there already; expected a new folder, or overwrite")
    if not folder.is_dir() or (
        any(folder.iterdir()) and not (folder / "model_index.json").exists()
    ):
        raise FileExistsError(f"{folder} is no diffusers folder, so it is not replaced")


def _check_trees(params: FluxParams) -> None:
    problems = []
    for component in COMPONENTS:
        expected = leaf_shapes(component.abstract_params(getattr(params.config, component.name)))
        got = leaf_shapes(getattr(params, component.name))
        for path in sorted(expected.keys() | got.keys()):
            if got.get(path) != expected.get(path):
                problems.append(
                    f"{component.name}/{path} is {got.get(path)}, expected {expected.get(path)}"
                )
    if problems:
        raise ConversionError("parameters do not fit their config\n  " + "\n  ".join(problems))


def _write_weights(
    params: FluxParams,
    component: Component,
    folder: Path,
    shard_bytes: int,
    progress: Callable[[int], object],
) -> None:
    arrays = leaves(getattr(params, component.name))
    shards: list[list[Rule]] = [[]]
    filled = total = 0
    for rule in component.rules(getattr(params.config, component.name)):
        size = arrays[rule.target].nbytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(rule)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, rules in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{component.stem}{part}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for rule in rules:
            tensors |= invert(rule, np.asarray(arrays[rule.target]))
        save_file(tensors, folder / component.folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        progress(sum(tensor.nbytes for tensor in tensors.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / component.folder / f"{component.stem}.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_configs(config: FluxConfig, folder: Path) -> None:
    """The JSON files: our fields, which have diffusers' names, and what diffusers wants besides."""
    levels = len(config.autoencoder.block_out_channels)
    fixed: dict[str, dict[str, Any]] = {
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "out_channels": None,
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
        ours = dataclasses.asdict(getattr(config, component.name))
        _write_json(folder / component.folder / "config.json", fixed[component.name] | ours)
    shift = {key: getattr(config, name) for key, (name, _) in SHIFT_FIELDS.items()}
    scheduler = {"_class_name": SCHEDULER, "num_train_timesteps": 1000} | shift
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": PIPELINE,
        "_diffusers_version": "0.30.0",  # the first with FLUX
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
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
    _write_json(folder / "model_index.json", index)


def _tokenizer_class(folder: Path, default: str) -> str:
    path = folder / "tokenizer_config.json"
    return (_json(path) if path.is_file() else {}).get("tokenizer_class") or default
