"""Rows on an axis, for the terminal and, as plain JSON values, for machines. Each table has its JSON twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from persona_ray.reduce.moments import GroupMoments
from persona_ray.reduce.projection import Projected, spread
from persona_ray.report.words import count, decimal

Numbers = tuple[int, float, float | None, float | None]
"""Rows, mean projection, standard deviation of single rows, mean place along the axis."""


def projection_json(found: Projected) -> dict[str, Any]:
    """All that `projection_tables` shows, uncut. Projections are in units of the residual stream; position: 0 = mean role, 1 = default."""
    target = found.target
    return {
        "on": target.source,
        "result": target.result,
        "component": target.component,
        "recommended_layer": target.layer,
        "recommended_because": target.reason,
        "rows": found.num_rows,
        "layers": [
            {
                "layer": layer,
                "archetypes": [
                    {"archetype": name, "is_default": name in found.default_archetypes, **_named(numbers)}
                    for name, numbers in _ranked(found, place)
                ],
                "answers": [{"answer": answer, **_named(numbers)} for answer, numbers in _answers(found, place)],
            }
            for place, layer in enumerate(found.layers)
        ],
        "notes": list(found.notes),
    }


def projection_tables(found: Projected, top: int) -> RenderableType:
    """Layer by layer the archetypes by falling mean, the `top` at both ends; and the answers of conversations that have several."""
    what = "the axis" if found.target.component is None else f"PC{found.target.component}"
    parts: list[RenderableType] = [Text(f"{count(found.num_rows, 'row')} on {what} of {found.target.source}", style="bold")]
    for place, layer in enumerate(found.layers):
        title = found.target.reason if (layer,) == found.layers and layer == found.target.layer else f"layer {layer}"
        parts += [Text(f"{title[:1].upper()}{title[1:]}"), _archetype_table(found, place, top)]
        answers = _answers(found, place)
        if len(answers) > 1:
            parts += [Text("By the Assistant's turn, first to last:"), _table("turn", {str(answer): line for answer, line in answers})]
    return Group(*parts, *(Text(f"{note}.") for note in found.notes))


def _archetype_table(found: Projected, place: int, top: int) -> Table:
    ranked = _ranked(found, place)
    if len(ranked) <= 2 * top:
        return _table("archetype", dict(ranked), found.default_archetypes)
    between: dict[str, Numbers | None] = {f"{len(ranked) - 2 * top} more": None}
    return _table("archetype", {**dict(ranked[:top]), **between, **dict(ranked[-top:])}, found.default_archetypes)


def _table(first: str, lines: Mapping[str, Numbers | None], bold: tuple[str, ...] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first)
    for title in ("rows", "projection", "spread", "position"):
        table.add_column(title, justify="right")
    for name, numbers in lines.items():
        cells = ("", "", "", "") if numbers is None else (f"{numbers[0]:,}", *(_shown(value) for value in numbers[1:]))
        table.add_row(Text(name), *cells, style="bold" if name in bold else None)
    return table


def _ranked(found: Projected, place: int) -> list[tuple[str, Numbers]]:
    """The highest projection first."""
    lines = {name: _numbers(found, moments, place) for name, moments in found.by_archetype().items()}
    return sorted(lines.items(), key=lambda line: (-line[1][1], line[0]))


def _answers(found: Projected, place: int) -> list[tuple[int, Numbers]]:
    return [(answer, _numbers(found, moments, place)) for answer, moments in found.spreads.by_answer().items()]


def _numbers(found: Projected, moments: GroupMoments, place: int) -> Numbers:
    deviation_L1, place_RL = spread(moments), found.direction.places(moments.mean_LD.T)
    return (
        moments.count,
        float(moments.mean_LD[place, 0]),
        None if deviation_L1 is None else float(deviation_L1[place, 0]),
        None if place_RL is None else float(place_RL[0, place]),
    )


def _named(numbers: Numbers) -> dict[str, Any]:
    return dict(zip(("rows", "projection", "spread", "position"), numbers, strict=True))


def _shown(value: float | None) -> str:
    return "" if value is None else decimal(value)
