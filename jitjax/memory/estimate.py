"""`estimate_memory`: device, host and disk, before anything is loaded or compiled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jitjax.checkpoint import PARTS
from jitjax.config import FluxConfig
from jitjax.latents import token_grid
from jitjax.memory import programs
from jitjax.memory.models import find_model
from jitjax.memory.programs import PLATFORMS, Program, Settings
from jitjax.memory.weights import Divisions, largest_leaf, leaves
from jitjax.models.partitioning import check_axes
from jitjax.models.quantised import KINDS
from jitjax.sampler.plan import DEFAULT_PLAN, Plan, get_plan
from jitjax.validation import shown

CARDS = (16, 24, 40, 80, 141)
"""Sizes of cards in GB, as they are sold."""
USABLE = 0.92
"""Share of a card's GB that a program may plan with: the driver, the libraries' workspaces and gaps
between arrays take the rest. (JAX takes 0.75 by default: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.)"""
HOST_BYTES = 1_500_000_000
"""Host memory of a process beside parameters: Python, JAX, compiled programs, libraries; about."""
READ_BYTES = 256 * 2**20
"""Parameters that are read at a time, unless one is larger."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MemoryEstimate:
    """What a call of `sample` needs, in bytes on each device, in the host and on disk.

    Attributes:
        name: the model.
        settings: what it was computed for.
        size: height and width in pixels.
        parts: bytes of each part's parameters on one device.
        programs: the compiled programs, in the order in which they run.
        disk: bytes of the checkpoint.
        largest_read: bytes of the host that reading takes beside what stays there.
    """

    name: str
    settings: Settings
    size: tuple[int, int]
    parts: dict[str, int]
    programs: tuple[Program, ...]
    disk: int
    largest_read: int

    @property
    def device(self) -> int:
        """Bytes of a device that holds all parts while the program that needs most runs."""
        return sum(self.parts.values()) + max(p.beside_weights for p in self.programs)

    @property
    def low_memory(self) -> int:
        """The same with `load(path, low_memory=True)`: one part at a time."""
        return max(self._with_parts(program) for program in self.programs)

    def _with_parts(self, program: Program) -> int:
        # Anchors are found while the transformer is on the device.
        names = program.parts or ("transformer",)
        return sum(self.parts.get(name, 0) for name in names) + program.beside_weights

    @property
    def host(self) -> int:
        """Bytes of host memory; on a CPU that includes the device's."""
        on_cpu = self.settings.platform == "cpu"
        return HOST_BYTES + self.largest_read + (self.device if on_cpu else 0)

    @property
    def host_low_memory(self) -> int:
        """Bytes of host memory with `low_memory=True`, for each process: all parts stay there."""
        on_cpu = self.settings.platform == "cpu"
        kept = sum(self.parts.values()) + (self.low_memory if on_cpu else 0)
        return HOST_BYTES + self.largest_read + kept

    def fits(self, gigabytes: int | float, *, low_memory: bool = False) -> bool:
        """Whether it fits a card, of which `USABLE` can be used.

        Args:
            gigabytes: size of the card in GB (10**9 bytes), above 0.
            low_memory: with one part at a time on the device.

        Returns:
            True if 92 % of the card (`USABLE`) are enough.
        """
        needed = self.low_memory if low_memory else self.device
        return needed <= USABLE * gigabytes * 1e9


