"""Writes `full_size.json`: names, shapes and dtypes of the published FLUX.1 files.

    python tests/golden/full_size.py        needs torch and diffusers; no weights

diffusers' and transformers' names come from their own classes, built without memory from the
published configurations below. The original release's names are written here from its description
and share nothing with `convert/tables/original.py`. Numbered names are folded into patterns.
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


def by_classes() -> dict[str, tuple[str, dict[str, list[int]]]]:
    """dtype and shapes of the files in the diffusers folders."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        models = {
            "dev diffusers transformer": FluxTransformer2DModel(**DEV),
            "schnell diffusers transformer": FluxTransformer2DModel(
                **DEV | {"guidance_embeds": False}
            ),
            "diffusers autoencoder": AutoencoderKL(**VAE),
            "T5 encoder": T5EncoderModel(T5Config(**T5)),
            "CLIP text model": CLIPTextModel(CLIPTextConfig(**CLIP)),
        }
    found = {}
    for title, model in models.items():
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        if title.startswith("CLIP"):  # the published file's prefix, which transformers 5 drops
            shapes = {f"text_model.{n.removeprefix('text_model.')}": s for n, s in shapes.items()}
        if title.startswith("T5"):  # the published file holds one of the two tied names
            shapes = {n: s for n, s in shapes.items() if n != "encoder.embed_tokens.weight"}
        found[title] = ("BF16", shapes)
    return found


def layer(name: str, out: int, into: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [out, into], f"{name}.bias": [out]}


def original_transformer(guidance: bool) -> dict[str, list[int]]:
    """flux1-dev.safetensors and flux1-schnell.safetensors."""
    h, found = 3072, {}
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        if guidance or name != "guidance_in":
            found |= layer(f"{name}.in_layer", h, width) | layer(f"{name}.out_layer", h, h)
    found |= layer("img_in", h, 64) | layer("txt_in", h, 4096)
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            found |= layer(f"{block}_mod.lin", 6 * h, h) | layer(f"{block}_attn.qkv", 3 * h, h)
            for norm in ("query_norm", "key_norm"):
                found[f"{block}_attn.norm.{norm}.scale"] = [128]
            found |= layer(f"{block}_attn.proj", h, h) | layer(f"{block}_mlp.0", 4 * h, h)
            found |= layer(f"{block}_mlp.2", h, 4 * h)
    for i in range(38):
        block = f"single_blocks.{i}"
        found |= layer(f"{block}.linear1", 7 * h, h) | layer(f"{block}.linear2", h, 5 * h)
        found |= layer(f"{block}.modulation.lin", 3 * h, h)
        for norm in ("query_norm", "key_norm"):
            found[f"{block}.norm.{norm}.scale"] = [128]
    return (
        found
        | layer("final_layer.adaLN_modulation.1", 2 * h, h)
        | layer("final_layer.linear", 64, h)
    )


def original_autoencoder() -> dict[str, list[int]]:
    """ae.safetensors."""
    found: dict[str, list[int]] = {}

    def conv(name: str, out: int, into: int, side: int = 3) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = [out, into, side, side], [out]

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = [width]

    def resnet(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    widths = (128, 256, 512, 512)
    for half in ("encoder", "decoder"):
        for block in ("block_1", "block_2"):
            resnet(f"{half}.mid.{block}", 512, 512)
        norm(f"{half}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{part}", 512, 512, 1)
        norm(f"{half}.norm_out", 512 if half == "encoder" else 128)
    conv("encoder.conv_in", 128, 3)
    conv("encoder.conv_out", 32, 512)
    conv("decoder.conv_in", 512, 16)
    conv("decoder.conv_out", 3, 128)
    into = 128
    for i, width in enumerate(widths):
        for j in range(2):
            resnet(f"encoder.down.{i}.block.{j}", into, width)
            into = width
        if i < 3:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(3):
            resnet(f"decoder.up.{i}.block.{j}", into, width)
            into = width
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    return found


def fold(shapes: dict[str, list[int]]) -> dict[str, dict[str, list]]:
    """Names with their first number as {i}: {pattern: {shape: numbers}}."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for name, shape in shapes.items():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else name[: number.start()] + "{i}" + name[number.end() :]
        found[pattern][str(shape)].append(None if number is None else int(number[0]))
    return {pattern: dict(by_shape) for pattern, by_shape in found.items()}


def unfold(folded: dict[str, dict[str, list]]) -> dict[str, tuple[int, ...]]:
    """The inverse of `fold`."""
    return {
        pattern if number is None else pattern.replace("{i}", str(number)): tuple(json.loads(shape))
        for pattern, by_shape in folded.items()
        for shape, numbers in by_shape.items()
        for number in numbers
    }


def main() -> None:
    lists = by_classes() | {
        "dev original transformer": ("BF16", original_transformer(True)),
        "schnell original transformer": ("BF16", original_transformer(False)),
        "original autoencoder": ("F32", original_autoencoder()),
    }
    out = {}
    for title, (dtype, shapes) in lists.items():
        out[title] = {"dtype": dtype, "tensors": fold(shapes)}
        assert unfold(out[title]["tensors"]) == {n: tuple(s) for n, s in shapes.items()}, title
    path = Path(__file__).with_name("full_size.json")
    path.write_text(json.dumps(out, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
