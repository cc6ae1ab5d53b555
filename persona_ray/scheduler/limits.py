"""How far a run may go. Wall time and money end it between units; rows are counted beforehand, so that it never goes too far."""

from __future__ import annotations

from collections.abc import Mapping

from persona_ray.errors import InputError


def within_rows(units: Mapping[int, int], max_rows: int | None) -> list[int]:
    """The first of `units` (index -> rows, in work order) that have at most `max_rows` together; all without a limit.

    Raises InputError if that is not even one.
    """
    if max_rows is None:
        return list(units)
    chosen, num_rows = [], 0
    for unit, rows in units.items():
        num_rows += rows
        if num_rows > max_rows:
            break
        chosen.append(unit)
    if units and not chosen:
        raise InputError(f"limits.rows: {max_rows}, and the next unit alone has {next(iter(units.values()))} rows; a unit is never cut")
    return chosen


def over_time(elapsed_s: float, max_hours: float | None) -> str | None:
    """Why no unit is to be begun any more, if that is so."""
    return f"limits.hours: {max_hours:g} are over" if max_hours is not None and elapsed_s > max_hours * 3600 else None


def over_money(spent: float, most: float | None) -> str | None:
    """Why no unit is to be begun any more, if that is so. What is under way is finished, and paid for beyond the limit."""
    return f"limits.money: {most:g} are spent" if most is not None and spent > most else None
