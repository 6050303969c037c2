"""Just-in-Time spatial acceleration of FLUX diffusion transformers, in functional JAX.

params = jitjax.load("tiny")
images = jitjax.sample(params, "a large red circle", key=jax.random.key(0))
"""
# ruff: noqa: E402 -- the commands prepare for Ctrl-C before the imports, which take seconds

from jitjax import startup

startup.begin()

import importlib
from typing import TYPE_CHECKING, Any

from jitjax import sampler as _sampler
from jitjax.checkpoint import FluxParams, quantise_params, save
from jitjax.compiled import CompiledSampler, compile
from jitjax.conditioning import Conditioning
from jitjax.config import FluxConfig
from jitjax.denoise import denoise, plan_at_strength
from jitjax.encode import encode
from jitjax.loading import load
from jitjax.memory import MemoryEstimate, estimate_memory
from jitjax.sample import decode, sample
from jitjax.sampler.plan import PLANS, Plan
from jitjax.text import encode_prompt

if TYPE_CHECKING:
    from jitjax import viz
    from jitjax.sampler.solve import jit_solve
    from jitjax.sampler.solvers import AdamsBashforth2
    from jitjax.sampler.trace import Trace

__all__ = [
    "PLANS",
    "AdamsBashforth2",
    "CompiledSampler",
    "Conditioning",
    "FluxConfig",
    "FluxParams",
    "MemoryEstimate",
    "Plan",
    "Trace",
    "compile",
    "decode",
    "denoise",
    "encode",
    "encode_prompt",
    "estimate_memory",
    "jit_solve",
    "load",
    "plan_at_strength",
    "quantise_params",
    "sample",
    "save",
    "viz",
]


def __getattr__(name: str) -> Any:
    # At their first use, since diffrax takes half a second to import.
    if name in ("AdamsBashforth2", "Trace", "jit_solve"):
        return getattr(_sampler, name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jitjax")
    if name == "viz":
        return importlib.import_module("jitjax.viz")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
