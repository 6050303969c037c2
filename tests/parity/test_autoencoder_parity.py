"""The autoencoder against diffusers' `AutoencoderKL`, with weights converted by the rule table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from common import TOLERANCE, numpy_state, randomised, relative_error  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from jitjax.config import AutoencoderConfig  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.convert.tables import engine  # noqa: E402
from jitjax.convert.tables.autoencoder import autoencoder_rules  # noqa: E402
from jitjax.models import param_shapes  # noqa: E402
from jitjax.models.autoencoder import Autoencoder  # noqa: E402
from jitjax.nested import flatten  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    "as FLUX": AutoencoderConfig(
        latent_channels=5,
        block_out_channels=(8, 12, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
    ),
    "narrower below": AutoencoderConfig(
        in_channels=4,
        out_channels=2,
        latent_channels=3,
        block_out_channels=(9, 6, 12, 3),
        layers_per_block=1,
        norm_num_groups=3,
    ),
    "two levels": AutoencoderConfig(
        latent_channels=4, block_out_channels=(6, 6), layers_per_block=1, norm_num_groups=2
    ),
}


def reference(config: AutoencoderConfig):
    sizes = {name: getattr(config, name) for name in config.__dataclass_fields__}
    levels = len(config.block_out_channels)
    return diffusers.AutoencoderKL(
        **sizes,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@pytest.mark.parametrize(
    ("name", "batch"), [("as FLUX", 1), ("narrower below", 3), ("two levels", 3)]
)
def test_encode_decode(name: str, batch: int):
    config = CONFIGS[name]
    model = randomised(reference(config), seed=batch)
    with torch.no_grad():  # Let some log variances exceed either limit of the clip.
        model.encoder.conv_out.weight[config.latent_channels :] *= 20
    params = {"params": from_state("autoencoder", numpy_state(model), config)}
    rng = np.random.default_rng(batch)
    images = rng.uniform(-1, 1, (batch, 40, 24, config.in_channels)).astype(np.float32)
    latents = rng.standard_normal((batch, 5, 3, config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        distribution = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = model.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
    module = Autoencoder(config)
    with jax.default_matmul_precision("highest"):
        encode = jax.jit(lambda p, x: module.apply(p, x, method="encode"))
        decode = jax.jit(lambda p, x: module.apply(p, x, method="decode"))
        mean, logvar = encode(params, jnp.asarray(images))
        image = decode(params, jnp.asarray(latents))
    pairs = (mean, distribution.mean), (logvar, distribution.logvar), (image, decoded)
    errors = [relative_error(got, expected.permute(0, 2, 3, 1)) for got, expected in pairs]
    print(f"autoencoder {name}, {batch}:", *(f"{value:.1e}" for value in errors))
    assert max(errors) < TOLERANCE
    assert mean.shape == (batch, 40 // config.factor, 24 // config.factor, config.latent_channels)


def test_full_size_names_and_shapes():
    config = AutoencoderConfig()
    with torch.device("meta"):
        model = reference(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = engine.leaf_shapes(param_shapes.autoencoder(config))
    assert engine.expected_sources(autoencoder_rules(config), shapes) == state
    assert sum(p.numel() for p in model.parameters()) == 83_819_683


def test_diffusers_loads_inverted_rules(tmp_path):
    """diffusers loads the tensors of the inverted rule table, with no missing or unexpected key."""
    config = CONFIGS["narrower below"]
    model = randomised(reference(config), seed=0)
    leaves = flatten(from_state("autoencoder", numpy_state(model), config))
    tensors: dict[str, np.ndarray] = {}
    for rule in autoencoder_rules(config):
        tensors |= engine.invert_rule(rule, leaves[rule.target])
    model.save_config(tmp_path)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    loaded, info = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value, model.state_dict()[name], err_msg=name)
