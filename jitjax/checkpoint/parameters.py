"""The parameters of a pipeline, and the names of their parts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.config import FluxConfig
from jitjax.models import param_shapes
from jitjax.models.quantised import is_quantised, quantise_tree

PARTS = ("transformer", "t5", "clip", "autoencoder")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_ENCODERS = ("t5", "clip")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class FluxParams:
    """All parameters of a FLUX pipeline: a pytree of arrays, with the configuration as static data.

    Two `FluxParams` are equal if they are the same object (`jax.tree.map` compares values). `repr`
    is a summary, which copies nothing from the devices.

    Attributes:
        transformer: nested dictionaries of arrays, with the blocks stacked along the first axis;
            empty if the part is not loaded. Quantised kernels are
            `jitjax.models.quantised.Quantised`, a pytree of two arrays.
        t5: those of the T5 encoder.
        clip: those of the CLIP text encoder.
        autoencoder: those of the autoencoder; no stacks.
        config: configuration of all parts, including those that are not loaded.
        tokenizer: path of the folder with `tokenizer/` (CLIP) and `tokenizer_2/` (T5); "" if there
            is none.
    """

    transformer: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    autoencoder: dict[str, Any]
    config: FluxConfig = dataclasses.field(metadata={"static": True})
    tokenizer: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        parts = [f"{name}={_summary(tree)}" for name in PARTS if (tree := getattr(self, name))]
        config = self.config
        if isinstance(config, FluxConfig):
            blocks = (config.transformer.num_layers, config.transformer.num_single_layers)
            parts.append(
                f"config=({blocks[0]} + {blocks[1]} blocks of width {config.transformer.hidden}, "
                f"{config.text_length} text tokens, {config.image_size} px)"
            )
        return f"FluxParams({', '.join(parts)})"

    def part(self, name: str) -> dict[str, Any]:
        """Return the parameters of one part.

        Args:
            name: "transformer", "t5", "clip" or "autoencoder".

        Returns:
            Nested dictionaries of arrays, the same object as the attribute of that name.

        Raises:
            ValueError: the part is not loaded.
        """
        params = getattr(self, name)
        if not params:
            available = [part for part in PARTS if getattr(self, part)]
            hint = ", or pass a Conditioning instead of the prompt" if name in TEXT_ENCODERS else ""
            raise ValueError(
                f"these parameters have no {name}, only {', '.join(available)}; "
                f"load or convert a checkpoint that has {name}{hint}"
            )
        return params


def _summary(tree: Any) -> str:
    """Describe a tree of arrays by dtypes, sizes and bytes; only shapes and dtypes are read."""
    count = size = 0
    dtypes = set()
    for leaf in jax.tree.leaves(tree, is_leaf=is_quantised):
        if is_quantised(leaf):
            count, size = count + leaf.size, size + leaf.nbytes
            dtypes.add(leaf.kind)
        elif hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            n = math.prod(leaf.shape)
            count, size = count + n, size + n * leaf.dtype.itemsize
            dtypes.add(str(leaf.dtype))
    if not dtypes:
        return "no arrays"
    return f"{_short(count)} {'/'.join(sorted(dtypes))} ({_short(size)}B)"


def _short(number: int) -> str:
    """Return a number with three digits and a decimal prefix, such as "11.9 G"."""
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number} "


def abstract_params(
    config: FluxConfig, dtype: DTypeLike = jnp.float32, quantise: str | None = None
) -> FluxParams:
    """Return the parameters of `config` as `jax.ShapeDtypeStruct`s, without allocating arrays.

    Args:
        config: configuration of the pipeline.
        dtype: dtype of all arrays that are not quantised.
        quantise: what the weights are quantised to, as for `jitjax.load`; None for no quantisation.

    Raises:
        ValueError: `quantise` is unknown, or does not fit a layer.
    """
    params = FluxParams(
        transformer=param_shapes.transformer(config.transformer, dtype),
        t5=param_shapes.t5(config.t5, dtype),
        clip=param_shapes.clip(config.clip, dtype),
        autoencoder=param_shapes.autoencoder(config.autoencoder, dtype),
        config=config,
        tokenizer="",
    )
    return params if quantise is None else quantise_params(params, quantise)


def quantise_params(params: FluxParams, kind: str) -> FluxParams:
    """Quantise the projections in the blocks of the transformer and of T5.

    `jitjax.load(..., quantise=kind)` does the same while it reads, in less memory.

    Args:
        params: parameters of arrays, or of `jax.ShapeDtypeStruct`s; not changed.
        kind: "int8", "int4" or "float8"; see `jitjax.models.quantised`.

    Returns:
        Parameters with a `Quantised` for each of these kernels. Those that already are of this kind
        stay as they are, as do all other arrays.

    Raises:
        ValueError: `kind` is unknown, does not fit a layer, or weights are quantised to another.

    Examples:
        >>> params = jitjax.load("tiny", parts=("transformer",))
        >>> size = lambda params: sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        >>> round(size(params) / size(jitjax.quantise_params(params, "int8")), 1)
        3.3
    """
    trees = {part: quantise_tree(part, getattr(params, part), kind) for part in PARTS}
    return dataclasses.replace(params, **trees)
