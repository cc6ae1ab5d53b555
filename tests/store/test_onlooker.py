"""The axis so far: seen while a store fills, for whoever watches, and without a say in anything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from persona_ray.errors import RetryableError
from persona_ray.reduce.convergence import LookRule
from persona_ray.reduce.vectors import Filter
from persona_ray.report.watch import Watched
from persona_ray.stopping import Onlooker, PrefixAxis
from persona_ray.store.reader import open_store
from tests.store.conftest import Toy

TOY = Toy(rows=96, unit_rows=4)


def prefix_of(url: str, toy: Toy = TOY, judge: Callable[[object], None] = lambda _: None) -> PrefixAxis:
    return PrefixAxis(
        store=open_store(url),
        order=tuple(toy.plan.units),
        archetypes=toy.archetypes,
        keep=Filter(None, 2),
        judge_name=None,
        judge=judge,
        layers=(3,),
        rule=LookRule(2),
    )


def looked_at(url: str) -> int:
    look = open_store(url).latest_look()
    return 0 if look is None else look.rows_per_archetype


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_looks_follow_the_longest_complete_beginning_and_end_nothing(tmp_path: Path) -> None:
    url = TOY.fill(tmp_path / "store", range(9))
    with Onlooker(prefix_of(url), every_s=0.01) as axis:
        until(lambda: looked_at(url) > 0)
        first = looked_at(url)
        TOY.fill(url, range(14, 24))  # not the next ones in the order of the work
        TOY.fill(url, range(9, 13))
        until(lambda: looked_at(url) > first)
        assert axis.reason is None
    assert looked_at(url) <= 13 * 4 // 3 + 1, "of what comes behind the gap nothing counts"
    found = Watched(store_url=url).look()["store"]["axis_so_far"]
    assert found["layers"] == (3,)
    assert 0 <= found["expected_cosine"][0] <= 1


def test_what_goes_wrong_with_looking_is_told_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = TOY.fill(tmp_path / "store", range(4))
    asked = []

    def broken(units: object) -> None:
        asked.append(units)
        raise RetryableError("no judge answers")

    with caplog.at_level(logging.WARNING), Onlooker(prefix_of(url, judge=broken), every_s=0.01) as axis:
        until(lambda: bool(asked))
        assert axis.reason is None
    assert "the axis so far could not be looked at to the end (no judge answers)" in caplog.text
    assert looked_at(url) == 0


def test_a_run_that_ends_does_not_wait_for_what_is_left_to_look_at(tmp_path: Path) -> None:
    toy = Toy(rows=4 * 80, unit_rows=4)
    prefix = prefix_of(toy.fill(tmp_path / "store"), toy)
    answers = iter([False, True])
    assert prefix.advance(lambda: next(answers)) is None
    assert prefix.num_units == 32
    assert prefix.advance() is None
    assert prefix.num_units == 80
