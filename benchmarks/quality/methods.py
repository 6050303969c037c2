"""What is compared: plans of this project, dense solves of fewer steps, and two peers."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial

import jitjax
from benchmarks.quality import flops, peers
from benchmarks.quality.prompts import prompts
from jitjax.config import TransformerConfig
from jitjax.denoise import FluxVelocity, flux_sigmas
from jitjax.latents import draw_noise
from jitjax.models.flux import EMBEDDING_SCALE
from jitjax.models.layers import MLP, modulate, sinusoidal_embedding
from jitjax.sampler.grid import Grid, positions
from jitjax.sampler.plan import PLANS, Plan, get_plan

REFERENCE = "dense-50"
PEER_STEPS = 28
"""Steps that the peers skip evaluations of, as in the paper's table."""
VARIANTS = {
    "random": {"activation": "random"},
    "grid": {"activation": "grid"},
    "no-lift": {"lift": "none"},
    "no-microflow": {"microflow": "none"},
    "hit-initial": {"microflow": "hit", "microflow_noise": "initial"},
    "hit-fresh": {"microflow": "hit"},
    "blend-initial": {"microflow_noise": "initial"},
    "narrow": {"lift": "narrow"},
    "linear": {"lift": "linear"},
    "nearest": {"lift": "nearest"},
    "dither": {"fill": "dither"},
    "shifted": {"schedule": "shifted"},
}


@dataclass(frozen=True)
class Method:
    """A `plan`; or, with `peer`, that peer at `evaluations` of the plan's steps."""

    plan: Plan
    peer: str = ""
    evaluations: int = 0


