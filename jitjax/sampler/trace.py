"""The record of a run, for plots, replays and tests."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jitjax.sampler.lifter import Lifter


class Transition(NamedTuple):
    """The record of a transition between two stages.

    Attributes:
        scores: scores by which the new anchors were chosen; the importance by default (paper, ITA).
        lifted: the clean prediction x0 on the old anchors, lifted to all tokens.
        new: token indices of the new anchors, from 0 to n - 1, highest score first.
        target: target state of the new anchors' micro-flow (paper, DMF).
        before: state of all tokens before the transition.
        after: state of all tokens after the transition.
    """

    scores: Float[Array, "b n"]
    lifted: Float[Array, "b n d"]
    new: Int[Array, "b new"]
    target: Float[Array, "b new d"]
    before: Float[Array, "b n d"]
    after: Float[Array, "b n d"]


class Trace(NamedTuple):
    """The record of a run.

    Attributes:
        states: state after each step, before any transition that follows the step.
        anchors: token indices of each stage's anchors, from 0 to n - 1; all of them in a dense
            stage. Where masks of one batch differ in size, n in unused slots.
        clean: clean prediction x0 at the end of each stage.
        transitions: the transition after each stage but the last; None if it adds no anchors.
        slots: number of slots that the network ran on in each step, padding included, text
            excluded.
        evaluations: number of network evaluations; None if it is unknown for the solver.
        start: state before the first step.
        sigmas: sigmas at the step boundaries, decreasing in [0, 1]; `states[i]` is at
            `sigmas[i + 1]`.
        stage_steps: number of steps of each stage.
    """

    states: Float[Array, "steps b n d"]
    anchors: tuple[Int[Array, "b k"], ...]
    clean: tuple[Float[Array, "b n d"], ...]
    transitions: tuple[Transition | None, ...]
    slots: tuple[int, ...]
    evaluations: int | None
    start: Float[Array, "b n d"]
    sigmas: Float[Array, " levels"]
    stage_steps: tuple[int, ...]

    def predictions(self) -> Float[Array, "steps b n d"]:
        """Compute the clean prediction of each step: where its straight line meets sigma 0.

        For Euler's method it is x0 of the network. A multistep solver has extrapolated it.

        Returns:
            Clean tokens, one per step, for `jitjax.decode`.
        """
        before = jnp.concatenate([self.start[None], self.states[:-1]])
        first = 0
        for steps, transition in zip(self.stage_steps[:-1], self.transitions, strict=True):
            first += steps
            if transition is not None:
                before = before.at[first].set(transition.after)
        sigma, end = (
            jnp.asarray(x)[:, None, None, None] for x in (self.sigmas[:-1], self.sigmas[1:])
        )
        return before - sigma * (self.states - before) / (end - sigma)


class Recorder:
    """Collects a `Trace` stage by stage.

    Args:
        start: state before the first step.
        sigmas: sigmas at the step boundaries.
    """

    def __init__(self, start: Array, sigmas: Array) -> None:
        self.start, self.sigmas = start, sigmas
        self.states: list[Array] = []
        self.anchors: list[Array] = []
        self.clean: list[Array] = []
        self.transitions: list[Transition | None] = []
        self.slots: list[int] = []

    def add_stage(
        self, states: Array | None, anchors: Array | None, clean: Array, lifter: Lifter | None
    ) -> None:
        """Add a completed stage.

        Args:
            states: state after each step of the stage.
            anchors: token indices of the stage's anchors; None if all tokens ran.
            clean: clean prediction at the end of the stage.
            lifter: the stage's lifter; None if all tokens ran.
        """
        assert states is not None
        b, n, _ = clean.shape
        all_tokens = jnp.broadcast_to(jnp.arange(n), (b, n))
        self.states.append(states)
        self.anchors.append(all_tokens if anchors is None else anchors)
        self.clean.append(clean)
        slots = n if lifter is None else lifter.anchors.index.shape[1]
        self.slots += [slots] * states.shape[0]

    def to_trace(self, evaluations_per_step: int | None) -> Trace:
        """Build the trace of the stages and transitions added so far."""
        evaluations = None
        if evaluations_per_step is not None:
            evaluations = evaluations_per_step * len(self.slots)
        return Trace(
            jnp.concatenate(self.states),
            tuple(self.anchors),
            tuple(self.clean),
            tuple(self.transitions),
            tuple(self.slots),
            evaluations,
            self.start,
            self.sigmas,
            tuple(states.shape[0] for states in self.states),
        )
