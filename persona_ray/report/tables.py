"""The axis with its numbers, for the terminal and, as plain JSON values, for machines.

Knows nothing of HTML. Each table has its JSON twin, made from the same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from persona_ray.report.data import Ranked, best_place, default_names, layer_view, layer_views, missing_names, ranking
from persona_ray.report.words import count, decimal, dim_words, duration, filter_words, multiple, names, percent
from persona_ray.spec import Reduced, SteeringCheck


def axis_json(reduced: Reduced) -> dict[str, Any]:
    """All that `axis_table` shows, uncut. `position` is in lengths of the axis: 0 = mean role, 1 = default Assistant."""
    return {
        "name": reduced.name,
        "best_layer": reduced.layers[best_place(reduced)],
        "best_layer_reason": reduced.attributes.get("best_layer_reason"),
        "judge": reduced.attributes.get("judge"),
        "preset": reduced.attributes.get("preset"),
        "min_score": reduced.attributes.get("min_score"),
        "min_count": reduced.attributes.get("min_count"),
        "default_archetypes": list(default_names(reduced)),
        "without_role_vector": list(missing_names(reduced)),
        "layers": [
            {
                "layer": view.layer,
                "cos_pc1_axis": _finite(view.cos_pc1_axis),
                "pc1_explained_variance_ratio": _finite(view.pc1_ratio),
                "axis_norm": _finite(view.axis_norm),
                "separation": _finite(view.separation),
                "rollouts": None if view.rollouts is None else asdict(view.rollouts),
                "dims": None if view.dims is None else asdict(view.dims),
            }
            for view in layer_views(reduced)
        ],
        "ranking": [
            {"archetype": ranked.name, "position": ranked.position, "rows": ranked.num_rows, "is_default": ranked.is_default}
            for ranked in _best_ranking(reduced)
        ],
    }


def axis_table(reduced: Reduced, top: int = 10) -> RenderableType:
    """Per layer the numbers of the axis; then, at the best layer, the `top` archetypes at both of its ends."""
    best = reduced.layers[best_place(reduced)]
    views = layer_views(reduced)
    with_rollouts = any(view.rollouts is not None for view in views)
    of_rollouts = ("rollouts: cos(PC1, axis)", "rollouts: PC1 explains") if with_rollouts else ()
    layers = _table("layer", "cos(PC1, axis)", "PC1 explains", "|axis|", "separation", *of_rollouts)
    for view in views:
        marker = " (best)" if view.layer == best else ""
        style = "bold" if view.layer == best else None
        numbers = (decimal(view.cos_pc1_axis), percent(view.pc1_ratio), decimal(view.axis_norm), decimal(view.separation))
        more = () if view.rollouts is None else (decimal(view.rollouts.cos_pc1_axis), percent(view.rollouts.pc1_ratio))
        layers.add_row(f"{view.layer}{marker}", *numbers, *more, style=style)
    parts: list[RenderableType] = [
        layers,
        Text(f"Along the axis at layer {best}: 0 = mean role, 1 = default Assistant", style="bold"),
        _ranking_table(_best_ranking(reduced), top),
        Text(f"Rows: {filter_words(reduced)}."),
        *(Text(dim_words(view)) for view in views if view.layer == best and view.dims is not None),
    ]
    if missing := missing_names(reduced):
        parts.append(Text(f"Without a role vector, too few rows: {names(missing)}."))
    return Group(*parts)


def steering_json(steering: SteeringCheck) -> dict[str, Any]:
    """All that `steering_table` shows."""
    return {
        "layer": steering.layer,
        "strength": steering.strength,
        "cohorts": {cohort: list(members) for cohort, members in steering.cohorts.items()},
        "arms": [
            {
                "cohort": arm.cohort,
                "label": arm.label,
                "strength": arm.strength,
                "assistant_share": _finite(arm.assistant_share),
                "num_answers": arm.num_answers,
            }
            for arm in steering.arms
        ],
    }


def steering_table(steering: SteeringCheck) -> RenderableType:
    """What every edit did to every cohort."""
    table = _table("cohort", "edit", "strength", "Assistant's words", "answers")
    for arm in steering.arms:
        table.add_row(Text(arm.cohort), Text(arm.label), multiple(arm.strength), percent(arm.assistant_share), f"{arm.num_answers:,}")
    return Group(Text(f"Steering at layer {steering.layer}", style="bold"), table)


def run_table(run: Mapping[str, Any]) -> RenderableType:
    """Counts, refusals and seconds of a run; `run` as in `ReportData`."""
    table = Table.grid(padding=(0, 2))
    rows = run.get("rows", {})
    if rows:
        table.add_row("rows", f"{rows.get('asked', 0):,} asked, {rows.get('stored', 0):,} stored, {rows.get('refused', 0):,} refused")
    for reason, num_rows in rows.get("reasons", {}).items():
        table.add_row("", Text(f"{count(num_rows, 'row')}: {reason}"))
    for phase, seconds in run.get("seconds", {}).items():
        table.add_row(Text(str(phase)), duration(seconds))
    if "store_url" in run:
        table.add_row("store", Text(str(run["store_url"])))
    return table


def _ranking_table(ranked: tuple[Ranked, ...], top: int) -> Table:
    table = _table("rank", "archetype", "position", "rows")
    for place, line in enumerate(ranked):
        if place == top and len(ranked) > 2 * top:
            table.add_row("...", f"{len(ranked) - 2 * top} more", "", "")
        if place < top or place >= len(ranked) - top:
            style = "bold" if line.is_default else None
            table.add_row(str(place + 1), Text(line.name), decimal(line.position), f"{line.num_rows:,}", style=style)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first)
    for header in others:
        is_text = header in {"archetype", "edit"}
        table.add_column(header, justify="left" if is_text else "right")
    return table


def _best_ranking(reduced: Reduced) -> tuple[Ranked, ...]:
    return ranking(reduced, layer_view(reduced, best_place(reduced)))


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
