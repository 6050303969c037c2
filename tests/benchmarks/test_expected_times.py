"""The table of expected times: its formula, and the documentation that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import expected_times

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_times_measured_on_an_h200():
    """docs/performance.md: 6.58 s, 1.64 s and 0.98 s."""
    card = next(card for card in expected_times.CARDS if card.name.startswith("H200"))
    for plan, measured in (("dense", 6.58), ("4x", 1.64), ("7x", 0.98)):
        assert expected_times.seconds(card, plan) == pytest.approx(measured, rel=0.07)


def test_a_slow_memory_is_the_limit():
    """50 evaluations that read 23.8 GB at 1 GB/s."""
    card = expected_times.Card("slow", 1e9, 1.0, None)
    assert expected_times.seconds(card, "dense") == pytest.approx(50 * 23.8, rel=0.01)


@pytest.mark.slow
def test_the_table_of_the_documentation():
    """If this fails: `python -m benchmarks.expected_times` prints what belongs there."""
    page = PAGE.read_text()
    block = page.split(expected_times.BEGIN)[1].split(expected_times.END)[0]
    assert block.strip() == expected_times.table().strip()
