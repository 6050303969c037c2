# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How Just-in-Time works
#
# A diffusion transformer computes a velocity for every token of the picture, at every step.
# Just-in-Time ([arXiv 2603.10744](https://arxiv.org/abs/2603.10744)) computes it for a few
# *anchor* tokens first, *lifts* it to all others, and activates more tokens where the velocity
# varies most. Here one run is taken apart. It needs two minutes on a CPU.

# %%
# Install jitjax unless it is there: from the clone that this notebook is in, or as published.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("jitjax") is None:
    published = "jitjax[viz]"
    clone = Path("..").resolve()
    package = f"{clone}[viz]" if (clone / "pyproject.toml").exists() else published
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

import jax

device = jax.devices()[0]
print(f"found a {device.platform.upper()}: {len(jax.devices())} x {device.device_kind}")

# %%
import functools
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import jitjax
from jitjax import viz
from jitjax.sampler.anchors import AnchorSet
from jitjax.sampler.grid import positions
from jitjax.sampler.lifter import Lifter
from jitjax.velocity import FluxVelocity, VelocityInputs

# %% [markdown]
# ## One run, with its record
#
# `denoise(..., trace=True)` returns the record of the run: the state after every step, the
# anchors, the clean prediction and the importance of every stage. The plan `4x` has 18 steps in
# three stages.

# %%
params = jitjax.load("tiny")
grid = (32, 32)  # 512 x 512 pixels, 16 x 16 per token
prompt = "a large blue striped star and a small red circle"
conditioning = jitjax.encode_prompt(params, prompt)
noise = jax.random.normal(jax.random.key(1), (1, 1024, 64))


@functools.cache
def run(plan):
    tokens, trace = jitjax.denoise(
        params, conditioning, noise, plan=plan, grid=grid, key=jax.random.key(0), trace=True
    )
    return np.asarray(jitjax.decode(params, tokens, grid=grid))[0], trace


plan = jitjax.PLANS["4x"]
image, trace = run(plan)
_ = viz.show_trace(params, trace, grid)
# %% [markdown]
# Top: the clean prediction at the end of each stage; tokens that are no anchors are dark. Middle:
# the importance, which is the local variance of the velocity, and the new anchors that it
# chooses. Bottom: the number of tokens in each step. The transformer's cost is a little more than
# proportional to it.
#
# The same as an animation, the active anchors outlined:

# %%
folder = Path(tempfile.mkdtemp())
Image(filename=viz.animate(params, trace, grid, folder / "run.webp"))

# %% [markdown]
# ## Lifted against exact velocity
#
# At the end of the first stage, the transformer's velocity on the anchors is lifted to all
# tokens. Beside it is the velocity that the transformer gives on all tokens.

# %%
velocity = FluxVelocity(params.config.transformer)
inputs = VelocityInputs(params.transformer, conditioning, jnp.full(1, 3.5))
last = trace.stage_steps[0] - 1
state, sigma = trace.states[last - 1], trace.sigmas[last]
everywhere = jnp.arange(1024)[None]
exact = velocity(state, positions(everywhere, grid), sigma, None, inputs)


def lifted(method):
    anchors = AnchorSet.padded(trace.anchors[0], trace.anchors[0].shape[1], 1024)
    on_anchors = velocity(
        anchors.gather(state), positions(anchors.index, grid), sigma, None, inputs
    )
    return Lifter.build(anchors, grid, anchors.index.shape[1], method)(on_anchors)


def size(field):
    return np.sqrt((np.asarray(field[0]) ** 2).mean(-1)).reshape(grid)


figure, axes = plt.subplots(1, 3, figsize=(10, 3.3))
fields = {"exact": exact, "lifted": lifted("blur"), "difference": lifted("blur") - exact}
for axis, (name, field) in zip(axes, fields.items(), strict=True):
    shown = axis.imshow(size(field), vmin=0, vmax=size(exact).max())
    axis.set_title(f"{name} velocity")
    axis.axis("off")
_ = figure.colorbar(shown, ax=axes)

# %% [markdown]
# Most of the difference is noise. The velocity is the noise minus the picture, and a token's
# noise cannot be had from its neighbours: the lifted velocity has next to none. The picture can:
# here is the error of the clean prediction `y - sigma u` instead, lifted from the anchors, for
# each of the lifts. The rest of it has another cause: the transformer has seen the anchors alone.

# %%
index = trace.anchors[0]
anchors = AnchorSet.padded(index, index.shape[1], 1024)
clean = state - sigma * exact
on_anchors = anchors.gather(state) - sigma * velocity(
    anchors.gather(state), positions(anchors.index, grid), sigma, None, inputs
)
for method in ("blur", "narrow", "linear", "nearest"):
    lifter = Lifter.build(anchors, grid, index.shape[1], method)
    error = jnp.linalg.norm(lifter.lift_clean(on_anchors) - clean) / jnp.linalg.norm(clean)
    print(f"{method:8} relative error of the clean prediction {float(error):.2f}")
on_anchors_error = jnp.linalg.norm(on_anchors - anchors.gather(clean))
on_anchors_error /= jnp.linalg.norm(anchors.gather(clean))
print(f"on the anchors themselves {float(on_anchors_error):.2f}")

# %% [markdown]
# ## What the micro-flow changes
#
# A lifted velocity takes no noise away. So all the noise that a new anchor started with is still
# there, 1 / sigma times as much as the model expects at this sigma. The micro-flow moves new
# anchors towards `(1 - sigma) x0 + sigma noise`, where x0 is the lifted clean prediction: all the
# way ("hit", the paper's equation), or a third of it, with new noise ("blend", the authors'
# program and `4x`).

# %%
end = trace.stage_steps[0]
for microflow in ("none", "blend", "hit"):
    _, record = run(plan.replace(microflow=microflow))
    transition, level = record.transitions[0], record.sigmas[end]
    new, old = transition.new[0], record.anchors[0][0]
    noise_left = (transition.after[0] - (1 - level) * transition.lifted[0]) / level
    print(
        f"{microflow:6} noise of new anchors, standard deviation {float(noise_left[new].std()):.2f}"
        f" (old anchors {float(noise_left[old].std()):.2f}; the model expects 1)"
    )

# %% [markdown]
# ## The paper's three ablations
#
# Each takes one of the three parts away. PSNR is to the picture of 50 dense steps.

# %%
variants = {
    "50 dense steps": jitjax.PLANS["dense"],
    "4x": plan,
    "fixed grid instead\nof importance": plan.replace(activation="grid"),
    "no lift": plan.replace(lift="none"),
    "no micro-flow": plan.replace(microflow="none"),
}
pictures = {name: run(variant)[0] for name, variant in variants.items()}
_ = viz.compare(pictures, reference="50 dense steps", columns=5)

# %% [markdown]
# A single picture proves nothing: [docs/plans.md](../docs/plans.md) has the same over many
# prompts, and plans that do better than `4x`.
