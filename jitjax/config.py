"""Frozen, hashable configurations: every static fact about a model or a plan, validated here.

A config never holds arrays. `from_diffusers` reads the JSON dictionaries of a diffusers folder; a
setting that this project does not implement raises instead of being passed over, because a
silently ignored setting is a wrong picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

PATCH = 2
"""Latent pixels per side of a token (FLUX packs 2 x 2 latent pixels into one token)."""


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{type(owner).__name__}.{name} is {value!r}; expected a positive integer"
            )


C = TypeVar("C")


def _from_mapping(
    cls: type[C], raw: Mapping[str, Any], renames: Mapping[str, str], fixed: Mapping[str, Any]
) -> C:
    """Build `cls` from a diffusers/transformers dictionary.

    `renames` maps their names to ours; `fixed` gives settings with the only value implemented
    here. All settings that differ from it are reported in one error.
    """
    wrong = [
        f"{key} is {raw[key]!r}, only {value!r} is implemented"
        for key, value in fixed.items()
        if key in raw and raw[key] != value
    ]
    if wrong:
        raise ValueError(f"{cls.__name__}: " + "; ".join(wrong))
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = renames.get(key, key)
        if name in names and value is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


@dataclass(frozen=True)
class TransformerConfig:
    """FLUX transformer; the defaults are FLUX.1-dev (diffusers `transformer/config.json`)."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        _positive(self, "in_channels", "num_layers", "num_single_layers", "attention_head_dim")
        _positive(self, "num_attention_heads", "joint_attention_dim", "pooled_projection_dim")
        if len(self.axes_dims_rope) != 3 or any(d < 0 or d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"TransformerConfig.axes_dims_rope is {self.axes_dims_rope}; expected 3 even widths"
            )
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"TransformerConfig.axes_dims_rope {self.axes_dims_rope} sums to "
                f"{sum(self.axes_dims_rope)}; expected attention_head_dim {self.attention_head_dim}"
            )

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.attention_head_dim * self.num_attention_heads

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> TransformerConfig:
        """Read `transformer/config.json`. Raises `ValueError` for what is not implemented."""
        out = raw.get("out_channels")
        if out is not None and out != raw.get("in_channels", 64):
            raise ValueError(
                f"TransformerConfig: out_channels is {out}, expected in_channels "
                f"({raw.get('in_channels', 64)})"
            )
        # diffusers' own default for a setting that the file leaves out differs from FLUX.1-dev's.
        return _from_mapping(cls, {"guidance_embeds": False, **raw}, {}, {"patch_size": 1})


@dataclass(frozen=True)
class T5Config:
    """T5 encoder; the defaults are T5 v1.1 XXL (`text_encoder_2/config.json`)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        _positive(self, "relative_attention_num_buckets", "relative_attention_max_distance")

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> T5Config:
        """Read `text_encoder_2/config.json`. Raises `ValueError` for what is not implemented."""
        return _from_mapping(cls, raw, {}, {"feed_forward_proj": "gated-gelu"})


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP text encoder; the defaults are CLIP ViT-L/14 (`text_encoder/config.json`).

    `eos_token_id` 2 is the value that old configs carry by mistake; transformers then takes the
    highest token id as the end of text, and so does this project.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _positive(self, "num_attention_heads", "max_position_embeddings")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPConfig.hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(
                f"CLIPConfig.hidden_act is {self.hidden_act!r}; expected 'quick_gelu' or 'gelu'"
            )

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> CLIPConfig:
        """Read `text_encoder/config.json`. Raises `ValueError` for what is not implemented."""
        return _from_mapping(cls, raw, {}, {})


@dataclass(frozen=True)
class AutoencoderConfig:
    """KL autoencoder; the defaults are FLUX's (`vae/config.json`).

    Model latents are `(z - shift_factor) * scaling_factor`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        _positive(self, "in_channels", "out_channels", "latent_channels", "layers_per_block")
        _positive(self, "norm_num_groups")
        if not self.block_out_channels:
            raise ValueError("AutoencoderConfig.block_out_channels is empty; expected widths")
        bad = [w for w in self.block_out_channels if w < 1 or w % self.norm_num_groups]
        if bad:
            raise ValueError(
                f"AutoencoderConfig.block_out_channels has {bad}, not a multiple of "
                f"norm_num_groups {self.norm_num_groups}"
            )
        if not self.scaling_factor > 0:
            raise ValueError(
                f"AutoencoderConfig.scaling_factor is {self.scaling_factor}; expected > 0"
            )

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, per side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> AutoencoderConfig:
        """Read `vae/config.json`. Raises `ValueError` for what is not implemented."""
        levels = len(raw.get("block_out_channels", (0,) * 4))
        fixed = {
            "act_fn": "silu",
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        return _from_mapping(cls, raw, {}, fixed)


@dataclass(frozen=True)
class FluxConfig:
    """All static facts of one FLUX pipeline. The defaults are FLUX.1-dev.

    `text_length` is the number of T5 tokens every prompt is padded to; `image_size` the side, in
    pixels, of a picture whose size nobody said. `shift` holds the
    resolution-dependent time shift of dense plans (`scheduler/scheduler_config.json`):
    `base_shift` at `base_seq` image tokens to `max_shift` at `max_seq`, linear between.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    t5: T5Config = field(default_factory=T5Config)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_length: int = 512
    image_size: int = 1024
    dynamic_shift: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_seq: int = 256
    max_seq: int = 4096
    shift: float = 3.0

    def __post_init__(self) -> None:
        _positive(self, "text_length", "image_size", "base_seq", "max_seq")
        pairs = (
            ("transformer.joint_attention_dim", self.transformer.joint_attention_dim, "t5.d_model",
             self.t5.d_model),
            ("transformer.pooled_projection_dim", self.transformer.pooled_projection_dim,
             "clip.hidden_size", self.clip.hidden_size),
            ("transformer.in_channels", self.transformer.in_channels,
             "autoencoder.latent_channels * 4", self.autoencoder.latent_channels * PATCH**2),
        )  # fmt: skip
        for name, got, other, expected in pairs:
            if got != expected:
                raise ValueError(f"FluxConfig: {name} is {got}, expected {other} = {expected}")
        if self.max_seq <= self.base_seq:
            raise ValueError(
                f"FluxConfig.max_seq {self.max_seq} must be above base_seq {self.base_seq}"
            )

    @property
    def pixels_per_token(self) -> int:
        """Image pixels per token, per side (16 for FLUX)."""
        return self.autoencoder.factor * PATCH
