"""Steps are reported once each, when they are finished, and few are dispatched ahead."""

from __future__ import annotations

from jitjax.sampler.progress import STEPS_AHEAD, StepReports


class Step:
    """A state that is finished when it is waited for, or when it is told so."""

    def __init__(self, ready: bool = False) -> None:
        self.ready = ready
        self.waited = False

    def is_ready(self) -> bool:
        return self.ready

    def block_until_ready(self) -> None:
        self.waited = True


def test_finished_steps_are_reported_in_order_without_waiting():
    done = []
    reports = StepReports(done.append)
    first, second, third = Step(), Step(ready=True), Step()
    reports.add(first)
    reports.add(second)
    assert done == []
    first.ready = True
    reports.add(third)
    assert done == [1, 1]
    assert not third.waited
    reports.finish()
    assert done == [1, 1, 1]
    assert third.waited


def test_no_more_steps_are_ahead_than_allowed():
    done = []
    reports = StepReports(done.append)
    steps = [Step() for _ in range(STEPS_AHEAD + 2)]
    for step in steps:
        reports.add(step)
    assert [step.waited for step in steps] == [True] * 2 + [False] * STEPS_AHEAD
    assert len(done) == 2


def test_states_without_is_ready_are_waited_for():
    class Plain:
        waited = False

        def block_until_ready(self) -> None:
            self.waited = True

    done, step = [], Plain()
    StepReports(done.append).add(step)
    assert step.waited
    assert done == [1]
