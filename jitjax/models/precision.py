"""The dtype of what is sensitive to rounding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """Return float64 if `dtype` is float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)
