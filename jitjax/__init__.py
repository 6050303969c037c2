"""Just-in-Time spatial acceleration of FLUX diffusion transformers, in functional JAX.

params = jitjax.load("tiny")
images = jitjax.sample(params, "a large red circle", key=jax.random.key(0))
"""
# ruff: noqa: E402 -- the commands prepare for Ctrl-C before the imports, which take seconds

from jitjax import startup

startup.begin()

from jitjax.checkpoint import FluxParams, save
from jitjax.compiled import CompiledSampler, compile
from jitjax.config import FluxConfig
from jitjax.denoise import denoise
from jitjax.loading import load
from jitjax.sample import decode, sample
from jitjax.sampler.plan import PLANS, Plan
from jitjax.sampler.solve import jit_solve
from jitjax.sampler.solvers import AdamsBashforth2
from jitjax.sampler.trace import Trace
from jitjax.text import Conditioning, encode_prompt

__all__ = [
    "PLANS",
    "AdamsBashforth2",
    "CompiledSampler",
    "Conditioning",
    "FluxConfig",
    "FluxParams",
    "Plan",
    "Trace",
    "compile",
    "decode",
    "denoise",
    "encode_prompt",
    "jit_solve",
    "load",
    "sample",
    "save",
]
