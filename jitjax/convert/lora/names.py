"""Names in LoRA files: the layer and the kind of each tensor.

    diffusers, PEFT   transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    original names    diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight
    kohya, OneTrainer lora_unet_double_blocks_0_img_attn_qkv.alpha
    LyCORIS           lycoris_single_transformer_blocks_0_attn_to_q.lokr_w1
    XLabs             double_blocks.0.processor.qkv_lora1.down.weight
    text encoders     text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.diff_b

A fused layer of the original release (`qkv`, `linear1`) is several layers in diffusers; the table
that splits its weight also splits its update.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jitjax.config import FluxConfig

from ..components import component_of
from ..original import Rows, autoencoder_parts, transformer_parts
from ..tables.engine import Shape
from ..tables.transformer import IMAGE_WEIGHT

ORIGINAL = {"transformer": transformer_parts, "autoencoder": autoencoder_parts}
PREFIXES = (
    ("transformer", ("transformer.", "diffusion_model.", "model.diffusion_model.", "unet.",
                     "lora_unet_", "lora_transformer_", "lycoris_", "")),
    ("clip", ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer.",
              "lora_te1_", "lora_te_", "")),
    ("t5", ("text_encoder_2.", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.",
            "lora_te2_", "lora_te3_", "")),
)  # fmt: skip
"""(model, possible prefixes of a layer's name)."""
BARE = {
    "transformer": r"(double|single)_blocks[._]|(single_)?transformer_blocks"
    r"|(x|context)_embedder|(img|txt|time|vector|guidance)_in|time_text_embed"
    r"|(norm|proj)_out|final_layer[._]",
    "clip": r"text_model|encoder[._]layers|embeddings|final_layer_norm",
    "t5": r"encoder[._](block|final_layer_norm|embed_tokens)|shared",
}
"""model -> beginning of a layer's name without prefix; used if the model is not loaded."""
UNUSED = {"clip": ("text_projection", "text_model.text_projection")}
"""model -> layers that FLUX does not use, though files have updates of them."""
WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:base_model\.model|_orig_mod|module)\.")
"""What PEFT, `torch.compile` and `DistributedDataParallel` insert into names."""

# The name of a PEFT adapter may follow the kind.
_ADAPTER = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"
SUFFIXES = tuple(
    (re.compile(rf"(?P<layer>.+?)(?:{pattern})"), kind)
    for pattern, kind in (
        (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "A"),
        (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "B"),
        (rf"\.lora_B{_ADAPTER}\.bias", "B bias"),
        (r"(?:\.lora_down|\.lora\.down|\.lora_linear_layer\.down|\.down)\.weight", "A"),
        (r"(?:\.lora_up|\.lora\.up|\.lora_linear_layer\.up|\.up)\.weight", "B"),
        (r"\.lora_up\.bias", "B bias"),
        (rf"\.lora_embedding_A{_ADAPTER}", "embedding A"),
        (rf"\.lora_embedding_B{_ADAPTER}", "embedding B"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
        (r"\.dora_scale", "magnitude"),
        (r"\.alpha", "alpha"),
        *((rf"\.{kind}{_ADAPTER}", kind) for kind in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
        )),
        (r"\.diff|\.w_norm", "difference"),
        (r"\.diff_b|\.b_norm", "bias difference"),
        (rf"(?:\.base_layer|\.modules_to_save{_ADAPTER})?\.weight|\.scale", "weight"),
        (rf"(?:\.base_layer|\.modules_to_save{_ADAPTER})?\.bias", "bias"),
    )
)  # fmt: skip
"""(pattern of a tensor's name, what the tensor is)."""

