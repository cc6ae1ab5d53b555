"""What a store says that its rows cost: from the markers, by hardware."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from persona_ray.report.info import info_table
from persona_ray.store.reader import open_store
from persona_ray.store.writer import UnitWriter

MIXED = "made on more than one kind of hardware"


def shown(info: dict[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(info_table(info))
    return capture.get()


def fill(toy: Any, folder: Path, hardware: list[str]) -> dict[str, Any]:
    """`info` of a store whose units were made on `hardware`, each in 3 s of two stages; the second row is refused."""
    writer = UnitWriter(toy.prepare(folder))
    for unit, name in zip(toy.plan.units, hardware, strict=True):
        writer.write_rollouts(unit, toy.rollouts(unit))
        captured = toy.captured(unit, refused={1: "empty answer"} if unit == 0 else {})
        writer.commit(replace(captured, made={"hardware": name, "stages": 2, "tokens": 60, "seconds": {"generate": 2.0, "capture": 1.0}}))
    return open_store(str(folder)).info()


def test_the_cost_of_a_thousand_rows_by_hardware(tmp_path: Path, toy: Any) -> None:
    info = fill(toy, tmp_path, ["L4", "H100", "L4"])
    assert info["cost"]["mixed_hardware"]
    by_hardware = info["cost"]["per_1000_rows"]
    assert list(by_hardware) == ["H100", "L4"]
    # Units of four, four and two rows, one of them refused.
    for name, rows, units in (("H100", 4, 1), ("L4", 5, 2)):
        found = by_hardware[name]
        assert found["rows"] == rows
        assert found["tokens"] == 60 * units * 1000 / rows
        assert found["generate_accelerator_seconds"] == 2 * 2.0 * units * 1000 / rows
        assert found["capture_accelerator_seconds"] == 2 * 1.0 * units * 1000 / rows
    markers = open_store(str(tmp_path)).ledger.markers().values()
    assert sum(cost["bytes"] * cost["rows"] / 1000 for cost in by_hardware.values()) == sum(marker.num_bytes for marker in markers)
    assert MIXED in shown(info)
    assert shown(info).count("cost of 1,000 rows") == 2


def test_one_kind_of_hardware_is_not_pointed_out(tmp_path: Path, toy: Any) -> None:
    info = fill(toy, tmp_path, ["L4"] * 3)
    assert not info["cost"]["mixed_hardware"]
    assert info["cost"]["per_1000_rows"]["L4"]["rows"] == 9
    assert MIXED not in shown(info)
