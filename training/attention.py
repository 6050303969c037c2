"""FLUX attention written out, for training on a CPU.

PyTorch's fused attention is slow backwards on a CPU where sequences are short: 3 times slower than
two matrix products and a compiled softmax at 112 tokens, equal at 1072. Parameters and result are
the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, tokens, heads, width].

    Tables [tokens, width], or [batch * tokens, width] where each picture has its own positions.
    """
    cos, sin = (table.unflatten(0, (-1, x.shape[1]))[:, :, None] for table in (cos, sin))
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


class PlainAttention:
    """A processor for diffusers' FluxAttention, double and single blocks."""

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
            parts = F.linear(x, weight, bias).chunk(3, dim=-1)
            parts = [part.unflatten(-1, (attn.heads, -1)) for part in parts]
            return norm_q(parts[0]), norm_k(parts[1]), parts[2]

        q, k, v = project(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if text:
            added = project(
                encoder_hidden_states,
                attn.add_q_proj,
                attn.add_k_proj,
                attn.add_v_proj,
                attn.norm_added_q,
                attn.norm_added_k,
            )
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(added, (q, k, v), strict=True))
        q, k = rotate(q, *image_rotary_emb), rotate(k, *image_rotary_emb)
        q, k, v = ((x.to(v.dtype)).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        weights = (q @ k.transpose(-1, -2)).float().softmax(-1).to(v.dtype)
        out = (weights @ v).transpose(1, 2).flatten(2)
        if not text:
            return out
        return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])
