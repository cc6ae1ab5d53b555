from __future__ import annotations

import pytest

from persona_ray.bench_store.hands import share_out


def test_work_is_shared_out_and_its_faults_come_back() -> None:
    done: list[int] = []
    share_out(range(20), ["left", "right"], lambda _, number: done.append(number))
    assert sorted(done) == list(range(20))
    with pytest.raises(ZeroDivisionError):
        share_out([1, 0], ["only"], lambda _, number: 1 / number)
