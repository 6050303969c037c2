"""The comparison with PyTorch on a CPU runs, and its two sides agree."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import torch_cpu

pytestmark = pytest.mark.parity


def test_both_sides_agree(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = f"--models tiny middle --tokens 64 --rounds 1 --processor-time --out {out}"
    monkeypatch.setattr("sys.argv", ["torch_cpu", *arguments.split()])
    torch_cpu.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["tiny", "middle"]
    for row in rows:
        assert 0 < row["error"] < 1e-5  # one side compared with itself has none
        assert row["ratio"] == pytest.approx(row["jax_seconds"] / row["torch_seconds"])


def test_a_wrong_weight_is_noticed(monkeypatch):
    def with_another_weight(name: str):
        model = load(name)
        calls = torch_cpu.calls

        def changed(*args):
            pair = calls(*args)  # JAX's weights are copied here
            model.proj_out.bias.data = model.proj_out.bias.data + 0.1
            return pair

        monkeypatch.setattr(torch_cpu, "calls", changed)
        return model

    load = torch_cpu.load_reference
    monkeypatch.setattr(torch_cpu, "load_reference", with_another_weight)
    monkeypatch.setattr("sys.argv", ["torch_cpu", "--models", "tiny", "--tokens", "64"])
    with pytest.raises(SystemExit, match=r"expected up to 0\.0001"):
        torch_cpu.main()
