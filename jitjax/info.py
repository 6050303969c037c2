"""`jitjax info`: what a checkpoint holds, from its metadata alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jitjax import command
from jitjax.arguments import Parser
from jitjax.checkpoint import abstract_params, read_metadata
from jitjax.checkpoint.array_reader import read_leaf_metadata
from jitjax.checkpoint.saving import METADATA_FILE
from jitjax.config import FluxConfig
from jitjax.loading import BUNDLED, bundled
from jitjax.memory.models import folder_bytes
from jitjax.validation import read_json

EXAMPLES = """\
examples:
  jitjax info tiny               the bundled checkpoint
  jitjax info ./flux-dev         a checkpoint made by `jitjax convert`
  jitjax info ./flux-dev --json  the same for programs

No array is read. `jitjax convert --verify FOLDER` compares all of them with their digests.
A picture of the word itself: jitjax -- info

exit status: 0 done, 2 not possible, with a line that says why
"""


def checkpoint_info(checkpoint: str) -> dict[str, Any]:
    """Return what a checkpoint holds.

    Args:
        checkpoint: a folder, or the name of a bundled checkpoint.

    Returns:
        "name"; "format" (None for a bundled one, which is a diffusers folder); "bytes" of the
        folder; "config"; "parts": part -> its "parameters", "bytes" of its arrays, "dtypes" (dtype
        -> number of parameters or stored values) and "quantised" (the kind, or None); "files":
        path, bytes and SHA-256 of what it was converted from; "loras": path and scale of what was
        merged. All are of JSON's types.

    Raises:
        FileNotFoundError: there is no such folder or name.
        ValueError: the folder is no checkpoint.
    """
    if checkpoint in bundled():
        return _bundled_info(checkpoint)
    folder = Path(checkpoint)
    if not checkpoint or not folder.exists():
        raise FileNotFoundError(
            f"no checkpoint at {checkpoint!r}; expected a folder written by jitjax.save or `jitjax "
            f"convert`, or one of {', '.join(bundled())}"
        )
    metadata = read_metadata(folder)
    parts = {}
    for part in metadata["parts"]:
        leaves = read_leaf_metadata(folder / "params" / part).values()
        sizes = [(str(leaf.dtype), math.prod(leaf.shape)) for leaf in leaves]
        parts[part] = _part(metadata["config"], part, sizes, metadata["quantisation"].get(part))
    sources = metadata["sources"]
    return {
        "name": checkpoint,
        "format": read_json(folder / METADATA_FILE)["format"],
        "bytes": folder_bytes(folder),
        "config": dataclasses.asdict(metadata["config"]),
        "parts": parts,
        "files": sources.get("files", []),
        "loras": sources.get("loras", []),
    }


def _bundled_info(name: str) -> dict[str, Any]:
    from safetensors import safe_open

    from jitjax.convert.components import COMPONENTS
    from jitjax.convert.sources.diffusers_folder import read_config

    folder, parts = BUNDLED / name, {}
    config = read_config(folder)
    for component in COMPONENTS:
        sizes = []
        for file in sorted((folder / component.folder).glob("*.safetensors")):
            with safe_open(file, "np") as tensors:
                for key in tensors.keys():  # noqa: SIM118 -- no dictionary
                    piece = tensors.get_slice(key)
                    sizes.append((_DTYPES[piece.get_dtype()], math.prod(piece.get_shape())))
        parts[component.name] = _part(config, component.name, sizes, None)
    return {
        "name": name,
        "format": None,
        "bytes": folder_bytes(folder),
        "config": dataclasses.asdict(config),
        "parts": parts,
        "files": [],
        "loras": [],
    }


_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def _part(
    config: FluxConfig, part: str, sizes: Sequence[tuple[str, int]], quantised: str | None
) -> dict[str, Any]:
    leaves = jax.tree.leaves(getattr(abstract_params(config), part))
    dtypes: Counter[str] = Counter()
    for dtype, size in sizes:
        dtypes[dtype] += size
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "bytes": sum(jax.numpy.dtype(dtype).itemsize * size for dtype, size in sizes),
        "dtypes": dict(dtypes),
        "quantised": quantised,
    }


def text_report(info: dict[str, Any]) -> str:
    """Return what `checkpoint_info` says, as lines for people."""
    config, transformer = info["config"], info["config"]["transformer"]
    kind = "bundled" if info["format"] is None else f"a jitjax checkpoint, format {info['format']}"
    hidden = transformer["attention_head_dim"] * transformer["num_attention_heads"]
    guidance = "guidance embedding" if transformer["guidance_embeds"] else "no guidance embedding"
    lines = [
        f"{info['name']}: {kind}, {_bytes(info['bytes'])}",
        f"FLUX with {transformer['num_layers']} + {transformer['num_single_layers']} blocks, "
        f"{hidden} wide, {guidance}; pictures of {config['image_size']} px, prompts of "
        f"{config['text_length']} tokens",
        "",
        f"{'part':<13}{'parameters':>12}  {'bytes':>9}  dtypes",
    ]
    for name, part in info["parts"].items():
        dtypes = ", ".join(sorted(part["dtypes"], key=lambda d: -part["dtypes"][d]))
        quantised = f" ({part['quantised']})" if part["quantised"] else ""
        size = _bytes(part["bytes"])
        lines.append(f"{name:<13}{_count(part['parameters']):>12}  {size:>9}  {dtypes}{quantised}")
    lines += ["", *(["converted from"] if info["files"] else [])]
    for file in info["files"]:
        lines.append(
            f"  {file['path']} ({_bytes(file['bytes'])}, SHA-256 {file['sha256'][:16]}...)"
        )
    lines += ["LoRAs merged"] if info["loras"] else ["no LoRAs merged"]
    lines += [f"  {lora['path']}, scale {lora['scale']:g}" for lora in info["loras"]]
    return "\n".join(lines)


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _count(number: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def build_parser(prog: str) -> Parser:
    """Return the argument parser of a command with the name `prog`."""
    parser = Parser(
        prog=prog,
        description="Say what a checkpoint holds: parts, dtypes, bytes, sources and LoRAs.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "checkpoint", metavar="NAME or FOLDER", help=f"{', '.join(bundled())}, or a checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str], *, prog: str = "jitjax info") -> int:
    """Run the command, and return the exit status.

    Args:
        arguments: what follows `jitjax info`.
        prog: the name of the command.
    """
    return command.run_report(lambda: _run(arguments, prog), error_prefix=f"{prog}: error: ")


def _run(arguments: Sequence[str], prog: str) -> int:
    args = build_parser(prog).parse_args(arguments)
    info = checkpoint_info(args.checkpoint)
    command.report(json.dumps(info, indent=2) if args.json else text_report(info))
    return 0
