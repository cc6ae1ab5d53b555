"""The state machine alone: no Ray, no clock. Invariants are checked after every event."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import StateError
from persona_ray.scheduler.state import Event, ReplicaLost, ReplicaReady, Run, SchedulerState, UnitFailed, UnitStored


class Checked:
    """A state that is validated after every event."""

    def __init__(self, units: range | list[int], **settings: int) -> None:
        self.state = SchedulerState(units, **settings)

    def __call__(self, event: Event) -> list[Run]:
        instructions = self.state.handle(event)
        self.state.validate()
        return instructions


def test_units_go_out_in_order_and_the_least_loaded_replica_is_served_first() -> None:
    handle = Checked(range(5), units_per_replica=2)
    assert handle(ReplicaReady(7)) == [Run(7, 0), Run(7, 1)]
    assert handle(ReplicaReady(3)) == [Run(3, 2), Run(3, 3)]
    assert handle(UnitStored(7, 1)) == [Run(7, 4)]


def test_a_lost_replicas_units_go_to_others_first() -> None:
    handle = Checked(range(4), units_per_replica=2)
    handle(ReplicaReady(0))
    assert handle(ReplicaLost(0, "gone")) == []
    assert handle(ReplicaReady(1)) == [Run(1, 0), Run(1, 1)]


def test_a_unit_that_fails_everywhere_is_given_up_with_its_reason_and_the_others_are_done() -> None:
    handle = Checked([0, 1], max_attempts=3)
    instructions = handle(ReplicaReady(0))
    while instructions:
        (run,) = instructions
        instructions = handle(UnitFailed(0, 0, "it will not") if run.unit == 0 else UnitStored(0, run.unit))
    assert handle.state.is_done
    assert handle.state.given_up == {0: "it will not"}
    assert handle.state.stored == {1}


def test_reports_of_units_that_a_replica_does_not_hold_are_a_defect() -> None:
    handle = Checked([0])
    handle(ReplicaReady(0))
    handle(UnitStored(0, 0))
    with pytest.raises(StateError, match="does not hold"):
        handle.state.handle(UnitStored(0, 0))


@given(data=st.data(), num_units=st.integers(0, 12), num_replicas=st.integers(1, 4), slots=st.integers(1, 3))
def test_whatever_happens_every_unit_ends_stored_or_given_up(data: st.DataObject, num_units: int, num_replicas: int, slots: int) -> None:
    handle = Checked(range(num_units), units_per_replica=slots, max_attempts=3)
    for replica in range(num_replicas):
        handle(ReplicaReady(replica))
    state = handle.state
    for _ in range(400):
        if state.is_done:
            break
        held = [(replica, unit) for replica, units in state.running.items() for unit in sorted(units)]
        away = [replica for replica in range(num_replicas) if replica not in state.running]
        choices: list[Event] = [UnitStored(*pair) for pair in held] + [UnitFailed(*pair, "x") for pair in held]
        choices += [ReplicaLost(replica, "x") for replica in state.running] + [ReplicaReady(replica) for replica in away]
        handle(data.draw(st.sampled_from(choices)))
    if state.is_done:
        assert state.stored | set(state.given_up) == set(range(num_units))
        assert not state.stored & set(state.given_up)
