"""jitjax: Just-in-Time spatial acceleration of FLUX diffusion transformers, in functional JAX.

params = jitjax.load("tiny")
images = jitjax.sample(params, "a large red circle", key=jax.random.key(0))
"""

from jitjax.checkpoint import FluxParams, save
from jitjax.config import FluxConfig
from jitjax.denoise import denoise
from jitjax.loading import load
from jitjax.plan import PLANS, Plan
from jitjax.sample import decode, sample
from jitjax.solve import jit_solve
from jitjax.solvers import AdamsBashforth2
from jitjax.text import Conditioning, encode_prompt
from jitjax.trace import Trace

__all__ = [
    "PLANS",
    "AdamsBashforth2",
    "Conditioning",
    "FluxConfig",
    "FluxParams",
    "Plan",
    "Trace",
    "decode",
    "denoise",
    "encode_prompt",
    "jit_solve",
    "load",
    "sample",
    "save",
]
