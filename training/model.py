"""The models of the tiny FLUX pipeline, built from classes of diffusers and transformers."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.attention import PlainAttention
from training.autoencoder import CONFIG as AUTOENCODER
from training.common import RUNS, load_or_none
from training.make_tokenizers import token_ids

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


class TinyFlux(nn.Module):
    """The transformer and both text encoders, without the autoencoder.

    Args:
        tokenizers: folder with `tokenizer` and `tokenizer_2`.
    """

    def __init__(self, tokenizers=RUNS / "tokenizers"):
        super().__init__()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2")
        self.transformer = FluxTransformer2DModel(**TRANSFORMER)
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer),
                hidden_size=64,
                intermediate_size=160,
                projection_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=self.clip_tokenizer.model_max_length,
                hidden_act="quick_gelu",
                bos_token_id=self.clip_tokenizer.bos_token_id,
                eos_token_id=self.clip_tokenizer.eos_token_id,
                pad_token_id=self.clip_tokenizer.pad_token_id,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=96,
                d_kv=24,
                d_ff=192,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                tie_word_embeddings=True,
                pad_token_id=self.t5_tokenizer.pad_token_id,
                eos_token_id=self.t5_tokenizer.eos_token_id,
            )
        )
        self.zero_initialise()
        self.transformer.set_attn_processor(PlainAttention())

    def zero_initialise(self) -> None:
        """Initialise adaLN and the output layer with zeros, so that each block is the identity."""
        for name, module in self.transformer.named_modules():
            is_output = name == "proj_out" or name.startswith("norm_out.")
            if isinstance(module, nn.Linear) and (is_output or ".norm" in name):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(
        self, texts: list[str], length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts as FluxPipeline does.

        Args:
            texts: the prompts.
            length: number of T5 states to keep; None keeps all 48. A caption of one shape has at
                most 15 tokens, and the padding after them would be two fifths of all tokens at
                128 px.

        Returns:
            T5 states [batch, length, 96], and CLIP's pooled output [batch, 64].
        """
        ids = token_ids(self.clip_tokenizer, texts)
        # CLIP's attention is causal: tokens after the first end token do not change the output.
        length_needed = (ids != self.clip_tokenizer.eos_token_id).sum(dim=1).max() + 1
        pooled = self.clip(ids[:, :length_needed]).pooler_output
        return self.t5(token_ids(self.t5_tokenizer, texts))[0][:, :length], pooled

    def forward(self, x, sigma, guidance, states, pooled, ids) -> torch.Tensor:
        """Predict the velocity.

        Args:
            x: noisy tokens [batch, tokens, 64].
            sigma: noise levels [batch].
            guidance: guidance scales [batch].
            states: T5 states [batch, length, 96].
            pooled: CLIP's pooled output [batch, 64].
            ids: positions [tokens, 3], or [batch, tokens, 3] for one set per image.

        Returns:
            The velocity [batch, tokens, 64].
        """
        if ids.ndim == 3:
            # diffusers accepts ids of one image only: concatenate all; `rotate` splits them again.
            ids = torch.nn.functional.pad(ids, (0, 0, states.shape[1], 0)).flatten(0, 1)
        text_ids = torch.zeros(0 if ids.shape[0] > x.shape[1] else states.shape[1], 3)
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]


def positions(rows: int, columns: int, stride: int = 1) -> torch.Tensor:
    """Return image ids (0, row, column): float32 [rows * columns, 3].

    With `stride` s each token has the mean position of the s x s tokens that cover the same area in
    an image s times as large, so that training on small images teaches the layout of large ones.
    """
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = (torch.arange(rows) * stride + (stride - 1) / 2)[:, None]
    ids[..., 2] = (torch.arange(columns) * stride + (stride - 1) / 2)[None, :]
    return ids.reshape(-1, 3)


def pack(z: torch.Tensor) -> torch.Tensor:
    """Convert latents [batch, 16, 2 r, 2 c] to tokens [batch, r * c, 64].

    A token lists its 2 x 2 latents in the order (channel, row, column).
    """
    b, c, h, w = z.shape
    z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, h // 2 * (w // 2), c * 4)


def unpack(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Convert tokens of a `rows` x `columns` grid to latents; the inverse of `pack`."""
    b, _, d = x.shape
    x = x.view(b, rows, columns, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, d // 4, rows * 2, columns * 2)


def load_autoencoder(path=RUNS / "autoencoder.pt", side: int | None = None) -> AutoencoderKL:
    """Load the trained autoencoder with averaged weights; its config has the latents' statistics.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
    """
    checkpoint = load_or_none(path)
    if checkpoint is None:
        raise FileNotFoundError(f"no checkpoint at {path}; run python -m training.autoencoder")
    vae = AutoencoderKL(**AUTOENCODER)
    vae.load_state_dict(checkpoint["average"])
    if "shift" in checkpoint:
        vae.register_to_config(shift_factor=checkpoint["shift"], scaling_factor=checkpoint["scale"])
    return vae.eval().requires_grad_(False)
