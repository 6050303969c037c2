"""jitjax: Just-in-Time spatial acceleration of FLUX diffusion transformers, in functional JAX.

params = jitjax.load("tiny")
images = jitjax.sample(params, "a large red circle", key=jax.random.key(0))
"""

from jitjax.checkpoint import FluxParams, load, save
from jitjax.config import PLANS, FluxConfig, Plan
from jitjax.denoise import denoise
from jitjax.sample import decode, sample
from jitjax.solve import jit_solve
from jitjax.text import Conditioning, encode_prompt

__all__ = [
    "PLANS",
    "Conditioning",
    "FluxConfig",
    "FluxParams",
    "Plan",
    "decode",
    "denoise",
    "encode_prompt",
    "jit_solve",
    "load",
    "sample",
    "save",
]
