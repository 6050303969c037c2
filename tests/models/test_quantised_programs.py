"""No compiled program holds a stack of dequantised weights."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

import jitjax
from jitjax.checkpoint import abstract_params
from jitjax.config import FluxConfig, T5Config, TransformerConfig
from jitjax.models import quantised
from jitjax.nested import flatten
from jitjax.sampler.grid import positions
from jitjax.velocity import FluxVelocity

GRID = (4, 4)
# The numbers of blocks are primes that divide no width, so that only stacks have a stack's size.
WIDE = FluxConfig(
    transformer=TransformerConfig(
        num_layers=7,
        num_single_layers=11,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 28, 28),
    ),
    t5=T5Config(d_model=64),
)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("int8", "bfloat16", marks=pytest.mark.slow),
        ("int4", "float32"),
        pytest.param("float8", "float32", marks=pytest.mark.slow),
    ],
)
def test_no_stack_is_ever_dequantised(kind, dtype):
    """No array of the compiled program has the size of a stack, other than the quantised ones."""
    params = abstract_params(WIDE, dtype, kind)
    plain = flatten(abstract_params(WIDE).transformer)
    stacks = {
        leaf.shape for path, leaf in plain.items() if quantised.is_quantisable("transformer", path)
    }
    assert len(stacks) == 9

    def solve(params, tokens, text, pooled):
        def step(tokens, sigma):
            where = positions(jnp.arange(16), GRID)[None]
            args = (params, jitjax.Conditioning(text, pooled), jnp.ones(1))
            function = FluxVelocity(WIDE.transformer, "xla")
            return tokens - 0.1 * function(tokens, where, sigma, None, args), None

        return jax.lax.scan(step, tokens, jnp.linspace(1, 0.2, 3))[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 16, 64), (1, 8, 64), (1, 768))]
    lowered = jax.jit(solve).lower(params.transformer, *shapes)
    for text in (str(jax.make_jaxpr(solve)(params.transformer, *shapes)), lowered.as_text()):
        assert not float_arrays_of(text, {math.prod(s) for s in stacks})
    compiled = lowered.compile()
    assert not float_arrays_of(str(compiled.as_text()), {math.prod(s) for s in stacks})
    # Dequantised, the smallest stack of the widest kind alone would take this many bytes.
    widest = max(math.prod(shape) for shape in stacks) * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * widest  # pyright: ignore[reportOptionalMemberAccess]


def float_arrays_of(program: str, sizes: set[int]) -> list[str]:
    """Return the floating-point arrays of some sizes, in a jaxpr, in StableHLO or in HLO."""
    found = re.findall(r"\b(?:f|bf)\d\w*\[([\d,]+)\]|tensor<([\dx]+)x(?:f|bf)\d\w*>", program)
    assert found
    shapes = [[int(n) for n in re.split("[,x]", a or b)] for a, b in found]
    return [str(shape) for shape in shapes if math.prod(shape) in sizes]


def test_a_plain_stack_is_found(small):
    text = str(jax.make_jaxpr(lambda p: p)(small.transformer))
    kernel = small.transformer["single_blocks"]["out"]["kernel"]
    assert float_arrays_of(text, {kernel.size})
