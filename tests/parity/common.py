"""What the parity tests share: torch models with telling weights, and the measure of agreement."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

TOLERANCE = 1e-4
"""Of the largest value. 1e-6 is measured, and 1e-5 where sinusoids of guidance in the thousands go
in: float32 sums in another order."""

LOOKED_UP = ("embedding.", "embed_tokens", "shared", "relative_attention_bias")


def perturbed(model, seed: int):
    """The model for evaluation; no parameter has a value that another could stand in for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            elif any(part in name for part in LOOKED_UP):
                value.copy_(noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.eval()


def state_of(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def error(got, expected) -> float:
    """Largest difference over the largest value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())
