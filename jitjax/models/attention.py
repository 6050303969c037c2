"""Multi-head attention by several implementations, and the choice of one by platform.

| name | where | padding | derivatives |
|---|---|---|---|
| "xla" | everywhere | anywhere | all |
| "cudnn" | NVIDIA GPUs from Ampere on; bfloat16, float16 | last | reverse mode |
| "pallas" | TPUs | anywhere | reverse mode |
| "auto" | the fastest of these that can run | last | all: they are computed by "xla" |

`tokamax` has more kernels, but needs newer versions of Python and JAX than this project does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jitjax.models.partitioning import over_heads
from jitjax.models.precision import at_least_float32

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
"""Values that `implementation` of `attend` may have."""
LOGITS_BYTES = 2**27
"""Most bytes of float32 logits that the "xla" implementation holds at a time on an accelerator."""
AMPERE = 8.0
"""Compute capability of the first NVIDIA GPUs on which cuDNN has flash attention."""
CPU_QUERIES = 512
"""Most queries whose logits, for one head, are held at a time on a CPU.

The logits of a block stay in the cache between the two products: at 4608 tokens that takes 0.6 of
the time of all queries at once. The results are the same, since rows are independent.
"""
PALLAS_BLOCK = 512
"""Most queries, and most keys, in a block of the TPU kernel; a multiple of 128."""

Attend = Callable[[Array, Array, Array, Array | None], Array]
"""Query, key, value and mask to the result, with the shapes of `attend`."""


def check_implementation(name: str) -> str:
    """Return the name of an implementation, or raise a `ValueError` if there is none of it."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    return name


def attend(
    query: Float[Array, "b s heads width"],
    key: Float[Array, "b s heads width"],
    value: Float[Array, "b s heads width"],
    mask: Bool[Array, "b 1 1 s"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "b s heads width"]:
    """Compute multi-head attention, `softmax(q k / sqrt(width)) v`.

    The two matrix products run in the dtype of the inputs, the softmax in float32 or wider.
    Source: Vaswani et al., 2017 (arXiv 1706.03762), equation 1; as in diffusers' FLUX.

    Args:
        query, key, value: [b, s, heads, width].
        mask: [b, 1, 1, s], False for keys that no token attends to. None attends to all keys.
        implementation: a name of the module's table. "cudnn" and "pallas" are flash attention: they
            never hold the logits in memory. "xla" holds at most `LOGITS_BYTES` of them on an
            accelerator, and those of `CPU_QUERIES` queries of one head on a CPU. "auto" takes
            "cudnn" or "pallas" on the platform for which the program is compiled if JAX can trace
            them for these arrays here, else "xla". cuDNN takes lengths instead of a mask, so for
            "cudnn" and "auto" the True values must come first in every row of `mask`.

    Returns:
        [b, s, heads, width] in the dtype of `value`.

    Raises:
        ValueError: `implementation` is unknown, or "cudnn" with a dtype other than bfloat16 or
            float16.
        RuntimeError: "cudnn" where JAX finds no cuDNN.
    """
    check_implementation(implementation)
    if implementation == "cudnn" and value.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"value has dtype {value.dtype}; expected bfloat16 or float16 for attention 'cudnn'"
        )
    return over_heads(partial(_attend, implementation))(query, key, value, mask)


def _attend(
    implementation: str, query: Array, key: Array, value: Array, mask: Array | None
) -> Array:
    if implementation != "auto":
        return {"xla": _xla, "cudnn": _cudnn, "pallas": _pallas}[implementation](
            query, key, value, mask
        )
    fast: dict[str, Attend] = {}
    if _has_cudnn(query.shape, str(value.dtype), mask is not None):
        fast["cuda"] = _differentiated_as_xla(_cudnn)
    if value.dtype in (jnp.bfloat16, jnp.float32) and query.shape[-1] % 128 == 0:
        fast["tpu"] = _differentiated_as_xla(_pallas)
    return jax.lax.platform_dependent(query, key, value, mask, **fast, default=_xla)


