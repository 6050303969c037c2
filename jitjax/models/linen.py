"""What all models take from Flax: its layers, and scans over blocks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jitjax.models import quantised
from jitjax.models.partitioning import gather_block


class GivenParams:
    """Makes a Flax module take parameters as they are given.

    Flax traces the initializer of each parameter whenever a model is traced, to compare shapes.
    That takes a third of the time, and loading has compared them. `init` is as in Flax.
    """

    def param(self: Any, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the parameter `name`, initialised with `init_fn` if it is not given."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return super().param(name, init_fn, *args, **kwargs)  # type: ignore[misc]


class Conv(GivenParams, nn.Conv):
    """`nn.Conv` with given parameters."""


class Dense(GivenParams, nn.Dense):
    """`nn.Dense` with given parameters, of which the kernel may be quantised."""

    promote_dtype: Any = quantised.promote
    dot_general: Any = quantised.product


class DenseGeneral(GivenParams, nn.DenseGeneral):
    """`nn.DenseGeneral` with given parameters, of which the kernel may be quantised."""

    promote_dtype: Any = quantised.promote
    dot_general: Any = quantised.product


class Embed(GivenParams, nn.Embed):
    """`nn.Embed` with given parameters."""


class GroupNorm(GivenParams, nn.GroupNorm):
    """`nn.GroupNorm` with given parameters."""


class LayerNorm(GivenParams, nn.LayerNorm):
    """`nn.LayerNorm` with given parameters."""


class RMSNorm(GivenParams, nn.RMSNorm):
    """`nn.RMSNorm` with given parameters."""


def scan_blocks(block: type[nn.Module], length: int, constants: int, path: str) -> Any:
    """Chain `length` blocks, with their parameters stacked along a leading axis.

    Args:
        block: a module whose call returns its new input and None, as `nn.scan` expects.
        length: number of blocks.
        constants: number of further arguments, which are the same for all blocks.
        path: path of the stack in `FluxParams`, such as "t5/blocks".
    """
    in_axes: Any = (nn.broadcast,) * constants
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        check_constancy_invariants=False,  # would trace the block twice
        data_transform=gather_block(path),
    )
