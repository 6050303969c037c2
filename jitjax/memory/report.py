"""What `jitjax memory` prints, and the table "what fits where" of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jitjax.memory.estimate import CARDS, USABLE, MemoryEstimate, estimate_memory

TITLES = {
    "transformer": "transformer",
    "t5": "T5",
    "clip": "CLIP",
    "autoencoder": "autoencoder",
}


def text_report(estimate: MemoryEstimate) -> str:
    """Return the lines that `jitjax memory` prints."""
    s, (height, width) = estimate.settings, estimate.size
    mesh = s.divisions
    batch = s.batch * mesh.data * mesh.fsdp
    header = [f"{estimate.name}, {width} x {height} pixels, batch {batch}, {s.dtype}"]
    header += [f"{s.quantise} kernels"] if s.quantise else []
    header += ["negative prompts"] if s.guided else []
    if mesh.devices > 1:
        header.append(
            f"{mesh.devices} devices (data {mesh.data} x fsdp {mesh.fsdp} x model {mesh.model}), "
            "bytes of each"
        )
    unit, divisor = _unit(estimate)

    def amount(number: float) -> str:
        return f"{number / divisor:.2f}"

    rows = [(f"{unit} on the device", "parameters", "inputs", "temporaries", "results", "together")]
    rows += [
        (p.name, *(amount(n) for n in (p.weights, p.inputs, p.temporaries, p.outputs, p.total)))
        for p in estimate.programs
    ]
    parts = ", ".join(f"{TITLES[part]} {amount(n)}" for part, n in estimate.parts.items())
    columns = [
        (unit, "device", "host", "disk", *(f"{card} GB" for card in CARDS)),
        (
            "everything on the device",
            *map(amount, (estimate.device, estimate.host, estimate.disk)),
            *_verdicts(estimate, low_memory=False),
        ),
        (
            "low memory: one part at a time",
            *map(amount, (estimate.low_memory, estimate.host_low_memory, estimate.disk)),
            *_verdicts(estimate, low_memory=True),
        ),
    ]
    return "\n".join(
        [
            ", ".join(header),
            f"{unit} of parameters: {parts}",
            "",
            *_aligned(rows),
            "",
            *_aligned(columns),
            "",
            assumptions(estimate),
        ]
    )


def assumptions(estimate: MemoryEstimate) -> str:
    """Say what the figures assume."""
    fits = f"A card fits if {USABLE:.0%} of its GB (10**9 bytes) are enough."
    if estimate.settings.platform == "cpu":
        return (
            f"For a CPU: XLA copies a block's kernels, attention takes a head at a time. {fits}\n"
            "In float32 within 10 % of XLA's own account; other dtypes are computed, not measured."
        )
    attention = {
        "cudnn": "cuDNN's attention (no logits; Ampere or newer)",
        "xla": "XLA's attention (logits of some queries at a time)",
    }[estimate.settings.attention]
    return (
        f"Computed for a GPU, not measured: {attention}; kernels are read in place (jax 0.11 or "
        f"newer).\n{fits}"
    )


def _verdicts(estimate: MemoryEstimate, *, low_memory: bool) -> list[str]:
    return ["yes" if estimate.fits(card, low_memory=low_memory) else "no" for card in CARDS]


def _unit(estimate: MemoryEstimate) -> tuple[str, float]:
    """Return the unit of the report, and its bytes."""
    return ("GB", 1e9) if estimate.device >= 1e9 else ("MB", 1e6)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


class Row(NamedTuple):
    """A row of the table: its title, and the arguments of `estimate_memory`."""

    title: str
    arguments: dict[str, Any]


WITHOUT_ENCODERS = ("transformer", "autoencoder")
ROWS = (
    Row("FLUX.1-dev, bfloat16", {}),
    Row("FLUX.1-dev, bfloat16, 4 pictures", {"batch": 4, "plan": "4x"}),
    Row("FLUX.1-dev, bfloat16, on each of 2 cards", {"mesh": {"model": 2}}),
    Row("FLUX.1-dev, int8", {"quantise": "int8"}),
    Row("FLUX.1-dev, int8, prompts encoded before", {"quantise": "int8",
                                                     "parts": WITHOUT_ENCODERS}),
    Row("FLUX.1-dev, int4", {"quantise": "int4"}),
)  # fmt: skip
"""Rows of the table; one picture at 1024 px with the default plan, unless the title says more."""
BEGIN, END = "<!-- jitjax memory --table -->", "<!-- end -->"
"""Lines of a page between which the table stands."""


def what_fits() -> str:
    """Return the table "what fits where" in Markdown."""
    titles = ["", "disk", "host", "device", "device, low memory", *(f"{card} GB" for card in CARDS)]
    lines = [titles, ["---"] * len(titles)]
    for row in ROWS:
        estimate = estimate_memory("flux-dev", **row.arguments)
        needs = (estimate.disk, estimate.host, estimate.device, estimate.low_memory)
        lines.append([row.title, *(f"{n / 1e9:.1f}" for n in needs), *_kinds(estimate)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _kinds(estimate: MemoryEstimate) -> list[str]:
    """Say for each card whether all parts fit, or one at a time."""
    return [
        "yes" if estimate.fits(card) else "low memory" if estimate.fits(card, low_memory=True)
        else "no"
        for card in CARDS
    ]  # fmt: skip


def with_table(page: str) -> str:
    """Return the text of a page with the present table between its markers.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page has no place for the table; expected {BEGIN}, then {END}, once")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{what_fits()}\n{END}{rest.split(END)[1]}"
