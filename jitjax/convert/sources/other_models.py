"""Names what is known but not read: quantised files, low-rank updates, other models, pipelines.

Each is recognised by tensor names, shapes and dtypes, so that its message is one line that says
what the file is and what to do, and no list of keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from ..tables.engine import Shape

ADVICE = (
    "expected FLUX.1-dev, -schnell, -Fill, -Canny, -Depth or -Kontext, or a model finetuned from "
    "one of them"
)
OTHER_FORMAT = "expected a file in bfloat16, float16, float32, fp8 or GGUF"
LORA_NAME = re.compile(
    r"\blora_[AB]\b|\blora_(up|down)\b|\blora\.(up|down)\b|\blokr_w|\bhada_w|\bdora_scale\b"
    r"|_lora\d?\.(up|down)\b|lora_magnitude_vector"
)


class StoredTensor(Protocol):
    """What is needed of a tensor: its shape, and the name of the dtype that it is stored in."""

    @property
    def shape(self) -> Shape: ...
    @property
    def kind(self) -> str: ...


QUANTISED = (
    (r"\.quant_state\.bitsandbytes__(nf4|fp4)$", "quantised by bitsandbytes ({0})"),
    (r"\.(absmax|quant_map)$", "quantised by bitsandbytes to 4 bits"),
    (r"\.SCB$", "quantised by bitsandbytes (int8)"),
    (r"\.(wscales|wzeros|smooth_factor|smooth_factor_orig|wcscales|wtscale)$",
     "quantised by nunchaku (SVDQuant, int4 or fp4)"),
    (r"\.(qzeros|g_idx|scales_and_zeros)$", "quantised to 4 bits (GPTQ or AWQ)"),
    (r"\.qweight$", "quantised (nunchaku, GPTQ or AWQ)"),
    (r"\.weight\._(data|scale|shift)$|\.weight_qtype$", "quantised by quanto"),
    (r"(\.|_)(qdata|int_data)$|\.tensor_impl\b|layout_tensor", "quantised by torchao"),
    (r"\.weight_scale_inv$", "block-wise fp8 (one scale per block of a matrix)"),
    (r"\.weight_scale_2$", "NVFP4 (packed 4-bit floats)"),
)  # fmt: skip
"""Pattern of a tensor name -> how the file is quantised."""

OTHER_MODELS = (
    # adapters of FLUX
    (r"^controlnet_|\bcontrolnet_(blocks|single_blocks|x_embedder|mode_embedder)\.|^control_model\."
     r"|\binput_hint_block\.|\bpos_embed_input\.|controlnet_cond_embedding|^control_(layers|all_x)",
     "a ControlNet, which steers by an image and is not implemented"),
    (r"\bredux_(up|down)\.", "FLUX.1-Redux, an adapter for image prompts that is not implemented"),
    (r"\bip_adapter|^image_proj\.|\bpulid_",
     "an adapter for image prompts (IP-Adapter or PuLID), which is not implemented"),
    # relatives of FLUX.1
    (r"\bdistilled_guidance_layer\.", "Chroma, which is not FLUX.1 and not implemented"),
    (r"\b(single_stream_modulation|double_stream_modulation_(img|txt))\.",
     "FLUX.2, which is not FLUX.1 and not implemented"),
    (r"\bearly_stream_modulations\.|\bref_time_in\.",
     "FLUX.3, which is not FLUX.1 and not implemented"),
    # other families
    (r"\bconditioner\.embedders\.|^add_embedding\.linear_1\.|\blabel_emb\.0\.0\.",
     "Stable Diffusion XL, not FLUX"),
    (r"\bjoint_blocks\.\d+\.|^pos_embed\.proj\.", "Stable Diffusion 3, PixArt or a relative, not "
     "FLUX"),
    (r"\binput_blocks\.\d+\.\d+\.|^(down|up)_blocks\.\d+\.(attentions|resnets)\.|"
     r"\bcond_stage_model\.", "Stable Diffusion (a U-Net), not FLUX"),
    (r"\btransformer_blocks\.\d+\.(img|txt)_mod\.1\.", "Qwen-Image, not FLUX"),
    (r"\bindividual_token_refiner\b", "HunyuanVideo, not FLUX"),
    (r"\bpatchify_proj\.|\bscale_shift_table$", "LTX-Video or PixArt, not FLUX"),
    (r"\bhead\.modulation$|\bvace_blocks\.", "Wan, not FLUX"),
    (r"\bcap_embedder\.", "Lumina or Z-Image, not FLUX"),
    (r"\bdouble_layers\.\d+\.", "AuraFlow, not FLUX"),
    (r"\bdouble_stream_blocks\.\d+\.", "HiDream, not FLUX"),
    (r"^(vision_model|visual_projection)\.", "an image encoder; FLUX needs CLIP's text model"),
    (r"\btransformer\.resblocks\.\d+\.", "CLIP in OpenAI's names; expected CLIP ViT-L/14 in "
     "transformers' names (clip_l.safetensors, or text_encoder/ of FLUX.1)"),
    (r"DenseReluDense\.wi\.weight$", "T5 version 1.0; FLUX needs T5 v1.1 XXL (t5xxl)"),
    (r"^(encoder|decoder)\.layers\.\d+\.(weight|conv)|^taesd_", "a tiny autoencoder (TAESD), not "
     "FLUX's autoencoder (ae.safetensors)"),
    (r"^model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.|^blk\.\d+\.attn_q\.",
     "a language model, not FLUX"),
)  # fmt: skip
"""Pattern of a tensor name -> what model the file is."""

_QUANTISED = [(re.compile(pattern), what) for pattern, what in QUANTISED]
_OTHER_MODELS = [(re.compile(pattern), what) for pattern, what in OTHER_MODELS]


def explain_format(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Say in what unsupported way weights are stored, and what to do; None if it is supported.

    Args:
        tensors: name -> tensor of a file.
    """
    match = next(
        (
            (m, what)
            for pattern, what in _QUANTISED
            for name in tensors
            if (m := pattern.search(name))
        ),
        None,
    )
    if match:
        found, what = match
        return f"{what.format(*(g.upper() for g in found.groups(default='')))}; {OTHER_FORMAT}"
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    for name, tensor in weights.items():
        base = name.removesuffix("weight")
        scale = tensors.get(f"{base}weight_scale") or tensors.get(f"{base}scale_weight")
        if scale is not None and tensor.kind.startswith("F8"):
            if scale.kind in ("U8", "F8_E8M0"):
                return f"MXFP8 (fp8 with a power of two per block); {OTHER_FORMAT}"
            size = 1
            for n in scale.shape:
                size *= n
            if size not in (1, *tensor.shape[:1]):
                return (
                    f"block-wise fp8 ({name} {list(tensor.shape)} has scales of shape "
                    f"{list(scale.shape)}; expected one, or one per row); {OTHER_FORMAT}"
                )
        elif tensor.kind in ("I8", "U8", "I4", "U4", "F4", "F4_E2M1", "F4_E2M1FN_X2"):
            kind = "int8" if tensor.kind == "I8" else f"packed ({tensor.kind})"
            return f"quantised: {name} is {kind}; {OTHER_FORMAT}"
    return None


