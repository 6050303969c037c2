"""What a run did, for plots, replays and tests."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int


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
