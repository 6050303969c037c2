"""What a run did, for plots, replays and tests."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jitjax.sampler.lifter import Lifter


class Transition(NamedTuple):
    """What happened between two stages.

    Attributes:
        scores: by which new anchors were chosen (the importance, unless the plan says otherwise).
        lifted: the clean prediction x0 of the old anchors, lifted to all tokens.
        new: the new anchors, highest score first.
        target: the state that the micro-flow moves them towards.
        before, after: states of all tokens.
    """

    scores: Float[Array, "b n"]
    lifted: Float[Array, "b n d"]
    new: Int[Array, "b new"]
    target: Float[Array, "b new d"]
    before: Float[Array, "b n d"]
    after: Float[Array, "b n d"]


class Trace(NamedTuple):
    """What a run did.

    Attributes:
        states: after each step, before any transition that follows it.
        anchors: per stage, [b, k]; all tokens in a dense stage.
        clean: clean prediction x0 at the end of each stage.
        transitions: one fewer than stages; None where the next stage has no new anchors.
        slots: tokens that the network saw per step, padding included, text not.
        evaluations: how often the network was evaluated; None for a solver of unknown cost.
    """

    states: Float[Array, "steps b n d"]
    anchors: tuple[Int[Array, "b k"], ...]
    clean: tuple[Float[Array, "b n d"], ...]
    transitions: tuple[Transition | None, ...]
    slots: tuple[int, ...]
    evaluations: int | None


class Recorder:
    """Collects a `Trace` stage by stage."""

    def __init__(self) -> None:
        self.states: list[Array] = []
        self.anchors: list[Array] = []
        self.clean: list[Array] = []
        self.transitions: list[Transition | None] = []
        self.slots: list[int] = []

    def stage(
        self, states: Array | None, anchors: Array | None, clean: Array, lifter: Lifter | None
    ) -> None:
        """A stage is over; `anchors` and `lifter` are None if all tokens ran."""
        assert states is not None
        b, n, _ = clean.shape
        everywhere = jnp.broadcast_to(jnp.arange(n), (b, n))
        self.states.append(states)
        self.anchors.append(everywhere if anchors is None else anchors)
        self.clean.append(clean)
        slots = n if lifter is None else lifter.anchors.index.shape[1]
        self.slots += [slots] * states.shape[0]

    def trace(self, evaluations_per_step: int | None) -> Trace:
        """All of it."""
        cost = evaluations_per_step
        return Trace(
            jnp.concatenate(self.states),
            tuple(self.anchors),
            tuple(self.clean),
            tuple(self.transitions),
            tuple(self.slots),
            None if cost is None else cost * len(self.slots),
        )
