"""Rule table of the transformer: diffusers tensor names -> paths in our parameter tree.

The table is a plain list of `Rule`s. To see where a tensor goes, search for its name here.
"""

from __future__ import annotations

from jitjax.config import TransformerConfig

from .engine import Rule

Source = str | tuple[str, ...]

IMAGE_WEIGHT = "x_embedder.weight"
"""The weight that takes the tokens of the image."""

TRANSFORMER_IGNORED: tuple[str, ...] = ()
"""Tensors of a transformer file that need no rule."""


TRANSFORMER_ALIASES: dict[str, str | None] = {
    # ComfyUI saves the original release's norms under torch's name since February 2026.
    r"^(double_blocks\.\d+\.(?:img|txt)_attn\.norm\.(?:query|key)_norm)\.weight$": r"\1.scale",
    r"^(single_blocks\.\d+\.norm\.(?:query|key)_norm)\.weight$": r"\1.scale",
}
"""Regular expression for an alias -> replacement; see `text.canonical_names`."""


def linear(target: str, source: Source, blocks: int | None = None) -> list[Rule]:
    """Return the rules for kernel and bias of one linear layer; several sources are fused.

    The transform `flat` reshapes the bias to the output axes of the layer.
    """
    sources = (source,) if isinstance(source, str) else source
    kernel, bias = ("linear", "flat") if len(sources) == 1 else ("fused", "fused_bias")
    weights, biases = (tuple(f"{s}.{part}" for s in sources) for part in ("weight", "bias"))
    return [
        Rule(f"{target}/kernel", weights, kernel, blocks),
        Rule(f"{target}/bias", biases, bias, blocks),
    ]


def scale(target: str, source: str, blocks: int | None = None) -> Rule:
    """Return the rule for the weight of an RMSNorm."""
    return Rule(f"{target}/scale", (f"{source}.weight",), "same", blocks)


def transformer_rules(config: TransformerConfig) -> list[Rule]:
    """Return the rules from diffusers `FluxTransformer2DModel` to `models.flux.FluxTransformer`."""
    double, single = config.num_layers, config.num_single_layers
    embed, d, s = "time_text_embed", "transformer_blocks.{i}", "single_transformer_blocks.{i}"
    guidance = [
        *linear("guidance_in/up", f"{embed}.guidance_embedder.linear_1"),
        *linear("guidance_in/down", f"{embed}.guidance_embedder.linear_2"),
    ]
    return [
        *linear("image_in", "x_embedder"),
        *linear("text_in", "context_embedder"),
        *linear("sigma_in/up", f"{embed}.timestep_embedder.linear_1"),
        *linear("sigma_in/down", f"{embed}.timestep_embedder.linear_2"),
        *linear("pooled_in/up", f"{embed}.text_embedder.linear_1"),
        *linear("pooled_in/down", f"{embed}.text_embedder.linear_2"),
        *(guidance if config.guidance_embeds else []),
        # image stream of the double blocks
        *linear("double_blocks/image_modulation", f"{d}.norm1.linear", double),
        *linear(
            "double_blocks/image_attention/qkv",
            (f"{d}.attn.to_q", f"{d}.attn.to_k", f"{d}.attn.to_v"),
            double,
        ),
        scale("double_blocks/image_attention/query_norm", f"{d}.attn.norm_q", double),
        scale("double_blocks/image_attention/key_norm", f"{d}.attn.norm_k", double),
        *linear("double_blocks/image_attention_out", f"{d}.attn.to_out.0", double),
        *linear("double_blocks/image_mlp/up", f"{d}.ff.net.0.proj", double),
        *linear("double_blocks/image_mlp/down", f"{d}.ff.net.2", double),
        # text stream of the double blocks
        *linear("double_blocks/text_modulation", f"{d}.norm1_context.linear", double),
        *linear(
            "double_blocks/text_attention/qkv",
            (f"{d}.attn.add_q_proj", f"{d}.attn.add_k_proj", f"{d}.attn.add_v_proj"),
            double,
        ),
        scale("double_blocks/text_attention/query_norm", f"{d}.attn.norm_added_q", double),
        scale("double_blocks/text_attention/key_norm", f"{d}.attn.norm_added_k", double),
        *linear("double_blocks/text_attention_out", f"{d}.attn.to_add_out", double),
        *linear("double_blocks/text_mlp/up", f"{d}.ff_context.net.0.proj", double),
        *linear("double_blocks/text_mlp/down", f"{d}.ff_context.net.2", double),
        # single blocks
        *linear("single_blocks/modulation", f"{s}.norm.linear", single),
        *linear(
            "single_blocks/attention/qkv",
            (f"{s}.attn.to_q", f"{s}.attn.to_k", f"{s}.attn.to_v"),
            single,
        ),
        scale("single_blocks/attention/query_norm", f"{s}.attn.norm_q", single),
        scale("single_blocks/attention/key_norm", f"{s}.attn.norm_k", single),
        *linear("single_blocks/mlp_up", f"{s}.proj_mlp", single),
        *linear("single_blocks/out", f"{s}.proj_out", single),
        # output
        *linear("final_modulation", "norm_out.linear"),
        *linear("image_out", "proj_out"),
    ]
