"""What a job will cost, for people: the numbers, and what they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from persona_ray.report.words import duration

Facts = Mapping[str, Any]
UNKNOWN = "unknown"
KNOWN_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def costs_table(costs: Facts) -> RenderableType:
    """`costs.estimate.Estimate.facts` as two tables: costs (of the whole, and of what is left), and assumptions."""
    parts = {"all of it": costs["whole"]} | ({} if costs["left"] is None else {"still to do": costs["left"]})
    numbers = Table("costs", *(Column(head, justify="right") for head in parts), box=SIMPLE_HEAD)
    for lines in zip(*map(_lines, parts.values()), strict=True):
        numbers.add_row(lines[0][0], *(value for _, value in lines))
    assumed = Table("assumed", Column("", justify="right"), "", Column("because", overflow="fold"), box=SIMPLE_HEAD)
    for one in costs["assumptions"]:
        assumed.add_row(one["name"], UNKNOWN if one["value"] is None else f"{one['value']:,.4g}", one["unit"], Text(one["source"]))
    speed = costs["speed"]
    how_fast = (
        f"speed unknown: {costs['why_no_speed']}"
        if speed is None
        else f"speed of a GPU: {speed['flops'] / 1e12:.3g} TFLOP/s of prefill, "
        f"{UNKNOWN if speed['bytes'] is None else format(speed['bytes'] / 1e9, ',.4g')} GB/s of decoding ({speed['source']})"
    )
    return Group(numbers, Text(how_fast), assumed, Text(f"Not counted: {costs['not_counted']}."))


def _lines(part: Facts) -> Iterator[tuple[str, str]]:
    hours, money, judge = part["gpu_hours"], part["money"], part["judge"]
    yield "rows, in units", f"{part['rows']:,} in {part['units']:,}"
    yield "tokens of prompts", f"{part['prompt_tokens']:,}"
    yield "tokens of answers", f"{part['answer_tokens']:,}"
    yield "FLOPs of capture", f"{part['prefill_flops']:.2g}"
    yield "GPU-hours of generation", _hours(hours["generation"])
    yield "GPU-hours of capture", _hours(hours["capture"])
    yield "GPU-hours", _hours(hours["total"])
    if part["hours"] is not None:
        yield "time on these replicas", duration(part["hours"] * 3600)
    yield "stored", size(part["bytes"])
    yield "objects, without results", f"{part['objects']['rollouts']:,}" + _and(part["objects"]["scores"], "of scores")
    yield "requests, at least", f"{part['requests']['put']:,} puts, {part['requests']['get']:,} gets"
    yield "judge calls", f"{judge['calls']:,}" + _and(judge["input_tokens"], "tokens in") + _and(judge["output_tokens"], "out")
    yield "money: GPUs", _money(money["gpu"])
    yield "money: requests", _money(money["requests"])
    yield "money: judge", _money(money["judge"])
    yield "money: the run", _money(money["total"])
    yield "money: storage, a month", _money(money["storage_per_month"])


def _and(number: int, what: str) -> str:
    return f", {number:,} {what}" if number else ""


def _hours(hours: float | None) -> str:
    return UNKNOWN if hours is None else f"{hours:,.3g}"


def _money(dollars: float | None) -> str:
    return UNKNOWN if dollars is None else f"{dollars:,.2f}"


def size(num_bytes: float) -> str:
    """In decimal units, three digits."""
    unit, factor = next(((unit, factor) for unit, factor in KNOWN_BYTES if num_bytes >= factor), ("bytes", 1))
    return f"{num_bytes / factor:,.3g} {unit}"