OTHER_KINDS = (
    (r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)$", "a Tucker decomposition of a convolution"),
    (r"\.(oft_\w+|boft_\w+)(\.\w+)?$", "OFT"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "GLoRA"),
    (r"\.(on_input|ia3_l(\.\w+)?)$", "IA3"),
    (r"\.vera_lambda_[bd]", "VeRA"),
    (r"\.(set_weight|reshape_weight)$", "ComfyUI's patch of whole weights"),
    (r"ip_adapter", "an IP-Adapter"),
    (r"controlnet", "a ControlNet"),
)
"""(pattern of a tensor's name, kind of adapter that is not implemented)."""
OTHER_MODELS = (
    (r"(down|up|input|output)_blocks|mid_block|middle_block", "Stable Diffusion 1, 2 or XL"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"(double|single)_stream_modulation|to_qkv_mlp_proj|transformer_blocks\W\d+\Wff\.linear_in",
     "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)", "Qwen-Image"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn", "Wan"),
    (r"(^|[._])layers[._]\d+[._]attention", "Lumina or Z-Image"),
)  # fmt: skip
"""(pattern in a layer's name, model that has such layers)."""


@dataclass(frozen=True)
class Layer:
    """A layer that an update may name.

    Attributes:
        shape: shape of its weight: [out, in] of a matrix, [width] of a norm.
        weights: (diffusers name, rows of the layer's weight) of each diffusers weight in it; the
            rows are None for all rows.
        biases: the same of its bias; empty if it has none.
        narrow: number of columns, the first ones, that an update may have instead of all: one of a
            model that takes latents alone leaves the weights of a control picture as they are.
    """

    shape: Shape
    weights: tuple[tuple[str, Rows | None], ...]
    biases: tuple[tuple[str, Rows | None], ...]
    narrow: int | None = None


@dataclass(frozen=True)
class Key:
    """A tensor's name in a file, taken apart.

    Attributes:
        layer: name of the layer, with its prefix.
        kind: what the tensor is, a kind of `SUFFIXES`.
        adapter: name of the PEFT adapter; None if the name has none.
    """

    layer: str
    kind: str
    adapter: str | None


def parse_key(key: str) -> Key | None:
    """Take a tensor's name apart; None if its suffix is unknown."""
    for pattern, kind in SUFFIXES:
        if match := pattern.fullmatch(key):
            return Key(match["layer"], kind, match.groupdict().get("adapter"))
    return None


@functools.lru_cache(8)  # the shapes of a model take some tenths of a second
def layers_by_name(model: str, config: FluxConfig) -> Mapping[str, Layer]:
    """Return all layers of a model under diffusers and original names, with dots or underscores.

    Args:
        model: name of the model, a field of `FluxParams`.
        config: the pipeline's configuration.
    """
    model_config = getattr(config, model)
    shapes = component_of(model).source_shapes(model_config)
    sources: dict[str, list[tuple[str, Rows | None]]] = {name: [(name, None)] for name in shapes}
    originals: dict[str, list[tuple[str, Rows | None]]] = defaultdict(list)
    for name, part in (ORIGINAL[model](model_config) if model in ORIGINAL else {}).items():
        originals[part.source].append((name, part.rows))
    sources |= originals
    layers: dict[str, Layer] = {}
    for source, parts in sources.items():
        stem, _, kind = source.rpartition(".")
        if kind not in ("weight", "scale") or len(shapes[parts[0][0]]) > 2:
            continue
        rows = sum(shapes[name][0] for name, _ in parts)
        shape = (rows, *shapes[parts[0][0]][1:])
        narrow = model_config.out_channels if parts[0][0] == IMAGE_WEIGHT else None
        layer = Layer(shape, tuple(parts), tuple(sources.get(f"{stem}.bias", ())), narrow)
        layers[stem] = layer
        if kind == "scale":  # ComfyUI appends its suffixes to the whole name of a scale
            layers[source] = layer
    if model == "transformer":
        layers |= _xlabs_layers(layers, config)
    if model == "clip":  # transformers 5.6 and newer omit the prefix
        layers |= {n.removeprefix("text_model."): layer for n, layer in layers.items()}
    if model == "t5":
        layers["encoder.embed_tokens"] = layers["shared"]
    return layers | {name.replace(".", "_"): layer for name, layer in layers.items()}


def _xlabs_layers(layers: Mapping[str, Layer], config: FluxConfig) -> dict[str, Layer]:
    """Return the layers under XLabs' names: attention processors, 1 of the image, 2 of the text."""
    out = {}
    for i in range(config.transformer.num_layers):
        block = f"double_blocks.{i}"
        for number, stream in ((1, "img"), (2, "txt")):
            out[f"{block}.processor.qkv_lora{number}"] = layers[f"{block}.{stream}_attn.qkv"]
            out[f"{block}.processor.proj_lora{number}"] = layers[f"{block}.{stream}_attn.proj"]
    for i in range(config.transformer.num_single_layers):
        block = f"single_blocks.{i}"
        linear1 = layers[f"{block}.linear1"]  # q, k, v, and the MLP, which XLabs does not update
        shape = (3 * config.transformer.hidden, linear1.shape[1])
        out[f"{block}.processor.qkv_lora"] = Layer(shape, linear1.weights[:3], linear1.biases[:3])
        out[f"{block}.processor.proj_lora"] = layers[f"{block}.linear2"]
    return out


def match_layer(
    name: str, layers: Mapping[str, Mapping[str, Layer]]
) -> tuple[str, str, Layer | None] | None:
    """Find the layer that a name in a file stands for.

    Args:
        name: name of a layer, with its prefix.
        layers: model -> layer name -> layer, of the loaded models.

    Returns:
        (model, name of the layer without prefix, layer). The layer is None if its model is not
        loaded or does not use it. None if the name is unknown.
    """
    name = WRAPPERS.sub("", name)
    candidates = [
        (model, prefix, name.removeprefix(prefix))
        for model, prefixes in PREFIXES
        for prefix in prefixes
        if name.startswith(prefix)
    ]
    for model, _, rest in candidates:
        if model in layers and rest in layers[model]:
            return model, rest, layers[model][rest]
    for model, prefix, rest in candidates:
        unused = UNUSED.get(model, ())
        if any(rest in (layer, layer.replace(".", "_")) for layer in unused):
            return model, rest, None
        if model not in layers and (prefix or re.match(BARE[model], rest)):
            return model, rest, None
    return None
