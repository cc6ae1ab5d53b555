from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from persona_ray.store.read_once import ReadOnce


def test_threads_that_need_a_value_at_once_share_one_read() -> None:
    read: list[int] = []
    barrier = Barrier(4)
    kept = ReadOnce(lambda number: read.append(number) or 10 * number, 1)

    def get(number: int) -> int:
        barrier.wait(timeout=60)
        return kept.get(number)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(get, [7] * 4)) == [70] * 4
    assert read == [7]


def test_the_values_used_last_are_kept() -> None:
    read: list[int] = []
    kept = ReadOnce(lambda number: read.append(number) or number, 2)
    assert [kept.get(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert read == [1, 2, 3, 2]


def test_what_reading_raises_comes_back_to_all() -> None:
    kept = ReadOnce(lambda number: 1 // number, 2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kept.get(0)
    assert kept.get(1) == 1
