"""What a driver knows of other drivers. Whole runs are in tests/cluster."""

from __future__ import annotations

from typing import Any, cast

from persona_ray.scheduler.driver import Driver
from persona_ray.scheduler.events import UnitsFound
from persona_ray.scheduler.state import SchedulerState


def test_units_that_another_run_has_committed_meanwhile_are_counted_once_and_own_repetitions_are_not() -> None:
    state = SchedulerState(dict.fromkeys(range(5), 4))
    driver = Driver(state, {}, cast("Any", None))
    state.handle(UnitsFound(frozenset({1})), 0.0)  # the ledger has told already; what is computed here all the same is double
    for unit, is_ours in ((0, True), (1, False), (1, False), (2, True), (2, False), (3, False), (3, True)):
        driver._count_double(unit, is_ours=is_ours)
    assert driver.double == {1}
