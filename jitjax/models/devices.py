"""What depends on the devices of this process."""

from __future__ import annotations

import os

import jax


def on_nvidia_gpu() -> bool:
    """Whether the default device is an NVIDIA GPU."""
    return (
        jax.default_backend() == "gpu"
        and "cuda" in jax.devices()[0].client.platform_version.lower()
    )


def compiler_options() -> dict[str, bool]:
    """Return the options of XLA with which the transformer is fastest on this process's devices.

    `denoise` and `sample` compile with them, unless they are called under `jit`: options belong to
    the outermost jitted function, `jax.jit(f, compiler_options=compiler_options())`.

    On NVIDIA GPUs, with these options cuBLAS reads the weights of a scanned block in place. Without
    them XLA copies the weights of every block first. Options that the environment variable
    XLA_FLAGS sets are left as they are. Before jax 0.11 there are none: its XLA needs the copies.
    """
    if not on_nvidia_gpu() or jax.__version_info__ < (0, 11):
        return {}
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": True}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}