def estimate_memory(
    model: FluxConfig | str | os.PathLike[str],
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    plan: str | Plan = DEFAULT_PLAN,
    dtype: DTypeLike | None = None,
    quantise: str | None = None,
    mesh: Any = None,
    parts: Iterable[str] = PARTS,
    platform: str = "gpu",
    attention: str = "auto",
    image: bool = False,
    negative: bool = False,
) -> MemoryEstimate:
    """Compute what a call of `sample` needs, without loading or compiling anything.

    For "cpu" in float32 each program is within 10 % of XLA's own account (`memory_analysis`). For
    "gpu" the same account is computed for cuDNN's attention and kernels that are read in place
    (jax 0.11 or newer), and has not been measured part by part.

    Args:
        model: a configuration; a checkpoint folder; the name of a bundled checkpoint; or, if there
            is no such folder, "flux-dev" or "flux-schnell".
        height, width: size in pixels, multiples of 16 from 16 to 8192; by default the model's.
        batch: number of pictures, 1 or more, over all devices.
        plan: a name in `PLANS` or a `Plan`.
        dtype: dtype of the parameters that are not quantised: bfloat16, float16 or float32. The
            default is the checkpoint's; without one bfloat16, and float32 for "cpu".
        quantise: "int8", "int4" or "float8": quantisation of the kernels in the blocks of the
            transformer and of T5. The default is the checkpoint's.
        mesh: a mesh, the sizes of its axes by name (data, fsdp, model), or a string such as "2x4",
            data x model. Bytes are those of one device.
        parts: the parts that are loaded; without text encoders, a `Conditioning` is given.
        platform: "gpu" or "cpu".
        attention: "auto" (cuDNN's for 16 bits on a GPU, else XLA's), "cudnn" or "xla".
        image: whether there are pictures to start from, which the autoencoder encodes.
        negative: whether there are negative prompts: the transformer runs twice per step, one pass
            after another, and the text encoders on twice as many prompts.

    Returns:
        Bytes of each part and of each program, and what they add up to.

    Raises:
        ValueError: an argument has none of these values.
        FileNotFoundError: there is no such model.

    Examples:
        >>> estimate = jitjax.estimate_memory("flux-dev", quantise="int8")
        >>> f"{estimate.device / 1e9:.1f} GB, {estimate.low_memory / 1e9:.1f} GB"
        '19.2 GB, 12.5 GB'
        >>> estimate.fits(24), estimate.fits(16), estimate.fits(16, low_memory=True)
        (True, False, True)
    """
    for name, value, allowed in (
        ("platform", platform, PLATFORMS),
        ("quantise", quantise, (None, *KINDS)),
        ("attention", attention, ("auto", "cudnn", "xla")),
    ):
        if value not in allowed:
            known = ", ".join(str(a) for a in allowed if a is not None)
            raise ValueError(f"{name} is {shown(value)}; expected one of {known}")
    found = find_model(model)
    chosen = tuple(part for part in PARTS if part in parts and part in found.parts)
    if "transformer" not in chosen or set(parts) - set(PARTS):
        raise ValueError(f"parts is {shown(tuple(parts))}; expected some of {PARTS}, one of them "
                         "the transformer")  # fmt: skip
    if found.quantise and quantise not in (None, found.quantise):
        raise ValueError(
            f"quantise is {quantise!r}, and {found.name!r} is stored as {found.quantise}; expected "
            "the same or nothing"
        )
    quantise = quantise or found.quantise
    default = found.dtype or ("float32" if platform == "cpu" else "bfloat16")
    name = _dtype_name(default if dtype is None else dtype)
    config, plan, divisions = found.config, get_plan(plan), Divisions.of(mesh)
    shapes = {path: leaf.shape for part in chosen for path, leaf in leaves(config, part).items()}
    check_axes(dataclasses.asdict(divisions), shapes)
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
    grid = token_grid(height, width, config)
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {shown(batch)}; expected 1 or more")
    is_16_bit = jnp.dtype(name).itemsize == 2
    if platform == "gpu" and is_16_bit and plan.pad_to == 1:
        plan = plan.replace(pad_to=8)  # as `plan_for_device`
    if attention == "auto":
        attention = "cudnn" if platform == "gpu" and is_16_bit else "xla"
    share = -(-batch // (divisions.data * divisions.fsdp))
    settings = Settings(
        config, grid, share, plan, name, quantise, divisions, platform, attention, negative
    )
    needed = [*programs.stages(settings)]
    if image and "autoencoder" in chosen:
        needed.insert(0, programs.image_encoder(settings))
    if {"t5", "clip"} <= set(chosen):
        needed.insert(0, programs.encoders(settings))
    if "autoencoder" in chosen:
        needed.append(programs.decoder(settings))
    one = Settings(config, grid, 1, plan, name, quantise, Divisions(), platform, attention)
    disk = found.disk or sum(one.weights(part) for part in chosen)
    return MemoryEstimate(
        found.name,
        settings,
        (height, width),
        {part: settings.weights(part) for part in chosen},
        tuple(needed),
        disk,
        max(READ_BYTES, largest_leaf(config, chosen, name, quantise)),
    )


def _dtype_name(dtype: DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name or shown(dtype)}; expected one of {', '.join(DTYPES)}")
    return name
