"""What all models take from Flax: its layers, and scans over blocks.

Parameters come from checkpoints. `init` draws as PyTorch does by default, since other distributions
take longer to trace, and Flax traces the initializers whenever a model is traced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn

_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Conv = partial(nn.Conv, kernel_init=_uniform)
Dense = partial(nn.Dense, kernel_init=_uniform)
DenseGeneral = partial(nn.DenseGeneral, kernel_init=_uniform)


def scan_blocks(block: type[nn.Module], length: int, constants: int = 0) -> Any:
    """Chain `length` blocks, with their parameters stacked along a leading axis.

    Args:
        block: a module whose call returns its new input and None, as `nn.scan` expects.
        length: number of blocks.
        constants: number of further arguments, which are the same for all blocks.
    """
    in_axes: Any = (nn.broadcast,) * constants
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        check_constancy_invariants=False,  # would trace the block twice
    )