def _differentiated_as_xla(kernel: Attend) -> Attend:
    """Let `kernel` have all derivatives, which it lacks in part: those of `_xla`."""

    @jax.custom_jvp
    def attend_with(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
        return kernel(query, key, value, mask)

    @attend_with.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        *arrays, mask = primals
        return jax.jvp(lambda q, k, v: _xla(q, k, v, mask), arrays, list(tangents[:3]))

    return attend_with


def _cudnn(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    lengths = None if mask is None else mask[:, 0, 0].sum(axis=-1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )


@lru_cache
def _has_cudnn(shape: tuple[int, ...], dtype: str, masked: bool) -> bool:
    """Whether cuDNN's attention can be used for such arrays on all GPUs of this process."""
    if dtype not in ("bfloat16", "float16") or jax.default_backend() != "gpu":
        return False
    for device in jax.local_devices():
        capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are no numbers
        if not capability.replace(".", "").isdigit() or float(capability) < AMPERE:
            return False
    array = jax.ShapeDtypeStruct(shape, dtype)
    mask = jax.ShapeDtypeStruct((shape[0], 1, 1, shape[1]), jnp.bool_) if masked else None
    try:
        jax.eval_shape(_cudnn, array, array, array, mask)
    except (RuntimeError, NotImplementedError, ValueError):  # what JAX raises if it can't be used
        return False
    return True


def _pallas(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    # Imported here, because Pallas takes a quarter of a second to import.
    from jax.experimental.pallas.ops.tpu.flash_attention import (
        BlockSizes,
        SegmentIds,
        flash_attention,
    )

    b, s, _, width = query.shape
    # Blocks have equal sizes, so the tokens are padded to a multiple of one.
    blocks = -(-s // PALLAS_BLOCK)
    block = -(-s // (128 * blocks)) * 128
    padded = block * blocks

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - s), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    segments = None
    if mask is not None or padded > s:
        valid = jnp.ones((b, s), jnp.int32) if mask is None else mask[:, 0, 0].astype(jnp.int32)
        keys = jnp.pad(valid, ((0, 0), (0, padded - s)))
        segments = SegmentIds(q=jnp.ones((b, padded), jnp.int32), kv=keys)
    sizes = {
        name: block
        for name in BlockSizes.__dataclass_fields__
        if name.startswith(("block_q", "block_k"))
    }
    out = flash_attention(
        *(pad(x) for x in (query, key, value)),
        segment_ids=segments,
        sm_scale=1 / math.sqrt(width),
        block_sizes=BlockSizes(**sizes, block_b=1),
    )
    return out.transpose(0, 2, 1, 3)[:, :s].astype(value.dtype)


def _xla(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    if value.dtype == jnp.float64:  # JAX's function computes the softmax of float64 in float32.
        return _attend_per_head(query, key, value, mask)
    by_platform = {"cpu": _attend_per_head}
    default = _attend_in_blocks
    if value.dtype == jnp.float16:  # JAX's function multiplies float16 on GPUs only.
        by_platform |= {"cuda": _attend_in_blocks, "rocm": _attend_in_blocks}
        default = _attend_in_float32
    return jax.lax.platform_dependent(query, key, value, mask, **by_platform, default=default)


def _attend_in_blocks(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Attend with as many queries at a time as `LOGITS_BYTES` allows. Same shapes as `attend`."""
    b, s, heads, width = query.shape
    # jax.checkpoint: a gradient computes the logits of a block again instead of keeping all.
    attend_block = jax.checkpoint(
        lambda block: jax.nn.dot_product_attention(block, key, value, mask=mask)
    )
    block = max(1, LOGITS_BYTES // (4 * b * heads * s))
    if block >= s:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    count = -(-s // block)
    block = -(-s // count)  # of equal sizes, with as little padding as possible
    padded = jnp.pad(query, ((0, 0), (0, block * count - s), (0, 0), (0, 0)))
    blocks = padded.reshape(b, count, block, heads, width).swapaxes(0, 1)
    out = jax.lax.map(attend_block, blocks).swapaxes(0, 1)
    return out.reshape(b, block * count, heads, width)[:, :s]


def _attend_in_float32(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    return _attend_in_blocks(q, k, v, mask).astype(value.dtype)


def _attend_per_head(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Attend one head at a time, in blocks of `CPU_QUERIES` queries.

    On a CPU, XLA's plain products are four times as fast as batched ones. Same shapes as `attend`.
    """
    b, s, heads, width = query.shape
    accumulator_dtype = at_least_float32(value.dtype)
    # Not every platform lowers float16 products, and a CPU would compute them in float32 anyway.
    product_dtype = accumulator_dtype if value.dtype == jnp.float16 else value.dtype
    count = -(-s // CPU_QUERIES)
    block = -(-s // count)  # of equal sizes, with as little padding as possible

    def attend_one_head(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
        blocks, k, v, allowed = inputs

        def attend_block(q: Array) -> Array:
            logits = jnp.matmul(q, k.T, preferred_element_type=accumulator_dtype)
            logits = logits / math.sqrt(width)
            if allowed is not None:
                logits = jnp.where(allowed[None, :], logits, -jnp.inf)
            # Normalise after the product: the weights are [block, s], the output [block, width].
            weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
            total = weights.sum(axis=1, keepdims=True)
            weights = weights.astype(product_dtype)
            out = jnp.matmul(weights, v, preferred_element_type=accumulator_dtype)
            return (out / total).astype(value.dtype)

        if count == 1:
            return attend_block(blocks[0])[None]
        # jax.checkpoint: a gradient computes the logits of a block again instead of keeping all.
        return jax.lax.map(jax.checkpoint(attend_block), blocks)

    def split_heads(x: Array) -> Array:
        return x.astype(product_dtype).transpose(0, 2, 1, 3).reshape(b * heads, s, width)

    allowed = None if mask is None else jnp.repeat(mask[:, 0, 0], heads, axis=0)
    q, k, v = split_heads(query), split_heads(key), split_heads(value)
    blocks = jnp.pad(q, ((0, 0), (0, block * count - s), (0, 0)))
    blocks = blocks.reshape(b * heads, count, block, width)
    out = jax.lax.map(attend_one_head, (blocks, k, v, allowed))
    out = out.reshape(b, heads, block * count, width)[:, :, :s]
    return out.transpose(0, 2, 1, 3)
