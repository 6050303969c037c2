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
# # jitjax: fast FLUX sampling in JAX
#
# Install jitjax, load the bundled checkpoint, generate an image, compare four plans and
# generate a batch. The notebook runs on a CPU and, unchanged, on a Colab GPU or TPU (Runtime,
# Change runtime type).

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
import time

import matplotlib.pyplot as plt
import numpy as np

import jitjax

# %% [markdown]
# `load` returns a pytree of arrays with the configuration attached. `tiny` is a complete FLUX
# pipeline of six million parameters, trained for some hours on two CPU cores and some minutes on a
# GPU. It knows colours, numbers, sizes and places; its outlines are uneven.

# %%
params = jitjax.load("tiny")
parts = ("transformer", "t5", "clip", "autoencoder")
{part: sum(leaf.size for leaf in jax.tree.leaves(getattr(params, part))) for part in parts}

# %%
image = jitjax.sample(params, "a large red circle", key=jax.random.key(0))
plt.imshow(image[0])
plt.axis("off")
# %% [markdown]
# ## Four plans
#
# `dense` runs the transformer on all tokens at each of 50 steps of Euler's method. `multistep-12`,
# the default, takes 12 steps of second order. `4x`, the paper's plan, takes 18 and `jit-10x` takes
# 10; both start with about a third of the tokens, and `jit-10x` loses the stripes here. Times are
# those of a second run, without compilation.

# %%
prompt = "a large blue striped star"
plans = ("dense", "multistep-12", "4x", "jit-10x")
figure, axes = plt.subplots(1, len(plans), figsize=(12, 3.4))
for axis, plan in zip(axes, plans, strict=True):
    jitjax.sample(params, prompt, key=jax.random.key(1), plan=plan).block_until_ready()
    start = time.perf_counter()
    image = jitjax.sample(params, prompt, key=jax.random.key(1), plan=plan).block_until_ready()
    axis.imshow(image[0])
    axis.set_title(f"{plan}: {time.perf_counter() - start:.2f} s")
    axis.axis("off")

# %% [markdown]
# ## A batch
#
# With one key per image, each image is the one that its key gives alone. `multistep-7` takes 7
# steps.

# %%
keys = jax.random.split(jax.random.key(7), 4)
images = jitjax.sample(params, ["a large green square"] * 4, key=keys, plan="multistep-7")
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6))
for axis, image in zip(axes, images, strict=True):
    axis.imshow(image)
    axis.axis("off")

# %% [markdown]
# ## Pictures in
#
# Start from a picture (`strength` is the share of the steps that is run), draw within a mask (the
# rest of the picture stays to the bit), or move away from a negative prompt.

# %%
ground = "on a grey background"


def draw(prompt, seed, **options):
    key = jax.random.key(seed)
    return np.asarray(jitjax.sample(params, prompt, key=key, plan="multistep-7", **options))


square = draw(f"a large blue square {ground}", 4)
pair = draw(f"a medium blue square left of a medium red circle {ground}", 5)
mask = np.zeros((1, 512, 512), np.float32)
mask[:, 112:400, 264:504] = 1
images = {
    "a picture": square,
    "image to image:\nred": draw(f"a large red square {ground}", 4, image=square, strength=0.6),
    "another picture": pair,
    "within a mask:\na yellow star": draw(
        f"a medium blue square left of a medium yellow star {ground}", 6, image=pair, mask=mask
    ),
    "a large square,\nbut not blue": draw(
        "a large square", 4, negative_prompt="a large blue square"
    ),
}
figure, axes = plt.subplots(1, 5, figsize=(12, 3))
for axis, (title, image) in zip(axes, images.items(), strict=True):
    axis.imshow(image[0])
    axis.set_title(title, fontsize=9)
    axis.axis("off")
kept = mask[0] == 0
same = (images["within a mask:\na yellow star"][0][kept] == pair[0][kept]).all()
print(f"outside the mask nothing has changed: {same}")

# %% [markdown]
# ## In your own program
#
# `denoise` is a pure function. Here `jax.value_and_grad` differentiates the brightness of the image
# with respect to the noise that it starts from.

# %%
conditioning = jitjax.encode_prompt(params, prompt)
noise = jax.random.normal(jax.random.key(2), (1, 64, params.config.transformer.out_channels))


def brightness(noise):
    tokens = jitjax.denoise(params, conditioning, noise)
    return jitjax.decode(params, tokens, grid=(8, 8)).mean()


value, gradient = jax.value_and_grad(brightness)(noise)
norm = (gradient**2).sum() ** 0.5
print(f"brightness {value:.3f}, gradient of shape {gradient.shape}, norm {norm:.3f}")
