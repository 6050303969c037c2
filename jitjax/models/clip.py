"""The CLIP text encoder, which gives FLUX one vector per prompt.

    ids [b, l] -> embedding + positions -> causal blocks x layers -> layer norm -> hidden [b, l, d]
                                                          at the end-of-text token -> pooled [b, d]

Radford et al., 2021 (arXiv 2103.00020). The numbers are those of `CLIPTextModel` in transformers 5.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jitjax.config import CLIPConfig


def activation(x: Float[Array, "b l d"], name: str) -> Float[Array, "b l d"]:
    """`"quick_gelu"`: x sigmoid(1.702 x), CLIP's own; `"gelu"`: the exact one."""
    return x * jax.nn.sigmoid(1.702 * x) if name == "quick_gelu" else jax.nn.gelu(x, False)


def layer_norm(config: CLIPConfig, dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm with the two-pass variance: E[x^2] - E[x]^2 loses digits if the mean is large."""
    return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class SelfAttention(nn.Module):
    """Causal attention, with biases."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        heads = (3, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        qkv = nn.DenseGeneral(heads, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        x = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        x = x.reshape(*x.shape[:2], c.hidden_size)
        return nn.Dense(c.hidden_size, dtype=self.dtype, name="out")(x)


class MLP(nn.Module):
    """Two layers with the config's activation between."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        x = nn.Dense(c.intermediate_size, dtype=self.dtype, name="up")(x)
        x = activation(x, c.hidden_act)
        return nn.Dense(c.hidden_size, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    """Attention, then the MLP; each on a normed copy, each added to the stream."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> tuple[Float[Array, "b l d"], None]:
        c = self.config
        normed = layer_norm(c, self.dtype, "attention_norm")(x)
        x = x + SelfAttention(c, self.dtype, name="attention")(normed)
        normed = layer_norm(c, self.dtype, "mlp_norm")(x)
        x = x + MLP(c, self.dtype, name="mlp")(normed)
        return x, None  # (carry, output) as `nn.scan` wants it


def end_of_text(ids: Int[Array, "b l"], eos_token_id: int) -> Int[Array, " b"]:
    """Position of the token that stands for the whole text.

    The first `eos_token_id`, or the first token if there is none. The id 2 is what old configs
    hold by mistake (FLUX's among them): it means the highest id, which is the end of text in CLIP's
    own vocabulary.
    """
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)


class CLIPText(nn.Module):
    """The text tower, without projection.

    Attributes:
        config: sizes, activation and the end-of-text id.
        dtype: dtype of the computation; norms and softmax are float32 in any case.
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
            pooled: [b, hidden_size], `hidden` at the end of text.

        Raises:
            ValueError: more ids than there are positions.
        """
        c = self.config
        length = ids.shape[1]
        if length > c.max_position_embeddings:
            raise ValueError(
                f"CLIPText: {length} ids per text, expected at most "
                f"max_position_embeddings = {c.max_position_embeddings}"
            )
        embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="token_embedding")
        position = nn.Embed(
            c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        x = embed(ids) + position(jnp.arange(length))[None]
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
        )
        x, _ = stack(c, self.dtype, name="blocks")(x)
        hidden = layer_norm(c, self.dtype, "final_norm")(x)
        at = end_of_text(ids, c.eos_token_id)
        pooled = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        return hidden, pooled


def abstract_params(config: CLIPConfig, dtype: Any = jnp.float32) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s of `dtype`; nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(CLIPText(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
