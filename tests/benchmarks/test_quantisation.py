"""The benchmark of quantised weights, in small."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import quantisation
from jitjax.models.quantised import KINDS


@pytest.mark.slow
def test_errors_grow_with_the_rounding():
    rows = {row["kind"]: np.array(row["errors"]) for row in quantisation.errors("tiny", 64)}
    assert rows.keys() == {"bfloat16", *KINDS}
    assert (rows["bfloat16"] > 0).all()
    assert (rows["int8"] < rows["float8"]).all()
    assert (rows["float8"] < rows["int4"]).all()
    assert (rows["int4"] < 0.5).all()


@pytest.mark.slow
def test_files_have_the_bytes_of_memory():
    rows = {row["kind"]: row for row in quantisation.sizes("tiny")}
    for row in rows.values():
        assert row["memory"] < row["disk"] < row["memory"] + 2**17  # metadata of 56 arrays
    assert rows["int4"]["memory"] < 0.6 * rows["int8"]["memory"] < 0.4 * rows[None]["memory"]


def test_rounding_again_loses_small_updates():
    lost = {(r["kind"], r["share"]): r["lost"] for r in quantisation.lora_losses("tiny")}
    for kind in KINDS:
        assert lost[kind, 0.01] > 0.7
        assert lost[kind, 0.1] < lost[kind, 0.01]
