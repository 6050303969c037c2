"""What tests of the small pipeline draw if nothing else matters, so that they share programs.

Two pictures of 32 x 64 pixels, which are 2 x 4 tokens. Their programs are compiled once for all
tests: XLA takes more than a second for each stage, and half a second for the encoders of text.
"""

from __future__ import annotations

from jitjax.sampler.plan import Plan

PROMPTS = ["a large red circle", "a small blue square"]
GRID = (2, 4)
HEIGHT, WIDTH = 32, 64
SIZE = {"height": HEIGHT, "width": WIDTH}
DENSE = Plan(2, schedule="shifted")
SPARSE = Plan(2, (0.625, 1.0), (0.5, 1.0), microflow="hit", microflow_noise="initial")
"""A step on 5 of the 8 tokens, the corners and one more, and a step on all."""
