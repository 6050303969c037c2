"""The sampler against recordings of the authors' program (see golden/README.md)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import build

from jitjax.anchors import AnchorSet, activate, local_variance
from jitjax.checkpoint import FluxParams
from jitjax.config import CLIPConfig, FluxConfig, T5Config
from jitjax.denoise import denoise
from jitjax.lifter import Lifter
from jitjax.schedule import beta_sigmas
from jitjax.solve import microflow
from jitjax.text import Conditioning


def relative(got: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def params() -> FluxParams:
    transformer, config = build.recorded_transformer()
    whole = FluxConfig(
        transformer=config,
        t5=T5Config(d_model=config.joint_attention_dim),
        clip=CLIPConfig(hidden_size=config.pooled_projection_dim, num_attention_heads=4),
    )
    return FluxParams(transformer, {}, {}, {}, whole, "")


@pytest.mark.parametrize("pad_to", [1, 64])
@pytest.mark.parametrize("name", build.RECORDINGS)
def test_final_latents_are_those_of_the_authors_program(params, name, pad_to):
    arrays, plan = build.recording(name)
    conditioning = Conditioning(
        jnp.asarray(arrays["prompt_embeds"]), jnp.asarray(arrays["pooled_prompt_embeds"])
    )
    with jax.default_matmul_precision("highest"):
        out = denoise(
            params,
            conditioning,
            jnp.asarray(arrays["noise_tokens"]),
            plan=plan.replace(pad_to=pad_to),
            grid=tuple(arrays["grid"].tolist()),
            guidance=float(arrays["guidance"]),
            microflow_noise=jnp.asarray(arrays["microflow_noise"]),
            first_anchors=jnp.asarray(arrays["anchors_initial"]),
        )
    # Float32 on both sides; 18 steps of rounding in another order of summation.
    assert relative(out, arrays["latents_final"]) < 1e-4


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_each_transition_is_that_of_the_authors_program(name):
    arrays, plan = build.recording(name)
    grid = tuple(arrays["grid"].tolist())
    n = grid[0] * grid[1]
    index = jnp.asarray(arrays["anchors_initial"])[None]
    for k, end in enumerate(plan.stage_steps[:-1]):
        known, budget = plan.budgets(n)[k : k + 2]
        before, sigma = arrays["sigmas"][end - 1 : end + 1]
        y = jnp.asarray(arrays["states"][end - 1])
        # The velocity of the last step, from the two states around it.
        previous = jnp.asarray(arrays["states"][end - 2])
        u = (y - previous) / (sigma - before)
        importance = local_variance(u, grid)
        # u is a difference of states over a small step: it carries their rounding, enlarged.
        expected = arrays[f"importance_{k}"].reshape(1, -1)
        assert relative(importance, expected) < 1e-3
        anchors = AnchorSet.padded(index, known, n)
        clean = y - sigma * u
        assert relative(clean, arrays[f"x0_{k}"]) < 1e-4
        index, new = activate(anchors, jnp.asarray(expected), known, budget)
        order = np.sort if budget == n else np.asarray  # the program lists a full set in no order
        np.testing.assert_array_equal(order(index[0]), order(arrays[f"anchors_next_{k}"]))
        new = jnp.asarray(arrays[f"microflow_new_{k}"])[None]
        lifted = Lifter.build(anchors, grid)(
            anchors.gather(jnp.asarray(arrays[f"x0_{k}"])), grid, known / n
        )
        fresh = AnchorSet.padded(new, new.shape[1], n)
        noised = (1 - sigma) * lifted + sigma * jnp.asarray(arrays["microflow_noise"])
        target = fresh.gather(noised)
        assert relative(target, arrays[f"microflow_target_{k}"]) < 1e-6
        moved = microflow(plan, fresh.gather(y), target, jnp.float32(before), jnp.float32(sigma))
        after = fresh.scatter(y, moved)
        assert relative(after, arrays[f"microflow_after_{k}"]) < 1e-6


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_the_beta_schedule_is_that_of_the_authors_program(name):
    arrays, plan = build.recording(name)
    np.testing.assert_allclose(beta_sigmas(plan.steps), arrays["sigmas"], rtol=1e-6)
