"""Frozen, hashable, validated configurations of the models.

A config holds no arrays. Its annotations give the type and the range of each field. A value of
another type, or out of range, or that does not fit another field, is a `ValueError`; the limits are
far above every FLUX model.
`from_diffusers` reads the dictionary of a JSON file in a diffusers folder. It raises for a setting
that is not implemented, since ignoring one would give a wrong image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

from jitjax.validation import Range, check, check_fields, shown, type_hints

PATCH = 2
"""Latent pixels per side of a patch: FLUX packs 2 x 2 latent pixels into one token."""
EMBEDDING_SCALE = 1000.0
"""Factor by which FLUX multiplies sigma and guidance before embedding them."""


AUTOENCODER_FACTOR = 8
"""Image pixels per latent pixel and side of FLUX.1's autoencoder."""
MAX_LEVELS = 8
"""Largest number of resolutions of an autoencoder; FLUX.1's has 4."""
Count = Annotated[int, Range(1, 1024)]
"""Number of blocks, heads, groups or channels, or the width of a head."""
Width = Annotated[int, Range(1, 2**20)]
"""Width of a layer, or number of entries of a table; FLUX.1's largest is 49408."""
TokenId = Annotated[int, Range(0, 2**20)]
Epsilon = Annotated[float, Range(1e-12, 1)]
Exponent = Annotated[float, Range(-10, 10)]
TokenLimit = Annotated[float, Range(1, math.inf)]
"""`model_max_length` of a tokenizer; transformers writes 10**30 for no limit."""


ConfigT = TypeVar("ConfigT")


def _from_mapping(
    cls: type[ConfigT],
    raw: Mapping[str, Any],
    supported: Mapping[str, Any],
) -> ConfigT:
    """Build `cls` from the dictionary of a diffusers or transformers JSON file.

    Args:
        cls: a config dataclass. Keys that are no fields of it are ignored.
        raw: the dictionary.
        supported: keys of `raw` -> the only value implemented.

    Raises:
        ValueError: values other than the supported ones; all of them in one message. Or a value
            of a wrong type, or out of range.
    """
    unsupported = [
        f"{key} is {shown(raw[key])}, only {value!r} is implemented"
        for key, value in supported.items()
        if key in raw and raw[key] != value
    ]
    if unsupported:
        raise ValueError(f"{cls.__name__}: " + "; ".join(unsupported))
    hints = {name: hint for name, hint in type_hints(cls).items() if name in raw}
    values = {k: check(raw[k], hint, f"{cls.__name__}.{k}") for k, hint in hints.items()}
    return cls(**values)


def _check_levels(channels: tuple[int, ...]) -> None:
    if not 1 <= len(channels) <= MAX_LEVELS:
        raise ValueError(
            f"AutoencoderConfig.block_out_channels has {len(channels)} levels; "
            f"expected 1 to {MAX_LEVELS}"
        )


def _check_in_channels(inputs: int, latents: int) -> None:
    """Raise `ValueError` if the input tokens hold what no FLUX model takes."""
    masks = [(PATCH * 2**level) ** 2 for level in range(MAX_LEVELS)]  # pixels of a token
    if inputs not in (latents, *(2 * latents + mask for mask in (0, *masks))):
        flux = (PATCH * AUTOENCODER_FACTOR) ** 2
        raise ValueError(
            f"TransformerConfig.in_channels is {inputs} and out_channels is {latents}; expected "
            f"in_channels {latents} (latents alone), {2 * latents} (with a control picture) or "
            f"{2 * latents + flux} (with a masked picture and its mask)"
        )


