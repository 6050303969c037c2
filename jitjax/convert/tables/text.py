"""Rule tables of the two text encoders: transformers tensor names -> paths in our parameter trees.

Canonical names are those of the published FLUX files. transformers 5 writes other names: its
`CLIPTextModel` omits the prefix `text_model.`, and a T5 file may contain either of the two tied
names. llama.cpp has names of its own for T5. `*_ALIASES` map these names to the canonical ones;
`canonical_names` applies them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jitjax.config import CLIPConfig, T5Config

from .engine import Rule

Aliases = Mapping[str, str | None]
"""Regular expression for an alias -> replacement that gives the canonical name; None passes the
tensor over."""

T5_ALIASES: dict[str, str | None] = {
    # Decoder and output layer of a whole T5.
    r"^(decoder|lm_head|dec)\.|^output\.weight$": None,
    r"^encoder\.embed_tokens\.weight$": "shared.weight",
    # llama.cpp's names, in GGUF files (gguf-py's `TensorNameMap` of the architecture t5encoder).
    r"^token_embd\.": "shared.",
    r"^enc\.output_norm\.": "encoder.final_layer_norm.",
    r"^enc\.blk\.(\d+)\.attn_norm\.": r"encoder.block.\1.layer.0.layer_norm.",
    r"^enc\.blk\.(\d+)\.attn_rel_b\.": (
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."
    ),
    r"^enc\.blk\.(\d+)\.attn_([qkvo])\.": r"encoder.block.\1.layer.0.SelfAttention.\2.",
    r"^enc\.blk\.(\d+)\.ffn_norm\.": r"encoder.block.\1.layer.1.layer_norm.",
    r"^enc\.blk\.(\d+)\.ffn_gate\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.",
    r"^enc\.blk\.(\d+)\.ffn_up\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.",
    r"^enc\.blk\.(\d+)\.ffn_down\.": r"encoder.block.\1.layer.1.DenseReluDense.wo.",
}

T5_IGNORED: tuple[str, ...] = ("encoder.embed_tokens.weight",)
"""Tensors that need no rule: the copy of `shared.weight`, if a file has both."""

CLIP_ALIASES: dict[str, str | None] = {
    # The image encoder of a whole CLIP; projections and temperature of its loss. FLUX uses the
    # pooled state before the projection.
    r"^(vision_model|visual_projection)\.|^text_projection(\.weight)?$|^logit_scale$": None,
    r"^(embeddings|encoder|final_layer_norm)\.": r"text_model.\1.",
}

CLIP_IGNORED: tuple[str, ...] = ("text_model.embeddings.position_ids",)
"""Tensors that need no rule: the position ids 0, 1, 2, ... in files of old versions."""


def canonical_names(names: Iterable[str], aliases: Aliases) -> dict[str, str]:
    """Return canonical name -> name in the file, for every tensor that is not passed over.

    If a file has a tensor under both its canonical name and an alias, the alias keeps its own
    name. `check_keys` then either ignores it or reports it.

    Args:
        names: the tensor names of the file.
        aliases: for example `CLIP_ALIASES`.
    """
    names = set(names)
    passed_over = [re.compile(pattern) for pattern, name in aliases.items() if name is None]
    renames = [(re.compile(p), name) for p, name in aliases.items() if name is not None]
    out: dict[str, str] = {}
    for name in sorted(names):
        if any(pattern.search(name) for pattern in passed_over):
            continue
        canonical = name
        for pattern, replacement in renames:
            canonical = pattern.sub(replacement, canonical)
        out[name if canonical in names or canonical in out else canonical] = name
    return out


def t5_rules(config: T5Config) -> list[Rule]:
    """Return the rules from transformers `T5EncoderModel` to `models.t5.T5Encoder`."""
    layers = config.num_layers
    attention, mlp = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    q, k, v, out = (f"{attention}.SelfAttention.{name}.weight" for name in "qkvo")
    dense = f"{mlp}.DenseReluDense"
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        Rule("token_embedding/embedding", ("shared.weight",)),
        Rule("relative_bias/embedding", (bias,)),
        Rule("blocks/attention_norm/scale", (f"{attention}.layer_norm.weight",), "same", layers),
        Rule("blocks/attention/qkv/kernel", (q, k, v), "fused", layers),
        Rule("blocks/attention/out/kernel", (out,), "linear", layers),
        Rule("blocks/mlp_norm/scale", (f"{mlp}.layer_norm.weight",), "same", layers),
        Rule(
            "blocks/mlp/gate_up/kernel",
            (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"),
            "fused",
            layers,
        ),
        Rule("blocks/mlp/down/kernel", (f"{dense}.wo.weight",), "linear", layers),
        Rule("final_norm/scale", ("encoder.final_layer_norm.weight",)),
    ]


def clip_rules(config: CLIPConfig) -> list[Rule]:
    """Return the rules from transformers `CLIPTextModel` to `models.clip.CLIPText`."""
    layers = config.num_hidden_layers
    block = "text_model.encoder.layers.{i}"
    attention = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
    embeddings = "text_model.embeddings"

    def norm(target: str, source: str, blocks: int | None = None) -> list[Rule]:
        return [
            Rule(f"{target}/scale", (f"{source}.weight",), "same", blocks),
            Rule(f"{target}/bias", (f"{source}.bias",), "same", blocks),
        ]

    def linear(target: str, source: str) -> list[Rule]:
        return [
            Rule(f"blocks/{target}/kernel", (f"{block}.{source}.weight",), "linear", layers),
            Rule(f"blocks/{target}/bias", (f"{block}.{source}.bias",), "same", layers),
        ]

    return [
        Rule("token_embedding/embedding", (f"{embeddings}.token_embedding.weight",)),
        Rule("position_embedding/embedding", (f"{embeddings}.position_embedding.weight",)),
        *norm("blocks/attention_norm", f"{block}.layer_norm1", layers),
        Rule(
            "blocks/attention/qkv/kernel", tuple(f"{s}.weight" for s in attention), "fused", layers
        ),
        Rule(
            "blocks/attention/qkv/bias", tuple(f"{s}.bias" for s in attention), "fused_bias", layers
        ),
        *linear("attention/out", "self_attn.out_proj"),
        *norm("blocks/mlp_norm", f"{block}.layer_norm2", layers),
        *linear("mlp/up", "mlp.fc1"),
        *linear("mlp/down", "mlp.fc2"),
        *norm("final_norm", "text_model.final_layer_norm"),
    ]
