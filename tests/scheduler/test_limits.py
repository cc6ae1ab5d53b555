"""How far a run may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import InputError
from persona_ray.scheduler.limits import over_money, over_time, within_rows


@given(rows=st.lists(st.integers(1, 9), max_size=8), max_rows=st.integers(1, 40))
def test_as_many_whole_units_as_fit_in_their_order(rows: list[int], max_rows: int) -> None:
    units = dict(enumerate(rows))
    if rows and rows[0] > max_rows:
        with pytest.raises(InputError, match=rf"limits\.rows: {max_rows}, and the next unit alone has {rows[0]} rows"):
            within_rows(units, max_rows)
        return
    chosen = within_rows(units, max_rows)
    assert chosen == list(range(len(chosen)))
    assert sum(rows[: len(chosen)]) <= max_rows
    assert len(chosen) == len(rows) or sum(rows[: len(chosen) + 1]) > max_rows


def test_without_a_limit_all_of_them() -> None:
    assert within_rows({4: 9, 2: 9}, None) == [4, 2]
    assert over_time(1e9, None) is None


def test_hours_are_over_when_they_are() -> None:
    assert over_time(1800, 0.5) is None
    assert over_time(1801, 0.5) == "limits.hours: 0.5 are over"


def test_money_is_spent_when_it_is() -> None:
    assert over_money(1e9, None) is None
    assert over_money(4.9, 5) is over_money(5, 5) is None
    assert over_money(5.1, 5) == "limits.money: 5 are spent"
