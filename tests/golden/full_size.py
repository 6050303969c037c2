"""Writes `full_size.json`: names, shapes and dtypes of the published FLUX.1 files.

    python tests/golden/full_size.py        needs torch and diffusers; no weights

The names of diffusers and transformers come from their own classes, instantiated on torch's meta
device from the published configurations below. The names of the original release are written here
from its description, independently of `jitjax/convert/original.py`. Names that differ only in a
layer's number are folded into one pattern.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def diffusers_files() -> dict[str, tuple[str, dict[str, list[int]]]]:
    """Return the dtype and the shapes of each file in the diffusers folders, by title."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        models = {
            "dev diffusers transformer": FluxTransformer2DModel(**DEV),
            "canny diffusers transformer": FluxTransformer2DModel(
                **DEV | {"in_channels": 128, "out_channels": 64}
            ),
            "fill diffusers transformer": FluxTransformer2DModel(
                **DEV | {"in_channels": 384, "out_channels": 64}
            ),
            "schnell diffusers transformer": FluxTransformer2DModel(
                **DEV | {"guidance_embeds": False}
            ),
            "diffusers autoencoder": AutoencoderKL(**VAE),
            "T5 encoder": T5EncoderModel(T5Config(**T5)),
            "CLIP text model": CLIPTextModel(CLIPTextConfig(**CLIP)),
        }
    files = {}
    for title, model in models.items():
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        if title.startswith("CLIP"):  # the published file's prefix, which transformers 5 drops
            shapes = {
                f"text_model.{name.removeprefix('text_model.')}": shape
                for name, shape in shapes.items()
            }
        if title.startswith("T5"):  # the published file has one of the two tied names
            shapes.pop("encoder.embed_tokens.weight", None)
        files[title] = ("BF16", shapes)
    return files


def linear(name: str, out_features: int, in_features: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [out_features, in_features], f"{name}.bias": [out_features]}


def original_transformer(guidance: bool, in_channels: int = 64) -> dict[str, list[int]]:
    """Return the shapes in a file of the original release.

    flux1-dev.safetensors and flux1-kontext-dev.safetensors have guidance, flux1-schnell.safetensors
    has none; flux1-canny-dev.safetensors and flux1-depth-dev.safetensors take 128 channels, and
    flux1-fill-dev.safetensors takes 384.
    """
    h, shapes = 3072, {}
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        if guidance or name != "guidance_in":
            shapes |= linear(f"{name}.in_layer", h, width) | linear(f"{name}.out_layer", h, h)
    shapes |= linear("img_in", h, in_channels) | linear("txt_in", h, 4096)
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= linear(f"{block}_mod.lin", 6 * h, h) | linear(f"{block}_attn.qkv", 3 * h, h)
            for norm in ("query_norm", "key_norm"):
                shapes[f"{block}_attn.norm.{norm}.scale"] = [128]
            shapes |= linear(f"{block}_attn.proj", h, h) | linear(f"{block}_mlp.0", 4 * h, h)
            shapes |= linear(f"{block}_mlp.2", h, 4 * h)
    for i in range(38):
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.linear1", 7 * h, h) | linear(f"{block}.linear2", h, 5 * h)
        shapes |= linear(f"{block}.modulation.lin", 3 * h, h)
        for norm in ("query_norm", "key_norm"):
            shapes[f"{block}.norm.{norm}.scale"] = [128]
    return (
        shapes
        | linear("final_layer.adaLN_modulation.1", 2 * h, h)
        | linear("final_layer.linear", 64, h)
    )


def control_lora() -> dict[str, list[int]]:
    """Return the shapes in flux1-canny-dev-lora.safetensors and flux1-depth-dev-lora.safetensors.

    Every linear layer has an update of rank 128 with a bias; the norms are whole.
    """
    shapes = {}
    for name, shape in original_transformer(True, 128).items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale":
            shapes[name] = shape
        elif kind == "weight":
            shapes[f"{layer}.lora_A.weight"] = [128, shape[1]]
            shapes[f"{layer}.lora_B.weight"] = [shape[0], 128]
            shapes[f"{layer}.lora_B.bias"] = [shape[0]]
    return shapes


def original_autoencoder() -> dict[str, list[int]]:
    """Return the shapes in ae.safetensors."""
    shapes: dict[str, list[int]] = {}

    def conv(name: str, out_channels: int, in_channels: int, side: int = 3) -> None:
        shapes[f"{name}.weight"] = [out_channels, in_channels, side, side]
        shapes[f"{name}.bias"] = [out_channels]

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [channels]

    def resnet(name: str, in_channels: int, out_channels: int) -> None:
        norm(f"{name}.norm1", in_channels)
        conv(f"{name}.conv1", out_channels, in_channels)
        norm(f"{name}.norm2", out_channels)
        conv(f"{name}.conv2", out_channels, out_channels)
        if in_channels != out_channels:
            conv(f"{name}.nin_shortcut", out_channels, in_channels, 1)

    widths = (128, 256, 512, 512)
    for model in ("encoder", "decoder"):
        for block in ("block_1", "block_2"):
            resnet(f"{model}.mid.{block}", 512, 512)
        norm(f"{model}.mid.attn_1.norm", 512)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{model}.mid.attn_1.{layer}", 512, 512, 1)
        norm(f"{model}.norm_out", 512 if model == "encoder" else 128)
    conv("encoder.conv_in", 128, 3)
    conv("encoder.conv_out", 32, 512)
    conv("decoder.conv_in", 512, 16)
    conv("decoder.conv_out", 3, 128)
    channels = 128
    for i, width in enumerate(widths):
        for j in range(2):
            resnet(f"encoder.down.{i}.block.{j}", channels, width)
            channels = width
        if i < 3:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(3):
            resnet(f"decoder.up.{i}.block.{j}", channels, width)
            channels = width
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    return shapes


def fold(shapes: dict[str, list[int]]) -> dict[str, dict[str, list]]:
    """Replace the first number of each name by "{i}": {pattern: {shape: numbers}}."""
    folded: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for name, shape in shapes.items():
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if match is None else name[: match.start()] + "{i}" + name[match.end() :]
        folded[pattern][str(shape)].append(None if match is None else int(match[0]))
    return {pattern: dict(by_shape) for pattern, by_shape in folded.items()}


def unfold(folded: dict[str, dict[str, list]]) -> dict[str, tuple[int, ...]]:
    """Invert `fold`: return the shape of each name."""
    return {
        pattern if number is None else pattern.replace("{i}", str(number)): tuple(json.loads(shape))
        for pattern, by_shape in folded.items()
        for shape, numbers in by_shape.items()
        for number in numbers
    }


def main() -> None:
    files = diffusers_files() | {
        "dev original transformer": ("BF16", original_transformer(True)),
        "schnell original transformer": ("BF16", original_transformer(False)),
        "canny original transformer": ("BF16", original_transformer(True, 128)),
        "fill original transformer": ("BF16", original_transformer(True, 384)),
        "control LoRA": ("BF16", control_lora()),
        "original autoencoder": ("F32", original_autoencoder()),
    }
    content = {}
    for title, (dtype, shapes) in files.items():
        tensors = fold(shapes)
        assert unfold(tensors) == {name: tuple(shape) for name, shape in shapes.items()}, title
        content[title] = {"dtype": dtype, "tensors": tensors}
    path = Path(__file__).with_name("full_size.json")
    path.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