@dataclass(frozen=True)
class TransformerConfig:
    """The FLUX transformer; the defaults are those of FLUX.1-dev.

    Field names are those of diffusers' `transformer/config.json`.

    Attributes:
        in_channels: channels of an input token: those of the latents, and of what conditions them:
            64, 128 (with a control picture) or 384 (with a masked picture and its mask) for FLUX.1.
        out_channels: channels of the latents and of the velocity, per token, 1 to 2**20;
            `in_channels` if it is left out, as in models that take nothing else.
        num_layers: number of double blocks, 1 to 1024.
        num_single_layers: number of single blocks, 1 to 1024.
        attention_head_dim: width of a head, 1 to 1024.
        num_attention_heads: number of heads, 1 to 1024.
        joint_attention_dim: width of the T5 embeddings, 1 to 2**20.
        pooled_projection_dim: width of the CLIP embedding, 1 to 2**20.
        guidance_embeds: whether the model takes a guidance; false for FLUX.1-schnell.
        axes_dims_rope: channels of a head that encode the position's first number, the row and the
            column; 3 even numbers whose sum is `attention_head_dim`.
    """

    in_channels: Width = 64
    out_channels: Width = field(default=cast(int, None))  # set in `__post_init__`
    num_layers: Count = 19
    num_single_layers: Count = 38
    attention_head_dim: Count = 128
    num_attention_heads: Count = 24
    joint_attention_dim: Width = 4096
    pooled_projection_dim: Width = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        check_fields(self)
        _check_in_channels(self.in_channels, self.out_channels)
        if len(self.axes_dims_rope) != 3 or any(d < 0 or d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"TransformerConfig.axes_dims_rope is {shown(self.axes_dims_rope)}; "
                "expected 3 even widths"
            )
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"TransformerConfig.axes_dims_rope {self.axes_dims_rope} sums to "
                f"{sum(self.axes_dims_rope)}; expected attention_head_dim {self.attention_head_dim}"
            )

    @property
    def hidden(self) -> int:
        """Channels of the residual stream."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def control(self) -> Literal["none", "picture", "fill"]:
        """What an input token has in addition to the noisy latents.

        "none"; "picture", the latents of a control picture (FLUX.1 Canny and Depth); or "fill",
        the latents of a masked picture, and its mask (FLUX.1 Fill).
        """
        if self.in_channels == self.out_channels:
            return "none"
        return "fill" if self.mask_channels else "picture"

    @property
    def control_channels(self) -> int:
        """Channels of an input token in addition to the noisy latents."""
        return self.in_channels - self.out_channels

    @property
    def mask_channels(self) -> int:
        """Channels of the mask, the last of an input token: one per pixel, so 16 x 16 for FLUX.1.

        0 if the model takes no mask.
        """
        return max(0, self.in_channels - 2 * self.out_channels)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> TransformerConfig:
        """Build from `transformer/config.json`; unsupported settings raise `ValueError`."""
        if raw.get("out_channels") is None:
            raw = {key: value for key, value in raw.items() if key != "out_channels"}
        # If the file leaves out guidance_embeds, diffusers takes False; FLUX.1-dev has True.
        return _from_mapping(cls, {"guidance_embeds": False, **raw}, {"patch_size": 1})


@dataclass(frozen=True)
class T5Config:
    """The T5 encoder; the defaults are those of T5 v1.1 XXL.

    Field names are those of transformers' `text_encoder_2/config.json`.

    Attributes:
        vocab_size: number of token ids, 1 to 2**20.
        d_model: width of the embeddings, 1 to 2**20.
        d_kv: width of a head, 1 to 1024.
        d_ff: width of the MLP, 1 to 2**20.
        num_layers: number of blocks, 1 to 1024.
        num_heads: number of heads, 1 to 1024.
        relative_attention_num_buckets: number of distances that are told apart, 4 to 2**20.
        relative_attention_max_distance: distance, in tokens, beyond which all are equal; more than
            a quarter of the buckets, at most 2**20.
        layer_norm_epsilon: added to the mean square, 1e-12 to 1.
    """

    vocab_size: Width = 32128
    d_model: Width = 4096
    d_kv: Count = 64
    d_ff: Width = 10240
    num_layers: Count = 24
    num_heads: Count = 64
    relative_attention_num_buckets: Annotated[int, Range(4, 2**20)] = 32
    relative_attention_max_distance: Width = 128
    layer_norm_epsilon: Epsilon = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        exact = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= exact:
            raise ValueError(
                f"T5Config.relative_attention_max_distance is "
                f"{self.relative_attention_max_distance}; expected more than {exact}, a quarter of "
                "relative_attention_num_buckets"
            )

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> T5Config:
        """Build from `text_encoder_2/config.json`; unsupported settings raise `ValueError`."""
        return _from_mapping(cls, raw, {"feed_forward_proj": "gated-gelu"})


@dataclass(frozen=True)
class CLIPConfig:
    """The CLIP text encoder; the defaults are those of CLIP ViT-L/14.

    Field names are those of transformers' `text_encoder/config.json`. Older files have 2 as
    `eos_token_id` by mistake. For this value the highest token id is the end of text, as in
    transformers.

    Attributes:
        vocab_size: number of token ids, 1 to 2**20.
        hidden_size: width of the embeddings, a multiple of `num_attention_heads`, at most 2**20.
        intermediate_size: width of the MLP, 1 to 2**20.
        num_hidden_layers: number of blocks, 1 to 1024.
        num_attention_heads: number of heads, 1 to 1024.
        max_position_embeddings: most token ids of a prompt, 1 to 2**20.
        layer_norm_eps: added to the variance, 1e-12 to 1.
        eos_token_id: id of the end of text, whose embedding is the pooled one, 0 to 2**20.
        hidden_act: activation of the MLP, "quick_gelu" or "gelu".
    """

    vocab_size: Width = 49408
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    max_position_embeddings: Width = 77
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: TokenId = 2
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPConfig.hidden_size is {self.hidden_size}; expected a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(
                f"CLIPConfig.hidden_act is {shown(self.hidden_act)}; "
                "expected 'quick_gelu' or 'gelu'"
            )

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> CLIPConfig:
        """Build from `text_encoder/config.json`, or from that of a whole CLIP.

        Raises:
            ValueError: a setting is not supported.
        """
        if "text_config" in raw:
            raw = check(raw["text_config"], dict[str, Any], f"{cls.__name__}.text_config")
        # transformers leaves out what equals its default: 8 heads, which no shape shows.
        return _from_mapping(cls, {"num_attention_heads": 8, **raw}, {})


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder; the defaults are FLUX's.

    Field names are those of diffusers' `vae/config.json`. The transformer's latents are
    `(mean - shift_factor) * scaling_factor`.

    Attributes:
        in_channels: channels of a picture to encode, 1 to 1024.
        out_channels: channels of a decoded picture, 1 to 1024.
        latent_channels: channels of the latents, 1 to 1024.
        block_out_channels: channels of each resolution, the finest first: 1 to 8 numbers, each a
            multiple of `norm_num_groups`.
        layers_per_block: residual blocks per resolution of the encoder, 1 to 16; the decoder has
            one more.
        norm_num_groups: groups of the group normalisation, 1 to 1024.
        scaling_factor: see above, 1e-6 to 1e6.
        shift_factor: see above, -1e6 to 1e6.
    """

    in_channels: Count = 3
    out_channels: Count = 3
    latent_channels: Count = 16
    block_out_channels: tuple[Width, ...] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Range(1, 16)] = 2
    norm_num_groups: Count = 32
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 0.3611
    shift_factor: Annotated[float, Range(-1e6, 1e6)] = 0.1159

    def __post_init__(self) -> None:
        check_fields(self)
        _check_levels(self.block_out_channels)
        bad = [w for w in self.block_out_channels if w % self.norm_num_groups]
        if bad:
            raise ValueError(
                f"AutoencoderConfig.block_out_channels has {bad}; expected positive multiples of "
                f"norm_num_groups {self.norm_num_groups}"
            )

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, per side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> AutoencoderConfig:
        """Build from `vae/config.json`; unsupported settings raise `ValueError`."""
        # diffusers takes 0.18215 and None for these, which are not FLUX's and give no picture.
        for name in ("scaling_factor", "shift_factor"):
            if name not in raw:
                raise ValueError(
                    f"{cls.__name__}.{name} is missing; expected a number (FLUX.1's is "
                    f"{getattr(cls, name)})"
                )
        name = "block_out_channels"
        channels = raw.get(name, cls.block_out_channels)
        channels = check(channels, type_hints(cls)[name], f"{cls.__name__}.{name}")
        _check_levels(channels)
        levels = len(channels)
        supported = {
            "act_fn": "silu",
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        return _from_mapping(cls, raw, supported)


@dataclass(frozen=True)
class FluxConfig:
    """Configuration of a FLUX pipeline; the defaults are those of FLUX.1-dev.

    The six fields from `dynamic_shift` on are the time shift of the "shifted" schedule, from
    `scheduler/scheduler_config.json`; see `jitjax.sampler.schedule.Shift`.

    Attributes:
        transformer: configuration of the transformer.
        t5: configuration of the T5 encoder.
        clip: configuration of the CLIP text encoder.
        autoencoder: configuration of the autoencoder.
        text_length: number of T5 tokens that every prompt is truncated and padded to, 1 to 8192.
        image_size: default height and width of an image, in pixels, 1 to 8192.
        dynamic_shift: whether the shift depends on the number of image tokens.
        base_shift: dynamic shift at `base_seq` image tokens, -10 to 10; linear in their number.
        max_shift: dynamic shift at `max_seq` image tokens, -10 to 10.
        base_seq: number of image tokens at which the shift is `base_shift`, 1 to 2**20.
        max_seq: number of image tokens at which it is `max_shift`; more than `base_seq`, at most
            2**20.
        shift: shift if `dynamic_shift` is False, 1e-3 to 1e3.
        uses_reference: whether the model is known to be FLUX.1 Kontext, which edits a reference
            picture. Its shapes are FLUX.1-dev's, so False also stands for unknown.

    Raises:
        ValueError: a field has another type, is out of range, or does not fit another.

    Examples:
        >>> config = jitjax.FluxConfig()
        >>> config.transformer.hidden, config.pixels_per_token
        (3072, 16)
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    t5: T5Config = field(default_factory=T5Config)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_length: Annotated[int, Range(1, 8192)] = 512
    image_size: Annotated[int, Range(1, 8192)] = 1024
    dynamic_shift: bool = True
    base_shift: Exponent = 0.5
    max_shift: Exponent = 1.15
    base_seq: Width = 256
    max_seq: Width = 4096
    shift: Annotated[float, Range(1e-3, 1e3)] = 3.0
    uses_reference: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        pixels = self.pixels_per_token**2
        pairs = (
            ("transformer.joint_attention_dim", self.transformer.joint_attention_dim, "t5.d_model",
             self.t5.d_model),
            ("transformer.pooled_projection_dim", self.transformer.pooled_projection_dim,
             "clip.hidden_size", self.clip.hidden_size),
            ("transformer.out_channels", self.transformer.out_channels,
             "autoencoder.latent_channels * 4", self.autoencoder.latent_channels * PATCH**2),
            ("transformer.mask_channels", self.transformer.mask_channels or pixels,
             "pixels_per_token ** 2", pixels),
        )  # fmt: skip
        for name, got, other, expected in pairs:
            if got != expected:
                raise ValueError(f"FluxConfig: {name} is {got}; expected {other} = {expected}")
        if self.max_seq <= self.base_seq:
            raise ValueError(
                f"FluxConfig.max_seq is {self.max_seq}; expected more than base_seq {self.base_seq}"
            )

    @property
    def pixels_per_token(self) -> int:
        """Image pixels per token, per side (16 for FLUX)."""
        return self.autoencoder.factor * PATCH