def explain_model(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Say what model or adapter a file is that is not implemented, and what to do; else None.

    Args:
        tensors: name -> tensor of a file.
    """
    lora = [name for name in tensors if LORA_NAME.search(name)]
    if len(lora) > len(tensors) / 2:
        return (
            "a low-rank update (LoRA), not a model; expected a model as SOURCE, and this file as "
            "--lora FILE[:SCALE]"
        )
    whole_clip = any("text_model." in n or "token_embedding" in n for n in tensors)
    for pattern, what in _OTHER_MODELS:
        if any(pattern.search(name) for name in tensors) and not (
            whole_clip and what.startswith("an image encoder")
        ):
            return what if "expected" in what or "needs" in what else f"{what}; {ADVICE}"
    return None


def explain_pipeline(class_name: object) -> str | None:
    """Say what a pipeline of diffusers is that is not implemented, and what to do; else None.

    Args:
        class_name: `_class_name` in `model_index.json`.
    """
    if not isinstance(class_name, str):
        return None
    for prefix, what in (
        ("FluxControlNet", "FLUX with a ControlNet, which needs an image and is not implemented"),
        ("FluxPriorRedux", "FLUX.1-Redux, an adapter for image prompts that is not implemented"),
        ("Flux2", "FLUX.2, which is not FLUX.1 and not implemented"),
        ("Flux3", "FLUX.3, which is not FLUX.1 and not implemented"),
        ("Flux", "a variant of FLUX's pipeline that is not implemented"),
        ("Chroma", "Chroma, which is not FLUX.1 and not implemented"),
        ("StableDiffusionXL", "Stable Diffusion XL, not FLUX"),
        ("StableDiffusion3", "Stable Diffusion 3, not FLUX"),
        ("StableDiffusion", "Stable Diffusion, not FLUX"),
        ("", "another model than FLUX"),
    ):
        if class_name.startswith(prefix):
            return f"{what}; {ADVICE}"
    return None


def first_names(names: Iterable[str], limit: int = 5) -> str:
    """Return the first few names, sorted, and how many there are besides."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "(none)") + more
