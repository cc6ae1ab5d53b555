"""`store info` for people: what is there, how far it is, what its rows cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Column, Table
from rich.text import Text

MAX_SHOWN = 12


def info_table(facts: Mapping[str, Any]) -> Table:
    """Two columns; `facts` as `StoreReader.info` gives them."""
    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for name, value in _lines(facts):
        table.add_row(name, Text(value))
    return table


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    units, rows, scores, model = facts["units"], facts["rows"], facts["scores"], facts["model"]
    yield "store", facts["url"]
    yield "job", str(facts["name"])
    yield "model", f"{model['id']}{'' if model['revision'] is None else ' at ' + model['revision']}"
    yield "dtype", f"{facts['dtype']['model']} forward, {facts['dtype']['store']} stored"
    yield "rows", f"{rows['asked']:,} planned, {rows['stored']:,} stored, {rows['refused']:,} refused"
    for reason, number in rows["reasons"].items():
        yield "", f"{number:,} x {reason}"
    yield "units", f"{units['committed']:,} of {units['planned']:,} committed, {units['rows']} rows each"
    for number, plan in enumerate(facts["plans"]):
        progress = f"{plan['committed']:,} of {plan['units']:,} units committed"
        wanted_for = plan["job"] if plan["purpose"] is None else f"{plan['job']} ({plan['purpose']})"
        yield f"plan {number}", f"{plan['rows']:,} rows for {wanted_for}, {plan['created']}, {progress}"
    for number, part in enumerate(facts["layer_sets"]):
        yield "layers" if number == 0 else "more layers", f"{_listed(part['layers'])} in {part['committed']:,} units"
    yield "hidden", str(facts["hidden_size"])
    yield (
        "archetypes",
        f"{len(facts['archetypes']):,}: {_listed(facts['archetypes'])}; default Assistant: {_listed(facts['default_archetypes'])}",
    )
    yield "scored", f"{scores['rows']:,} rows by {scores['latest']}" if scores["latest"] else "no judge yet"
    yield "axis", facts["reduced"]["latest"] or "none yet"
    yield "size", f"{facts['bytes'] / 1e6:,.1f} MB"
    yield from _cost_lines(facts["cost"])
    yield "begun", facts["created"]
    yield "last commit", facts["last_commit"] or "none"
    yield "identity", facts["identity_digest"]
    yield "ledger", facts["ledger_digest"]


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for hardware, per_1000 in cost["per_1000_rows"].items():
        seconds = sum(value for name, value in per_1000.items() if name.endswith("_seconds"))
        spent = f"{seconds / 3600:.3g} accelerator-hours, {per_1000.get('tokens', 0):,.0f} tokens, {per_1000.get('bytes', 0) / 1e6:,.1f} MB"
        yield "cost of 1,000 rows", f"{spent} on {hardware} ({per_1000['rows']:,} rows)"
    if cost["mixed_hardware"]:
        yield "", "made on more than one kind of hardware: the last bits and the seconds of their rows differ"


def _listed(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:MAX_SHOWN]))
    return f"{shown} and {len(values) - MAX_SHOWN} more" if len(values) > MAX_SHOWN else shown or "none"
