"""A whole benchmark of a tiny model: every number is there, and the numbers fit each other. No time is held against anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persona_ray.bench.report import lines
from persona_ray.bench.run import benchmark
from persona_ray.bench.settings import Settings
from persona_ray.costs.speed import measured_rates

TINY = "hidden=32,layers=4,vocab=300,heads=4,positions=256"


def numbers(value: Any) -> Iterator[float]:
    """All of a document."""
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, (int, float)):
        yield value


@pytest.fixture(scope="module")
def in_process() -> dict[str, Any]:
    settings = Settings(
        random=TINY,
        dtype="float32",
        device="cpu",
        conversations=11,
        longest=40,
        unit_rows=4,
        repeats=2,
        prompts=5,
        new_tokens=4,
        temperature=0,
        cost_rows=6,
        growth_batches=110,
        in_process=True,
    )
    return benchmark(settings, lambda _: None)


@pytest.fixture(scope="module")
def on_ray() -> dict[str, Any]:
    settings = Settings(
        random=TINY, device="cpu", conversations=10, longest=40, unit_rows=4, repeats=1, stages=2, growth_batches=0, store=True
    )
    return benchmark(settings, lambda _: None)


def test_a_plan_takes_its_speed_from_the_document(in_process: dict[str, Any], on_ray: dict[str, Any], tmp_path: Path) -> None:
    for document, generates in ((in_process, True), (on_ray, False)):
        file = tmp_path / "bench.json"
        file.write_text(json.dumps(document))
        rates = measured_rates(file)
        machine, engine = document["machine"], document["capture"]["engine"]
        assert rates.flops == pytest.approx(engine["flops_utilisation"] * machine["matmul_flops"])
        assert (rates.bytes is not None) == generates
        assert "cpu" in rates.source.lower()


def test_a_document_is_json_of_finite_numbers(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    for document in (in_process, on_ray):
        assert json.loads(json.dumps(document, allow_nan=False)).keys() == document.keys()
        assert all(math.isfinite(number) for number in numbers(document))


def test_rows_are_the_floors(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    assert in_process["rows"]["beside_floor"]["max"] <= 5e-6
    assert in_process["rows"]["equal_answers"] == 1
    assert "beside_float32" not in in_process["rows"]
    assert on_ray["rows"]["beside_floor"]["max"] <= 6e-3
    assert 0 < on_ray["rows"]["beside_float32"]["max"] <= 1.5e-2


def test_every_contestant_did_the_same_work(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    for document, contestants, turns in ((in_process, ("floor", "engine"), 2), (on_ray, ("floor", "engine", "one stage"), 1)):
        for name in contestants:
            part = document["capture"][name]
            assert [turn["tokens"] for turn in part["turns"]] == [document["model"]["tokens"]] * turns
            assert all(turn["padded_tokens"] >= turn["tokens"] for turn in part["turns"])
            assert 0 <= part["padding_share"] < 1
            assert 0 < part["flops_utilisation"] < 1
    for name in ("floor", "engine"):
        assert [turn["tokens"] for turn in in_process["generation"][name]["turns"]] == [5 * 4] * 2


def test_processes_are_counted_one_by_one(on_ray: dict[str, Any]) -> None:
    capture = on_ray["capture"]
    cut, whole = capture["engine"]["turns"][0], capture["one stage"]["turns"][0]
    assert set(cut["cpu_s"]) == {"replica", "stage 0 rank 0", "stage 1 rank 0"}
    assert set(whole["cpu_s"]) == {"replica"}
    assert all(seconds > 0 for seconds in cut["cpu_s"].values())
    assert min(cut["peak_host_bytes"].values()) > 10_000_000
    assert len(cut["busy_s"]) == 2
    assert all(0 < busy_s <= cut["wall_s"] for busy_s in cut["busy_s"])


def test_ratios_are_those_of_the_turns(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    capture = on_ray["capture"]
    cut, whole, floor = (capture[name]["turns"][0] for name in ("engine", "one stage", "floor"))
    cost = sum(cut["cpu_s"].values()) / sum(floor["cpu_s"].values())
    assert capture["engine_over_floor"] == pytest.approx(cost)
    pipeline = capture["pipeline"]
    ideal_s = max(cut["busy_s"]) + min(cut["busy_s"]) / pipeline["batches"]
    assert pipeline["wall_over_ideal"] == pytest.approx(cut["wall_s"] / ideal_s)
    assert pipeline["wall_over_one_stage"] == pytest.approx(cut["wall_s"] / whole["wall_s"])
    cost = in_process["capture_cost"]
    assert cost["hidden_states_kept"] == pytest.approx((cost["peak_with"] - cost["peak_without"]) / cost["hidden_bytes"])


def test_a_store_takes_its_share(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    shares = on_ray["capture"]["engine"]["share_of_unit_seconds"]
    assert shares["commit"] > 0.001
    assert sum(shares.values()) == pytest.approx(1)
    assert in_process["capture"]["engine"]["share_of_unit_seconds"]["commit"] < 0.001


def test_memory_is_watched_where_it_was_asked_for(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    assert set(in_process["growth_mb_per_100_batches"]) == {"host", "device"}
    assert "growth_mb_per_100_batches" not in on_ray


def test_people_are_told_the_same(in_process: dict[str, Any], on_ray: dict[str, Any]) -> None:
    text = "\n".join(lines(in_process))
    assert f"{in_process['capture']['engine_over_floor']:.3f}" in text
    assert "generation" in text
    assert "100.0%" in text
    text = "\n".join(lines(on_ray))
    assert f"{on_ray['capture']['pipeline']['wall_over_ideal']:.3f}" in text
    assert "one stage" in text
