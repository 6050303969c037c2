"""Time per picture to expect of FLUX.1-dev on cards that have not been tried, from FLOPs and bytes.

    python -m benchmarks.expected_times

A time is the larger of two: the FLOPs of the transformer over what the card does of them, and the
bytes of its weights, read once per evaluation, over the card's bandwidth. An H200 has done
580 TFLOP/s in an evaluation of all tokens, of the 989 that its maker states; the same share is
taken for all. Encoding and decoding are left out.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.quality import flops
from jitjax.config import FluxConfig
from jitjax.memory import estimate_memory
from jitjax.sampler.plan import PLANS

SHARE = 580 / 989
"""FLOP/s of an evaluation over those that the maker states (docs/performance.md, an H200)."""
LINK = 25.0
"""GB/s of a copy from pinned host memory to a card: PCIe 4.0 with 16 lanes, about."""
BEGIN, END = "<!-- python -m benchmarks.expected_times -->", "<!-- end of times -->"
"""Lines of docs/scaling.md between which the table stands."""
SHOWN = ("dense", "multistep-12", "4x", "7x", "jit-14x")


class Card(NamedTuple):
    """A card, by its maker's data sheet.

    Attributes:
        name: its name.
        tflops: dense 16-bit TFLOP/s with float32 sums.
        bandwidth: GB/s of its memory.
        kind: quantisation with which FLUX.1-dev fits it, or None for bfloat16.
    """

    name: str
    tflops: float
    bandwidth: float
    kind: str | None


CARDS = (
    Card("T4, 16 GB", 65, 320, "int8"),
    Card("L4, 24 GB", 121, 300, "int8"),
    Card("RTX 4090, 24 GB", 165, 1008, "int8"),
    Card("A100, 40 GB", 312, 1555, None),
    Card("A100, 80 GB", 312, 2039, None),
    Card("H100 SXM, 80 GB", 989, 3350, None),
    Card("H200, 141 GB", 989, 4800, None),
)


def seconds(card: Card, plan: str) -> float:
    """Return the seconds of the transformer for one picture at 1024 px."""
    config = FluxConfig()
    tokens, text = (config.image_size // config.pixels_per_token) ** 2, config.text_length
    slots = flops.slots(PLANS[plan], tokens, text)
    computing = flops.run(config.transformer, slots, text) / (SHARE * card.tflops * 1e12)
    reading = len(slots) * _weights(card) / (card.bandwidth * 1e9)
    return max(computing, reading)


def _weights(card: Card) -> int:
    return estimate_memory("flux-dev", quantise=card.kind).parts["transformer"]


def table() -> str:
    """Return the table in Markdown."""
    titles = ["", "weights", *(f"`{plan}`" for plan in SHOWN), "one copy from the host"]
    lines = [titles, ["---"] * len(titles)]
    for card in CARDS:
        times = [f"{seconds(card, plan):.2g} s" for plan in SHOWN]
        copy = f"{_weights(card) / (LINK * 1e9):.2g} s"
        lines.append([card.name, card.kind or "bfloat16", *times, copy])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Print the table."""
    print(table(), end="")


if __name__ == "__main__":
    main()
