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
# Install, load the bundled checkpoint, make a picture, compare the three plans, draw a batch. Runs
# on a CPU, and as it is on a Colab GPU or TPU (Runtime, Change runtime type).

# %%
# On Colab this installs jitjax from the folder that this notebook's repository was cloned to.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jitjax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", ".."], check=True)

# %%
import time

import jax
import matplotlib.pyplot as plt

import jitjax

print(jax.default_backend(), jax.devices())

# %% [markdown]
# `load` returns a pytree of arrays with the configuration attached. `tiny` is a whole FLUX pipeline
# of six million parameters, trained for some hours on two CPU cores: it knows colours, numbers,
# sizes and places, and draws uneven outlines.

# %%
params = jitjax.load("tiny")
parts = ("transformer", "t5", "clip", "autoencoder")
{part: sum(x.size for x in jax.tree.leaves(getattr(params, part))) for part in parts}

# %%
image = jitjax.sample(params, "a large red circle", key=jax.random.key(0))
plt.imshow(image[0])
plt.axis("off")
# %% [markdown]
# ## Three plans
#
# `dense` runs the transformer on all tokens at each of 50 steps. `4x` and `7x` take 18 and 11 steps
# and start on about a third of the tokens. Times are of a second run, when everything is compiled.

# %%
prompt = "a large blue striped star"
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
for axis, plan in zip(axes, ("dense", "4x", "7x"), strict=True):
    jitjax.sample(params, prompt, key=jax.random.key(1), plan=plan).block_until_ready()
    start = time.perf_counter()
    image = jitjax.sample(params, prompt, key=jax.random.key(1), plan=plan).block_until_ready()
    axis.imshow(image[0])
    axis.set_title(f"{plan}: {time.perf_counter() - start:.2f} s")
    axis.axis("off")

# %% [markdown]
# ## A batch
#
# One key per picture: each is the picture that its key makes alone.

# %%
keys = jax.random.split(jax.random.key(7), 4)
images = jitjax.sample(params, ["a large green square"] * 4, key=keys)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6))
for axis, picture in zip(axes, images, strict=True):
    axis.imshow(picture)
    axis.axis("off")

# %% [markdown]
# ## In your own program
#
# `denoise` is a pure function: here under `jax.grad`, the derivative of the picture's brightness
# with respect to the noise that it started from.

# %%
conditioning = jitjax.encode_prompt(params, prompt)
noise = jax.random.normal(jax.random.key(2), (1, 64, params.config.transformer.in_channels))


def brightness(noise):
    tokens = jitjax.denoise(params, conditioning, noise, plan="7x", key=jax.random.key(3))
    return jitjax.decode(params, tokens, grid=(8, 8)).mean()


value, slope = jax.value_and_grad(brightness)(noise)
print(
    f"brightness {value:.3f}, gradient of shape {slope.shape}, norm {(slope**2).sum() ** 0.5:.3f}"
)
