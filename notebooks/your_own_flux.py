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
# # Your own FLUX checkpoint
#
# Convert a checkpoint, look into it, merge a LoRA, quantise, see what fits your card. The files of
# FLUX.1 are 34 GB and need a licence, so this notebook runs on a small checkpoint of the same
# layout: the bundled one, which is a diffusers folder. Set `FLUX` to a folder or a file of yours
# to run the same cells on it. The real weights have not been tried yet.

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
import tempfile

import numpy as np
from safetensors.numpy import save_file

import jitjax
from jitjax import viz

FLUX = ""  # such as "/content/FLUX.1-dev", a diffusers folder, or a .safetensors or .gguf file
PROMPT = "a large blue star"

work = Path(tempfile.mkdtemp())
source = Path(FLUX) if FLUX else Path(jitjax.__file__).parent / "checkpoints" / "tiny"


def command(*arguments):
    """Run a command, and show what it prints, without the progress bar."""
    print("$", " ".join(str(argument) for argument in arguments))
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True
    )
    print("\n".join(x for x in (result.stdout + result.stderr).splitlines() if "%|" not in x))
    assert result.returncode == 0, f"exit status {result.returncode}"


# %% [markdown]
# ## What will fit
#
# `jitjax memory` says what a model needs of the device, the host and the disk, without the files.

# %%
command("jitjax", "memory", "flux-dev", "--size", "1024", "--quantise", "int8")

# %% [markdown]
# ## Convert, once
#
# Diffusers folders, hub repositories, the original release's files, ComfyUI's, fp8 and GGUF are
# recognised by their tensors' names.

# %%
command("jitjax.convert", source, "--out", work / "flux")
command("jitjax", "info", work / "flux")

# %%
params = jitjax.load(work / "flux")
pictures = {"converted": jitjax.sample(params, PROMPT, key=jax.random.key(0), plan="multistep-7")}

# %% [markdown]
# ## A LoRA
#
# This one is random, with the names that training programs write for FLUX. A scale after the colon
# weakens it. `jitjax.load(..., loras=[(file, scale)])` does the same without a second checkpoint.

# %%
rng, rank = np.random.default_rng(0), 4
width = params.config.transformer.hidden
layers = [f"single_transformer_blocks.{i}.attn.to_v" for i in range(2)]
lora = {}
for layer in layers:
    lora[f"transformer.{layer}.lora_A.weight"] = rng.normal(0, width**-0.5, (rank, width))
    lora[f"transformer.{layer}.lora_B.weight"] = rng.normal(0, 0.3, (width, rank))
lora = {name: array.astype(np.float32) for name, array in lora.items()}
save_file(lora, work / "lora.safetensors")
command(
    "jitjax.convert", source, "--lora", f"{work / 'lora.safetensors'}:0.5", "--out", work / "lora"
)
command("jitjax", "info", work / "lora")
with_lora = jitjax.load(work / "lora")
pictures["with a random LoRA"] = jitjax.sample(
    with_lora, PROMPT, key=jax.random.key(0), plan="multistep-7"
)

# %% [markdown]
# ## Quantised weights
#
# int8 takes half the memory of bfloat16, int4 a quarter. Weights are quantised block by block while
# they are loaded, so the whole model is never held unquantised.

# %%
for kind in ("int8", "int4"):
    quantised = jitjax.load(work / "flux", quantise=kind)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(quantised.transformer))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params.transformer))
    print(f"{kind}: the transformer has {size / 1e6:.1f} MB instead of {whole / 1e6:.1f}")
    pictures[kind] = jitjax.sample(quantised, PROMPT, key=jax.random.key(0), plan="multistep-7")
_ = viz.compare(pictures, reference="converted")

# %% [markdown]
# ## One model at a time
#
# `low_memory=True` keeps all models in host memory; each is on the device only while it runs.

# %%
frugal = jitjax.load(work / "flux", low_memory=True)
image = jitjax.sample(frugal, PROMPT, key=jax.random.key(0), plan="multistep-7")
print(f"the same picture: {bool((image == pictures['converted']).all())}")
