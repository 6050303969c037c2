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
# # jitjax in your own research
#
# The sampler is a pure function over pytrees. This notebook runs it over a velocity of one's own,
# under `vmap` and `grad`, with another plan and solver, and over eight devices. It needs two
# minutes on a CPU.

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

if jax.config.jax_platforms in (None, "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)  # virtual devices, for the last section
device = jax.devices()[0]
print(f"found a {device.platform.upper()}: {len(jax.devices())} x {device.device_kind}")

# %%
import diffrax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jitjax
from jitjax import viz

# %% [markdown]
# ## A velocity of one's own
#
# `jit_solve` takes any function `(tokens, positions, sigma, valid, args) -> velocities`. Here every
# token is two numbers, drawn around the mean `(sin(row / 3), cos(column / 3))` with standard
# deviation 0.1. For a Gaussian the exact velocity is known: the expected noise minus the expected
# clean value.

# %%
grid, spread = (16, 16), 0.1


def mean_of(positions):
    row, column = positions[..., 1], positions[..., 2]
    return jnp.stack([jnp.sin(row / 3), jnp.cos(column / 3)], axis=-1)


def velocity(tokens, positions, sigma, valid, args):
    mean = mean_of(positions)
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    residual = (tokens - (1 - sigma) * mean) / variance
    clean = mean + (1 - sigma) * spread**2 * residual
    noise = sigma * residual
    return noise - clean


rows, columns = np.indices(grid).reshape(2, -1)
truth = mean_of(np.stack([rows * 0, rows, columns], axis=-1))
noise = jax.random.normal(jax.random.key(0), (1, 256, 2))
fields = {"truth": truth}
for name in ("dense", "4x", "jit-14x"):
    plan = jitjax.PLANS[name]
    sigmas = jnp.linspace(1, 0, plan.steps + 1)
    budget = plan.budgets(256)[0]
    anchors = np.linspace(0, 255, budget).astype(int)[None]
    fields[name] = jitjax.jit_solve(
        velocity, noise, sigmas, plan=plan, grid=grid, first_anchors=anchors, microflow_noise=noise
    )[0]
    distance = float(jnp.sqrt(((fields[name] - truth) ** 2).mean()))
    print(f"{name:8} root mean square distance to the mean {distance:.3f} (a draw: {spread})")
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7))
for axis, (name, field) in zip(axes, fields.items(), strict=True):
    axis.imshow(np.asarray(field)[:, 0].reshape(grid), vmin=-1.3, vmax=1.3)
    axis.set_title(name)
    axis.axis("off")

# %% [markdown]
# ## `vmap` over seeds
#
# All seeds in one program. At 256 pixels, which is fast, `tiny` draws a quarter of its picture: it
# has learned the positions of 512 pixels.

# %%
params = jitjax.load("tiny")
conditioning = jitjax.encode_prompt(params, "a large red circle")


def picture(key):
    return jitjax.sample(params, conditioning, key=key, height=256, width=256, plan="multistep-7")[
        0
    ]


pictures = jax.jit(jax.vmap(picture))(jax.random.split(jax.random.key(0), 4))
_ = viz.compare({f"seed {i}": image for i, image in enumerate(pictures)})

# %% [markdown]
# ## A gradient through the accelerated sampler
#
# The prompt says nothing of the ground. Gradient descent on the noise makes it darker, through the
# sparse stage, the micro-flow, the dense stage and the decoder. Only the state before each step is
# kept for the gradient.

# %%
plan = jitjax.Plan(
    5, (0.4, 1.0), (0.6, 1.0), schedule=("beta", 1.2, 0.4), lift="linear", microflow="hit",
    microflow_noise="initial", solver="multistep",
)  # fmt: skip
noise = jax.random.normal(jax.random.key(3), (1, 256, 64))


@jax.jit
def draw(noise):
    tokens = jitjax.denoise(
        params, conditioning, noise, plan=plan, grid=(16, 16), key=jax.random.key(0)
    )
    return jitjax.decode(params, tokens, grid=(16, 16))[0]


@jax.jit
@jax.value_and_grad
def loss(noise):
    image = draw(noise)
    return jnp.concatenate([image[:24], image[-24:]]).mean()


steered, values = noise, []
for _ in range(6):
    value, gradient = loss(steered)
    values.append(float(value))
    steered = steered - 4 * gradient / jnp.linalg.norm(gradient)
    # Noise has a known length; without this it would leave the distribution.
    steered = steered * jnp.linalg.norm(noise) / jnp.linalg.norm(steered)
print("brightness of the ground:", " ".join(f"{value:.3f}" for value in values))
_ = viz.compare({"before": draw(noise), "after six steps": draw(steered)})

# %% [markdown]
# ## A plan and a solver of one's own
#
# A `Plan` is frozen and checked. `solver` takes any diffrax solver of ordinary differential
# equations: `Heun` evaluates the network twice per step. Evaluations are in brackets.

# %%
dense = jitjax.Plan(24, schedule="shifted")
solvers = {
    "24 Euler steps": (dense, "euler"),
    "6 Euler steps": (dense.replace(steps=6), "euler"),
    "3 steps of Heun": (dense.replace(steps=3), diffrax.Heun()),
    "6 multistep steps": (dense.replace(steps=6), "multistep"),
}
results = {}
for name, (plan, solver) in solvers.items():
    tokens, trace = jitjax.denoise(
        params, conditioning, noise, plan=plan, grid=(16, 16), solver=solver, trace=True
    )
    results[f"{name} ({trace.evaluations})"] = jitjax.decode(params, tokens, grid=(16, 16))
_ = viz.compare(results, reference=next(iter(results)))

# %% [markdown]
# ## Several devices
#
# `load(mesh=...)` divides the parameters; `sample` divides the batch. Eight virtual devices of one
# CPU are no faster, but the program is that of eight cards.

# %%
if len(jax.devices()) >= 8:
    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices()[:8])
    divided = jitjax.load("tiny", mesh=mesh)
    kernel = divided.transformer["single_blocks"]["out"]["kernel"]
    print(f"a kernel of shape {kernel.shape} as {kernel.sharding.spec}")
    prompts = ["a large red circle"] * 4
    images = jitjax.sample(
        divided, prompts, key=jax.random.key(0), height=256, width=256, plan="multistep-7"
    )
    print(f"pictures of shape {images.shape} as {images.sharding.spec}")
    alone = jitjax.sample(
        params, prompts, key=jax.random.key(0), height=256, width=256, plan="multistep-7"
    )
    print(f"largest difference to one device: {np.abs(np.asarray(images) - alone).max():.1e}")
else:
    print(f"there are {len(jax.devices())} devices; this section needs 8")
