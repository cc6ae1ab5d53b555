"""What a listing, a comparison and a copy of stores found: for the terminal and, as plain JSON values, for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from persona_ray.report.words import count
from persona_ray.spec import RowKey
from persona_ray.store.copied import Copied
from persona_ray.store.diff import StoreDifference
from persona_ray.store.diff_numbers import LayerDifference
from persona_ray.store.listing import ListedStore, StoreSummary

MAX_NAMED = 20
"""Rows of a kind that are named; all are counted."""
MAX_SHOWN = 50
"""Lines of a list on a terminal; JSON has all of them."""


def listing_json(url: str, found: Sequence[ListedStore]) -> dict[str, Any]:
    """All that `listing_table` shows."""
    stores = [{"url": line.url, **(asdict(line.summary) if line.summary else {}), "problem": line.problem} for line in found]
    return {"url": url, "stores": stores}


def listing_table(found: Sequence[ListedStore]) -> RenderableType:
    """A line for each store; what cannot be read says why."""
    if not found:
        return Text("no stores here")
    table = Table(Column("store", overflow="fold"), "job", Column("model", overflow="fold"), box=SIMPLE_HEAD)
    for name in ("rows", "units", "layers", "hidden"):
        table.add_column(name, justify="right")
    for name in ("created", "last commit"):
        table.add_column(name)
    for line in found:
        if line.summary is not None:
            table.add_row(*_summary_cells(line.url, line.summary))
    parts: list[RenderableType] = [table] if table.row_count else []
    parts += [Text(f"{line.url}: {line.problem}") for line in found if line.problem is not None]
    return Group(*parts)


def difference_json(found: StoreDifference) -> dict[str, Any]:
    """All that `difference_table` shows. Of rows of a kind the first 20 are named."""
    rows = {"only_in_a": found.only_in_a, "only_in_b": found.only_in_b, "status": found.status, "texts": found.texts}
    return {
        "a": found.a,
        "b": found.b,
        "is_equal": found.is_equal,
        "tolerance": found.tolerance,
        "identity": [asdict(difference) for difference in found.identity],
        "both": found.both,
        **{name: _rows_json(keys) for name, keys in {**rows, "token_ids": found.token_ids}.items()},
        "layers": [asdict(layer) for layer in found.layers],
        "layers_only_in_a": list(found.layers_only_in_a),
        "layers_only_in_b": list(found.layers_only_in_b),
    }


def difference_table(found: StoreDifference) -> RenderableType:
    """Identity field by field, rows by kind, layers with their numbers, then the verdict."""
    parts: list[RenderableType] = [Text(f"A: {found.a}\nB: {found.b}")]
    parts += [Text(f"identity: {field.name} is {field.a!r} in A, {field.b!r} in B") for field in found.identity]
    parts.append(Text(f"{count(found.both, 'row')} in both"))
    kinds = {
        "only in A": found.only_in_a,
        "only in B": found.only_in_b,
        "refused in one alone": found.status,
        "with other texts": found.texts,
        "with other token ids": found.token_ids,
    }
    parts += [Text(f"{count(len(keys), 'row')} {kind}: {_named(keys)}") for kind, keys in kinds.items() if keys]
    for side, layers in (("A", found.layers_only_in_a), ("B", found.layers_only_in_b)):
        if layers:
            parts.append(Text(f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} only in {side}"))
    if found.layers:
        parts.append(_layer_table(found))
    parts.append(Text(_verdict(found), style="bold"))
    return Group(*parts)


def copied_json(found: Copied) -> dict[str, Any]:
    """All that `copied_lines` says."""
    flaws = [{"key": flaw.key, "kind": flaw.kind.value, "problem": flaw.problem} for flaw in found.flaws]
    return {**asdict(found), "is_right": found.is_right, "flaws": flaws}


def copied_lines(found: Copied) -> str:
    """What was done, then what was not."""
    done = f"{count(found.units, 'unit')}, {count(found.rows, 'row')}, {found.num_bytes:,} bytes copied to {found.target}"
    lines = [f"{done}; {count(found.already_there, 'unit')} there already"]
    if found.left_out:
        lines.append(f"{count(found.left_out, 'row')} left out: the source does not have them with all of these layers yet")
    lines += [f"{flaw.key}: {flaw.kind.value}: {flaw.problem}" for flaw in found.flaws[:MAX_SHOWN]]
    if len(found.flaws) > MAX_SHOWN:
        lines.append(f"and {len(found.flaws) - MAX_SHOWN:,} more")
    lines.append("verified: nothing is wrong" if found.is_right else f"wrong: {count(len(found.flaws), 'object')}")
    return "\n".join(lines)


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _summary_cells(url: str, summary: StoreSummary) -> tuple[RenderableType, ...]:
    model = summary.model_id + (f"@{summary.model_revision[:12]}" if summary.model_revision else "")
    committed = " + ".join(f"{number:,}" for number in summary.committed)
    return (
        Text(url),
        Text(summary.name or ""),
        Text(model),
        f"{summary.rows:,}",
        f"{committed} of {summary.units:,}",
        str(len(summary.layers)),
        f"{summary.hidden_size:,}",
        summary.created,
        summary.last_commit or "never",
    )


def _rows_json(keys: Sequence[RowKey]) -> dict[str, Any]:
    return {"rows": len(keys), "first": [asdict(key) for key in keys[:MAX_NAMED]]}


def _named(keys: Sequence[RowKey]) -> str:
    return "; ".join(_name(key) for key in keys[:3]) + ("; ..." if len(keys) > 3 else "")


def _name(key: RowKey) -> str:
    return f"{key.archetype}, system prompt {key.system_prompt}, question {key.question}, sample {key.sample}, turn {key.turn}"


def _layer_table(found: StoreDifference) -> RenderableType:
    names = ("layer", "rows", "bit-equal", "only in A", "only in B", "max difference", "mean difference")
    table = Table(*map(_right, names), Column("worst row", overflow="fold"), box=SIMPLE_HEAD)
    for layer in found.layers:
        table.add_row(*_layer_cells(layer))
    return table


def _layer_cells(layer: LayerDifference) -> tuple[RenderableType, ...]:
    numbers = (layer.layer, layer.rows, layer.bit_equal, layer.only_in_a, layer.only_in_b)
    differences = (f"{layer.max_relative:.3g}", f"{layer.mean_relative:.3g}")
    return (*(f"{number:,}" for number in numbers), *differences, Text("" if layer.worst is None else _name(layer.worst)))


def _verdict(found: StoreDifference) -> str:
    within = "bit by bit" if found.tolerance is None else f"numbers within {found.tolerance:g}"
    return f"equal as sets of rows, {within}" if found.is_equal else f"different ({within})"