def parse_plan(text: str) -> Plan:
    """NAME or NAME:FIELD=VALUE:..., such as 4x:lift=linear or "4x:densities=(0.5,1):steps=12".

    Raises:
        ValueError: no such plan, no such field, or a value that the field cannot have.
    """
    name, *changes = text.split(":")
    known, changed = {field.name for field in fields(Plan)}, {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in known:
            raise ValueError(f"{text!r} changes {field!r}; expected FIELD=VALUE of {sorted(known)}")
        try:
            changed[field] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            changed[field] = value  # a word
    return get_plan(name).replace(**changed)


def matched_steps(config: TransformerConfig, plan: Plan, tokens: int, text: int) -> int:
    """Dense steps nearest in operations to a picture by `plan`."""
    whole = flops.run(config, flops.slots(plan, tokens, text), text)
    return round(whole / flops.forward(config, tokens, text))


def all_methods(config: TransformerConfig, tokens: int, text: int) -> dict[str, Method]:
    """Every method by name; what "matched" means depends on the picture's size."""
    found = {
        f"dense-{steps}": Method(Plan(steps, schedule="shifted"))
        for steps in (50, 28, 18, 12, 11, 7)
    }
    for name in PLANS:
        if name == "dense":
            continue
        plan = PLANS[name]
        found[name] = Method(plan)
        steps = matched_steps(config, plan, tokens, text)
        found[f"dense-{steps}"] = Method(Plan(steps, schedule="shifted"))
        found[f"dense-{steps}-beta"] = Method(Plan(steps))
        for peer in ("teacache", "taylor"):
            found[f"{peer}-{steps}"] = Method(Plan(PEER_STEPS, schedule="shifted"), peer, steps)
        for variant, changes in VARIANTS.items():
            # Our own plans were chosen among such variants.
            if not name.startswith("tuned") and plan.replace(**changes) != plan:
                found[f"{name}:{variant}"] = Method(plan.replace(**changes))
    return found


def modulated_input(
    tokens: Float[Array, "b n c"], sigma: Array, args: tuple[dict, jitjax.Conditioning, Array]
) -> Array:
    """What the first block makes of the tokens at `sigma`: TeaCache's indicator for FLUX."""
    params, conditioning, guidance = args

    def vector(name: str, value: Array) -> Array:
        hidden = params["image_in"]["bias"].shape[0]
        made = MLP(hidden, hidden, "silu").apply({"params": params[name]}, value)
        assert isinstance(made, jax.Array)
        return made

    def scalar(name: str, value: Array) -> Array:
        value = jnp.broadcast_to(value, tokens.shape[:1])
        return vector(name, sinusoidal_embedding(value * EMBEDDING_SCALE))

    told = scalar("sigma_in", sigma) + vector("pooled_in", conditioning.pooled)
    if "guidance_in" in params:
        told = told + scalar("guidance_in", guidance)
    first = jax.tree.map(lambda leaf: leaf[0], params["double_blocks"]["image_modulation"])
    parts = jnp.einsum("bh,hpk->bpk", jax.nn.silu(told), first["kernel"]) + first["bias"][None]
    image = tokens @ params["image_in"]["kernel"] + params["image_in"]["bias"][None, None]
    return modulate(image, parts[:, 0], parts[:, 1])


class Runner:
    """Makes pictures' tokens by any method, and says what they cost.

    Args:
        params: parameters.
        grid: rows and columns of tokens.
        guidance: strength of the guidance embedding.
    """

    def __init__(self, params: jitjax.FluxParams, grid: Grid, guidance: float = 3.5):
        self.params, self.grid, self.guidance = params, grid, guidance
        self.tokens = grid[0] * grid[1]
        self.velocity = FluxVelocity(params.config.transformer)
        self.rules: dict[int, tuple[Polynomial, float]] = {}
        self.curve: tuple[np.ndarray, np.ndarray] | None = None
        self._evaluate = jax.jit(self._everywhere)
        self._indicate = jax.jit(modulated_input)

    def _everywhere(self, tokens: Array, sigma: Array, args: Any) -> Array:
        places = positions(jnp.arange(self.tokens), self.grid)
        places = jnp.broadcast_to(places, (tokens.shape[0], *places.shape))
        return self.velocity(tokens, places, sigma, None, args)

    def sigmas(self, plan: Plan) -> Array:
        """The plan's noise levels, [steps + 1]."""
        return jnp.asarray(flux_sigmas(plan, self.tokens, self.params.config))

    def __call__(
        self,
        method: Method,
        conditioning: jitjax.Conditioning,
        noise: Float[Array, "b n d"],
        keys: Array,
    ) -> tuple[Float[Array, "b n d"], Sequence[int]]:
        """Clean tokens, and the number of image tokens in each evaluation."""
        plan = method.plan
        if not method.peer:
            tokens = jitjax.denoise(
                self.params, conditioning, noise, plan=plan, grid=self.grid,
                guidance=self.guidance, key=keys,
            )  # fmt: skip
            return tokens, flops.slots(plan, self.tokens, conditioning.text.shape[1])
        evaluate, indicate = self._functions(conditioning)
        sigmas = self.sigmas(plan)
        if method.peer == "taylor":
            steps = peers.evaluated_steps(plan.steps, method.evaluations)
            tokens, evaluations = peers.taylor(evaluate, noise, sigmas, steps)
        else:
            rule = self.rule(method)
            tokens, evaluations = peers.teacache(evaluate, indicate, noise, sigmas, *rule)
        return tokens, [self.tokens] * evaluations

    def _functions(
        self, conditioning: jitjax.Conditioning
    ) -> tuple[peers.Evaluate, peers.Evaluate]:
        guidance = jnp.full(conditioning.text.shape[:1], self.guidance)
        args = self.params.transformer, conditioning, guidance
        return (
            lambda tokens, sigma: self._evaluate(tokens, sigma, args),
            lambda tokens, sigma: self._indicate(tokens, sigma, args),
        )

    def rule(self, method: Method) -> tuple[Polynomial, float]:
        """TeaCache's polynomial and threshold, fitted on prompts of the development split."""
        if method.evaluations not in self.rules:
            chosen = prompts(1, "dev", seeds=1)[:4]
            conditioning = jitjax.encode_prompt(self.params, [p.text for p in chosen])
            keys = jnp.stack([jax.random.key(p.seeds[0]) for p in chosen])
            noise = draw_noise(keys, self.grid, self.params.config.transformer.in_channels)
            given = (*self._functions(conditioning), noise, self.sigmas(method.plan))
            self.curve = self.curve or peers.changes(*given)
            rescale = peers.calibrate(*self.curve)
            highest = float(np.abs(rescale(self.curve[0])).sum())
            threshold = peers.find_threshold(
                lambda threshold: peers.teacache(*given, rescale, threshold)[1],
                method.evaluations,
                highest,
            )
            self.rules[method.evaluations] = rescale, threshold
        return self.rules[method.evaluations]
