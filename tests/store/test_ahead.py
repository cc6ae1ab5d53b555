"""Reading ahead: never out of order, never more than was agreed, and an error where it belongs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.store.ahead import read_ahead

PATIENCE_S = 60.0


class Reads:
    """A `read` that keeps count. Doubles its item; while `gate` is shut nothing ends."""

    def __init__(self, broken: frozenset[int] = frozenset(), *, is_open: bool = True) -> None:
        self.broken = broken
        self.begun: list[int] = []
        self.num_running = self.most_running = 0
        self.gate = threading.Event()
        self.changed = threading.Condition()
        if is_open:
            self.gate.set()

    def __call__(self, item: int) -> int:
        with self.changed:
            self.begun.append(item)
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
            self.changed.notify_all()
        assert self.gate.wait(PATIENCE_S)
        with self.changed:
            self.num_running -= 1
        if item in self.broken:
            raise ValueError(f"item {item}")
        return 2 * item

    def wait_for_begun(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= number, PATIENCE_S), self.begun


@settings(max_examples=40, deadline=None)
@given(items=st.lists(st.integers(), max_size=12), depth=st.integers(1, 5))
def test_every_result_in_order(items: list[int], depth: int) -> None:
    reads = Reads()
    assert list(read_ahead(reads, items, depth)) == [2 * item for item in items]
    assert sorted(reads.begun) == sorted(items)
    assert reads.most_running <= depth


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_just_the_next_ones_are_read_while_one_is_used(depth: int) -> None:
    reads = Reads()
    for place, _ in enumerate(read_ahead(reads, range(10), depth)):
        ahead = min(10, place + 1 + depth)
        reads.wait_for_begun(ahead)
        assert sorted(reads.begun) == list(range(ahead))


def test_as_many_are_under_way_at_once_as_was_agreed() -> None:
    reads = Reads(is_open=False)
    results: list[int] = []
    consumer = threading.Thread(target=lambda: results.extend(read_ahead(reads, range(20), 3)))
    consumer.start()
    reads.wait_for_begun(3)
    assert (reads.num_running, sorted(reads.begun)) == (3, [0, 1, 2])
    reads.gate.set()
    consumer.join(PATIENCE_S)
    assert results == list(range(0, 40, 2))
    assert reads.most_running <= 3


def test_nothing_is_begun_before_somebody_asks_and_items_may_never_end() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    reads = Reads()
    results = read_ahead(reads, endless(), 2)
    assert (taken, reads.begun) == ([], [])
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert taken == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(number=st.integers(1, 9), depth=st.integers(1, 4), data=st.data())
def test_an_error_comes_in_its_place_and_nothing_after_it(number: int, depth: int, data: st.DataObject) -> None:
    broken = data.draw(st.integers(0, number - 1))
    reads = Reads(frozenset({broken, number - 1}))  # a later one is never heard of
    seen: list[int] = []
    with pytest.raises(ValueError, match=f"item {broken}$"):
        seen.extend(read_ahead(reads, range(number), depth))  # what came before the error is kept
    assert seen == [2 * item for item in range(broken)]
    assert max(reads.begun) <= broken + depth
    assert reads.num_running == 0


def test_whoever_stops_early_leaves_nothing_behind() -> None:
    reads, before = Reads(), set(threading.enumerate())
    results = read_ahead(reads, range(100), 3)
    assert [next(results), next(results)] == [0, 2]
    reads.wait_for_begun(5)
    results.close()  # type: ignore[attr-defined]
    assert reads.num_running == 0
    assert sorted(reads.begun) == [0, 1, 2, 3, 4]
    assert set(threading.enumerate()) <= before


def test_what_waits_for_its_turn_is_cancelled_when_the_consumer_fails() -> None:
    reads = Reads(frozenset({0}), is_open=False)
    threading.Timer(0.0, reads.gate.set).start()
    with pytest.raises(ValueError, match="item 0"):
        next(read_ahead(reads, range(100), 1))
    assert set(reads.begun) <= {0, 1}
