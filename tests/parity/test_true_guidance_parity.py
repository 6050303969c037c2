"""True classifier-free guidance against diffusers' `FluxPipeline`, with negative prompts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from common import numpy_state, randomised, relative_error  # noqa: E402

import jitjax  # noqa: E402
from jitjax.config import TransformerConfig  # noqa: E402
from jitjax.convert.components import from_state  # noqa: E402
from jitjax.loading import BUNDLED  # noqa: E402
from jitjax.sampler.plan import Plan  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS = ["a large red circle", "a small blue striped star on a plain grey background"]
NEGATIVES = ["striped", "a blue square"]
ROWS, COLUMNS = 8, 12
STEPS = 4


@pytest.fixture(scope="module", params=["tiny", "random, no guidance embedding"])
def models(request):
    """The pipeline and the parameters of one model."""
    import diffusers

    torch.set_num_threads(1)
    pipeline = diffusers.FluxPipeline.from_pretrained(BUNDLED / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    params = jitjax.load("tiny")
    if request.param == "tiny":
        return pipeline, params
    config = TransformerConfig(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=params.config.t5.d_model,
        pooled_projection_dim=params.config.clip.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    network = randomised(diffusers.FluxTransformer2DModel(**dataclasses.asdict(config)), 0)
    pipeline.register_modules(transformer=network)
    return pipeline, dataclasses.replace(
        params,
        config=dataclasses.replace(params.config, transformer=config),
        transformer=from_state("transformer", numpy_state(network), config),
    )


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_dense_latents_equal_the_pipelines(models, scale):
    pipeline, params = models
    tokens = np.random.default_rng(0).normal(size=(2, ROWS * COLUMNS, 64)).astype(np.float32)
    with torch.no_grad():
        expected = pipeline(
            prompt=PROMPTS,
            negative_prompt=NEGATIVES,
            true_cfg_scale=scale,
            latents=torch.from_numpy(tokens),
            height=16 * ROWS,
            width=16 * COLUMNS,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            max_sequence_length=params.config.text_length,
            output_type="latent",
            return_dict=False,
        )[0].numpy()
    with jax.default_matmul_precision("highest"):
        got = jitjax.denoise(
            params,
            jitjax.encode_prompt(params, PROMPTS),
            jnp.asarray(tokens),
            plan=Plan(STEPS, schedule="shifted"),
            grid=(ROWS, COLUMNS),
            negative=jitjax.encode_prompt(params, NEGATIVES),
            true_guidance=scale,
        )
    error = relative_error(got, expected)
    print(f"scale {scale}: latents {error:.1e} relative")
    assert error < 1e-3
