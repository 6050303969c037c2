"""The CLIP text encoder, from which FLUX takes one pooled vector per prompt.

    ids [b, l] -> embedding + positions -> causal blocks x layers -> layer norm -> hidden [b, l, d]
                                                          at the end-of-text token -> pooled [b, d]

Source: Radford et al., 2021 (arXiv 2103.00020). Reference: transformers 5 `CLIPTextModel`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jitjax.config import CLIPConfig
from jitjax.models.linen import Dense, DenseGeneral, Embed, LayerNorm, scan_blocks


def activation(x: Float[Array, "b l d"], name: str) -> Float[Array, "b l d"]:
    """Apply `"quick_gelu"`, CLIP's approximation x sigmoid(1.702 x), or the exact `"gelu"`."""
    return x * jax.nn.sigmoid(1.702 * x) if name == "quick_gelu" else jax.nn.gelu(x, False)


def layer_norm(config: CLIPConfig, dtype: Any, name: str) -> LayerNorm:
    """Layer norm with a two-pass variance; E[x^2] - E[x]^2 cancels if the mean is large."""
    return LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class SelfAttention(nn.Module):
    """Causal multi-head attention; the projections have biases."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        features = (3, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        qkv = DenseGeneral(features, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        x = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        x = x.reshape(*x.shape[:2], c.hidden_size)
        return Dense(c.hidden_size, dtype=self.dtype, name="out")(x)


class MLP(nn.Module):
    """Two linear layers, `up` and `down`, with `config.hidden_act` between them."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        x = Dense(c.intermediate_size, dtype=self.dtype, name="up")(x)
        x = activation(x, c.hidden_act)
        return Dense(c.hidden_size, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MLP, each added to the residual stream."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> tuple[Float[Array, "b l d"], None]:
        c = self.config
        normed = layer_norm(c, self.dtype, "attention_norm")(x)
        x = x + SelfAttention(c, self.dtype, name="attention")(normed)
        normed = layer_norm(c, self.dtype, "mlp_norm")(x)
        x = x + MLP(c, self.dtype, name="mlp")(normed)
        return x, None  # `nn.scan` expects (carry, output).


def end_of_text(ids: Int[Array, "b l"], eos_token_id: int) -> Int[Array, " b"]:
    """Return the index of the token whose hidden state is the pooled output.

    It is the first `eos_token_id`, or token 0 if there is none. Older configs, FLUX's among them,
    have 2 as `eos_token_id` by mistake. For them it is the highest id of the text, which is the
    end-of-text token in CLIP's vocabulary.

    Args:
        ids: [b, l] token ids.
        eos_token_id: `CLIPConfig.eos_token_id`.

    Returns:
        [b] indices into the l tokens.
    """
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)


class CLIPText(nn.Module):
    """CLIP's text encoder, without the text projection.

    Attributes:
        config: sizes, activation and the end-of-text id.
        dtype: dtype of the computation; norms and softmax are float32 for every dtype.
    """

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"]) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
        """Encode token ids.

        Args:
            ids: [b, l] token ids, l at most `max_position_embeddings`.

        Returns:
            hidden: [b, l, hidden_size], after the final norm.
            pooled: [b, hidden_size], `hidden` at the end-of-text token.

        Raises:
            ValueError: l is above `max_position_embeddings`.
        """
        c = self.config
        length = ids.shape[1]
        if length > c.max_position_embeddings:
            raise ValueError(
                f"CLIPText: ids has {length} tokens per prompt; expected at most "
                f"max_position_embeddings = {c.max_position_embeddings}"
            )
        embed_token = Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="token_embedding")
        embed_position = Embed(
            c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        x = embed_token(ids) + embed_position(jnp.arange(length))[None]
        blocks = scan_blocks(Block, c.num_hidden_layers, 0, "clip/blocks")
        x, _ = blocks(c, self.dtype, name="blocks")(x)
        hidden = layer_norm(c, self.dtype, "final_norm")(x)
        end = end_of_text(ids, c.eos_token_id)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        return hidden, pooled
