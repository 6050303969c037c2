"""The rule table of the original release against diffusers' conversion of that release."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)

from jitjax.config import AutoencoderConfig, TransformerConfig  # noqa: E402
from jitjax.convert.components import component_of  # noqa: E402
from jitjax.convert.original import (  # noqa: E402
    autoencoder_parts,
    original_shapes,
    transformer_parts,
)

pytestmark = pytest.mark.parity


def distinct_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of `shapes` in which no value occurs twice."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return tensors


def assert_same(parts, shapes, original, expected) -> None:
    assert parts.keys() == shapes.keys() == expected.keys()
    for name, part in parts.items():
        tensor = original[part.source]
        if part.rows:
            tensor = torch.cat([tensor[start:stop] for start, stop in part.rows])
        assert torch.equal(tensor.reshape(shapes[name]), expected[name]), name


@pytest.mark.parametrize("guidance", [True, False])
def test_transformer(guidance):
    # diffusers splits the rows at FLUX's full width; one column of each matrix is enough.
    config = TransformerConfig(num_layers=2, num_single_layers=2, guidance_embeds=guidance)
    shapes = {
        name: (shape[0], *(1,) * (len(shape) - 1))
        for name, shape in component_of("transformer").source_shapes(config).items()
    }
    parts = transformer_parts(config)
    original = distinct_tensors(original_shapes(parts, shapes))
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert_same(parts, shapes, original, expected)


def test_autoencoder():
    config = AutoencoderConfig(block_out_channels=(4, 8, 8), norm_num_groups=2, latent_channels=3)
    shapes = component_of("autoencoder").source_shapes(config)
    parts = autoencoder_parts(config)
    original = distinct_tensors(original_shapes(parts, shapes))
    levels = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    expected = convert_ldm_vae_checkpoint(dict(original), levels)
    assert_same(parts, shapes, original, expected)
