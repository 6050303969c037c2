"""FLUX attention without PyTorch's fused kernel, for training on a CPU.

The backward pass of the fused kernel is slow on a CPU for short sequences: 3 times slower than two
matrix products and a compiled softmax at 112 tokens, equally fast at 1072. Parameters and results
are those of diffusers' processor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding.

    Args:
        x: queries or keys [batch, tokens, heads, width].
        cos: table [tokens, width], or [batch * tokens, width] if each image has its own positions.
        sin: table of the same shape.

    Returns:
        The rotated `x`, in its dtype.
    """
    cos, sin = (table.unflatten(0, (-1, x.shape[1]))[:, :, None] for table in (cos, sin))
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x.float() * cos + rotated * sin).to(x.dtype)


class PlainAttention:
    """An attention processor for diffusers' FluxAttention, for double and single blocks."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        def project(x, q, k, v, norm_q, norm_k):
            weight = torch.cat((q.weight, k.weight, v.weight))
            bias = torch.cat((q.bias, k.bias, v.bias))
            qkv = F.linear(x, weight, bias).chunk(3, dim=-1)
            qkv = [part.unflatten(-1, (attn.heads, -1)) for part in qkv]
            return norm_q(qkv[0]), norm_k(qkv[1]), qkv[2]

        q, k, v = project(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if text_tokens:
            text_qkv = project(
                encoder_hidden_states,
                attn.add_q_proj,
                attn.add_k_proj,
                attn.add_v_proj,
                attn.norm_added_q,
                attn.norm_added_k,
            )
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text_qkv, (q, k, v), strict=True))
        q, k = rotate(q, *image_rotary_emb), rotate(k, *image_rotary_emb)
        q, k, v = ((x.to(v.dtype)).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        attention_weights = (q @ k.transpose(-1, -2)).float().softmax(-1).to(v.dtype)
        output = (attention_weights @ v).transpose(1, 2).flatten(2)
        if not text_tokens:
            return output
        return attn.to_out[0](output[:, text_tokens:]), attn.to_add_out(output[:, :text_tokens])
