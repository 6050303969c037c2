"""Helpers of the parity tests: torch models with random weights, and the relative error."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # More threads would only add overhead: the models are tiny.

TOLERANCE = 1e-4
"""Largest accepted relative error. Measured: 1e-6 from the order of float32 sums, and 1e-5 with
guidance embeddings, whose sinusoids have arguments in the thousands."""

EMBEDDINGS = ("embedding.", "embed_tokens", "shared", "relative_attention_bias")


def randomised(model, seed: int):
    """Fill the model with distinct random weights, so that swapped parameters change the output.

    Returns the model in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            elif any(part in name for part in EMBEDDINGS):
                value.copy_(noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.eval()


def numpy_state(model) -> dict[str, np.ndarray]:
    """The model's state dictionary as NumPy arrays."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def relative_error(got, expected) -> float:
    """Largest absolute difference, divided by the largest absolute expected value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())
