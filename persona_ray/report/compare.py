"""Persona spaces against each other, for the terminal and, as plain JSON values, for machines. Each table has its JSON twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from persona_ray.reduce.space_pair import LayerPair, Space, SpacePair
from persona_ray.report.words import count, decimal, names

LAYERS_TITLE = (
    "By layer: cosines of the axes and of PC1, the largest principal angle; correlations of places along the axes, of their ranks, "
    "and of loadings on PC1"
)


def comparison_json(pairs: Sequence[SpacePair]) -> dict[str, Any]:
    """All that `comparison_tables` shows, uncut. Null: cannot be had; the pair's `notes` say why. Angles are in degrees."""
    return {"pairs": [_pair_json(pair) for pair in pairs]}


def comparison_tables(pairs: Sequence[SpacePair]) -> RenderableType:
    """Pair by pair: the numbers at the recommended layers, then those by layer."""
    return Group(*(part for pair in pairs for part in _pair_parts(pair)))


def summary(pair: SpacePair) -> list[tuple[str, str]]:
    """The leading numbers of a pair with their meaning, as people read them."""
    best, both = pair.at_best, pair.at_best_of_a
    found = [("archetypes compared", count(len(pair.shared), "archetype")), *_correlations(best)]
    if both is not None and both.axis_cosine is not None:
        found.append((f"cosine of the axes, layer {both.layer_a}", fine(both.axis_cosine)))
        found += [(f"cosine of PC{k + 1}, layer {both.layer_a}", fine(value)) for k, value in enumerate(both.component_cosines or ())]
        found.append((f"principal angles, layer {both.layer_a}", degrees(both.principal_angles)))
    return found


def fine(value: float | None) -> str:
    """Four digits behind the point: cosines and correlations are looked at near 1."""
    return "unknown" if value is None or not math.isfinite(value) else f"{value:.4f}".replace("-", "\u2212")


def degrees(angles: Sequence[float] | None) -> str:
    """Angles in a row."""
    return "none" if angles is None else " ".join(f"{decimal(angle)}\u00b0" for angle in angles)


def layer_columns(pair: SpacePair) -> dict[str, list[str]]:
    """Title -> cells, one for each of the pair's layers. What no layer has is left out."""
    layers = pair.layers
    columns = {
        "layer A": [str(layer.layer_a) for layer in layers],
        "layer B": [str(layer.layer_b) for layer in layers],
        "axes": [fine(layer.axis_cosine) for layer in layers if layer.axis_cosine is not None],
        "PC1": [fine(layer.component_cosines[0]) for layer in layers if layer.component_cosines],
        "angle": [degrees(layer.principal_angles[-1:]) for layer in layers if layer.principal_angles],
        "places": [fine(layer.position_pearson) for layer in layers if layer.position_pearson is not None],
        "ranks": [fine(layer.position_spearman) for layer in layers if layer.position_spearman is not None],
        "loadings": [fine(layer.loading_pearson[0]) for layer in layers if layer.loading_pearson],
    }
    return {title: cells for title, cells in columns.items() if cells}


def _correlations(best: LayerPair) -> list[tuple[str, str]]:
    if best.position_pearson is None:
        return []
    where = f"layer {best.layer_a} against {best.layer_b}"
    rank = fine(best.position_spearman)
    loadings = zip(best.loading_pearson or (), best.loading_spearman or (), strict=True)
    return [
        (f"correlation of places along the axis, {where}", f"{fine(best.position_pearson)}, of ranks {rank}"),
        *((f"correlation of loadings on PC{k + 1}, {where}", f"{fine(r)}, of ranks {fine(rho)}") for k, (r, rho) in enumerate(loadings)),
    ]


def _pair_json(pair: SpacePair) -> dict[str, Any]:
    return {
        "a": _space_json(pair.a),
        "b": _space_json(pair.b),
        "shared": list(pair.shared),
        "left_out": list(pair.left_out),
        "at_best": _layer_json(pair.at_best),
        "at_best_of_a": None if pair.at_best_of_a is None else _layer_json(pair.at_best_of_a),
        "layers": [_layer_json(layer) for layer in pair.layers],
        "notes": list(pair.notes),
    }


def _space_json(space: Space) -> dict[str, Any]:
    return {"store": space.label, "model": space.model_id, "best_layer": space.best_layer, **space.settings}


def _layer_json(pair: LayerPair) -> dict[str, Any]:
    return {
        "layer_a": pair.layer_a,
        "layer_b": pair.layer_b,
        "axis_cosine": _finite(pair.axis_cosine),
        "component_cosines": _finite_all(pair.component_cosines),
        "principal_angles": _finite_all(pair.principal_angles),
        "position_pearson": _finite(pair.position_pearson),
        "position_spearman": _finite(pair.position_spearman),
        "loading_pearson": _finite_all(pair.loading_pearson),
        "loading_spearman": _finite_all(pair.loading_spearman),
    }


def _pair_parts(pair: SpacePair) -> list[RenderableType]:
    facts = Table.grid(padding=(0, 2))
    for meaning, value in summary(pair):
        facts.add_row(Text(meaning), Text(value))
    if pair.left_out:
        facts.add_row("in one of them only", Text(names(pair.left_out)))
    title = Text(f"A {pair.a.label}\nB {pair.b.label}", style="bold")
    return [title, facts, Text(""), Text(LAYERS_TITLE), _layer_table(pair), *(Text(f"{note}.") for note in pair.notes)]


def _layer_table(pair: SpacePair) -> Table:
    best = pair.at_best_of_a or pair.at_best
    columns = layer_columns(pair)
    table = Table(box=SIMPLE_HEAD)
    for title in columns:
        table.add_column(title, justify="right")
    for layer, cells in zip(pair.layers, zip(*columns.values(), strict=True), strict=True):
        is_best = (layer.layer_a, layer.layer_b) == (best.layer_a, best.layer_b)
        table.add_row(*cells, style="bold" if is_best else None)
    return table


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _finite_all(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [_finite(value) for value in values]
