"""The costs of whole jobs: what belongs together does, and what is left is told beside the whole. Real runs are in tests/cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.config import Job, parse_job
from persona_ray.costs.estimate import Estimate, estimate, require_a_unit
from persona_ray.errors import InputError
from persona_ray.planning import Setup, prepare
from persona_ray.rollouts.produce import left_out_rollout
from persona_ray.shards.hardware import accelerator
from persona_ray.spec import CapturedUnit
from persona_ray.store.prepare import prepare_store
from persona_ray.store.writer import UnitWriter


def job_for(model: Path, catalog: Path, url: Path | str, /, **sections: dict[str, Any]) -> Job:
    document: dict[str, Any] = {
        "name": "test",
        "model": {"id": str(model)},
        "shards": {"stages": 2, "accelerator": "H100", "replicas": 2},
        "catalog": {"source": str(catalog), "system_prompts": 2, "questions": 4},
        "rollouts": {"max_new_tokens": 12},
        "capture": {"max_length": 128},
        "store": {"url": str(url), "unit_rows": 5},
    }
    return parse_job(document | {name: document.get(name, {}) | values for name, values in sections.items()})


def costs_of(job: Job, *assume: str) -> dict[str, Any]:
    whole: dict[str, Any] = estimate(prepare(job), assume=assume).facts()["whole"]
    return whole


def commit(setup: Setup, *units: int) -> None:
    """Units without a usable row: enough for the ledger."""
    url = setup.job.store.url
    plans = prepare_store(url, identity=setup.identity, plan=setup.plan, job=setup.job.as_dict())
    writer = UnitWriter(url)
    for unit in units:
        texts = writer.write_rollouts(unit, tuple(left_out_rollout(row, "a test") for row in setup.unit(plans, unit).rows))
        writer.commit(CapturedUnit(unit, texts, np.full((len(texts), *setup.work.row_shape), np.nan, np.float32), {}, {}))


def test_the_parts_make_the_whole(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    whole = costs_of(job_for(chat_model, small_catalog, tmp_path / "store"), "gpu_hour=3600", "put_1000=1000", "get_1000=500")
    assert (whole["rows"], whole["units"]) == (32, 7)
    assert whole["tokens"] == pytest.approx(whole["prompt_tokens"] + whole["answer_tokens"], abs=1)
    hours, money, requests = whole["gpu_hours"], whole["money"], whole["requests"]
    assert hours["total"] == hours["capture"] + hours["generation"] > 0
    assert whole["hours"] == hours["total"] / 4  # two replicas of two GPUs
    assert requests == {"put": whole["objects"]["rollouts"], "get": 14}
    assert money["gpu"] == pytest.approx(3600 * hours["total"])
    assert money["requests"] == requests["put"] + requests["get"] / 2
    assert money["total"] == pytest.approx(money["gpu"] + money["requests"] + money["judge"])
    assert money["storage_per_month"] == 0
    assert costs_of(job_for(chat_model, small_catalog, tmp_path / "store"), "storage_gb_month=2")["money"]["storage_per_month"] == (
        pytest.approx(2 * whole["bytes"] / 1e9)
    )


def test_where_a_speed_or_a_price_is_missing_nothing_is_made_up(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store", shards={"gpus_per_shard": 0, "accelerator": None})
    found = estimate(prepare(job)).facts()
    assert found["speed"] is None
    assert "CPU" in found["why_no_speed"]
    assert found["whole"]["gpu_hours"] == {"capture": None, "generation": None, "total": None}
    assert (found["whole"]["hours"], found["whole"]["money"]["gpu"], found["whole"]["money"]["total"]) == (None, None, None)
    assert found["whole"]["bytes"] > 0
    unnamed = job_for(chat_model, small_catalog, tmp_path / "store", shards={"accelerator": "H20"})
    assert costs_of(unnamed)["gpu_hours"]["total"] > 0
    assert costs_of(unnamed)["money"]["total"] is None


def test_a_benchmark_takes_the_place_of_data_sheets(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    sheet = accelerator("H100")
    document = {
        "settings": {"stages": 1, "tensor_parallel": 1, "in_process": True},
        "machine": {"device": "cuda", "hardware": "H100", "copy_bandwidth": sheet.bandwidth},
        "model": {"model_type": "llama", "flops_per_token": 1e9},
        "capture": {"engine": {"tokens_per_s": sheet.flops / 1e9}},
        "generation": {"wall_over_bandwidth_limit": 1.0},
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(document))
    setup = prepare(job_for(chat_model, small_catalog, tmp_path / "store"))
    measured = estimate(setup, bench=file)
    perfect = estimate(setup, assume=["prefill_share=1", "decode_share=1"])
    assert measured.facts()["whole"]["gpu_hours"] == pytest.approx(perfect.facts()["whole"]["gpu_hours"])
    assert not {"prefill_share", "decode_share"} & set(measured.assumptions)
    with pytest.raises(InputError, match="the names are prompt_tokens, answer_tokens"):
        estimate(setup, bench=file, assume=["prefill_share=1"])


def test_what_is_left_is_told_beside_the_whole(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store")
    before = estimate(prepare(job)).facts()
    assert before["left"] is None
    commit(prepare(job), 0, 1, 6)
    found = estimate(prepare(job)).facts()
    whole, left = found["whole"], found["left"]
    assert {**whole, "bytes": 0} == {**before["whole"], "bytes": 0}
    assert (left["rows"], left["units"]) == (20, 4)
    assert left["objects"]["rollouts"] == 4 * 7
    assert left["tokens"] == pytest.approx(whole["tokens"] * 20 / 32, abs=2)
    assert left["money"]["gpu"] == pytest.approx(whole["money"]["gpu"] * 20 / 32)
    assert left["bytes"] < whole["bytes"] * 20 / 32  # what the store has once is there
    commit(prepare(job), 2, 3, 4, 5)
    done = estimate(prepare(job)).facts()["left"]
    assert (done["rows"], done["bytes"], done["requests"], done["money"]["total"]) == (0, 0, {"put": 0, "get": 0}, 0)


def test_a_store_that_is_to_grow_is_told_by_what_is_new(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store")
    commit(prepare(job), 0)
    grown = job_for(chat_model, small_catalog, tmp_path / "store", catalog={"samples": 2})
    left = estimate(prepare(grown)).facts()["left"]
    assert (left["rows"], left["units"]) == (27 + 32, 6 + 7)
    new = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    prepare_store(str(tmp_path / "store"), identity=prepare(grown).identity, plan=prepare(grown).plan, job=grown.as_dict())
    new = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} - new
    assert left["objects"]["rollouts"] == 13 * 7 + len(new)


def test_further_layers_are_captured_and_not_generated(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    first = job_for(chat_model, small_catalog, tmp_path / "store", capture={"layers": [0, 2]})
    commit(prepare(first), *range(7))
    more = estimate(prepare(job_for(chat_model, small_catalog, tmp_path / "store"))).facts()["left"]
    assert more["gpu_hours"]["generation"] == 0 < more["gpu_hours"]["capture"]
    assert (more["units"], more["requests"]["get"]) == (7, 21)
    assert more["objects"]["rollouts"] > 7 * 3  # activations_1, its layers, their plan


def asking(job: Job, backend: str) -> Job:
    """The job with a judge that asks a model: refused by this version's schema, and counted already."""
    return job.model_copy(update={"judge": job.judge.model_copy(update={"backend": backend})})


@pytest.mark.parametrize(("backend", "is_paid"), [("endpoint", True), ("local", False)])
def test_a_judge_that_asks_a_model_asks_once_for_each_row(
    chat_model: Path, small_catalog: Path, tmp_path: Path, backend: str, is_paid: bool
) -> None:
    setup = prepare(job_for(chat_model, small_catalog, tmp_path / "store"))
    setup = replace(setup, job=asking(setup.job, backend))
    assume = ["judge_prompt_tokens=100", "answer_tokens=10", "judge_answer_tokens=2", "judge_input_million=1e6", "judge_output_million=3e6"]
    whole = estimate(setup, assume=assume).facts()["whole"]
    assert whole["judge"] == {"calls": 32, "input_tokens": 3520, "output_tokens": 64}
    assert whole["money"]["judge"] == (3520 + 192 if is_paid else 0)


# ---- limits


def limited(model: Path, catalog: Path, url: Path, limits: dict[str, Any], /, **sections: dict[str, Any]) -> tuple[Setup, Estimate]:
    setup = prepare(job_for(model, catalog, url, limits=limits, **sections))
    return setup, estimate(setup)


def test_a_limit_below_one_unit_is_refused_and_a_generous_one_is_not(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    setup, expected = limited(chat_model, small_catalog, tmp_path / "store", {})
    gpu_hours = expected.gpu_hours(expected.rows([0]))["total"]
    assert gpu_hours is not None
    for limits in (
        {"hours": gpu_hours / 2 / 2.1},
        {"money": gpu_hours * 2.99 / 2.1},
        {"money": gpu_hours * 50 / 2.1, "gpu_hour_price": 50},
    ):
        setup, _ = limited(chat_model, small_catalog, tmp_path / "store", limits)
        with pytest.raises(InputError) as refused:
            require_a_unit(setup, setup.plans(), [0, 1])
        name = "money" if "money" in limits else "hours"
        assert str(refused.value).startswith(f"limits.{name}: {limits[name]:g}, and one unit of 5 rows ")
        assert "\n" not in str(refused.value)
        require_a_unit(setup, setup.plans(), [])  # nothing is to be done, so nothing is too little
        enough, _ = limited(chat_model, small_catalog, tmp_path / "store", {**limits, name: 1.2 * limits[name]})
        require_a_unit(enough, enough.plans(), [0, 1])


def test_money_needs_a_price_whatever_is_left(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    on_cpu = {"gpus_per_shard": 0, "accelerator": None}
    setup, _ = limited(chat_model, small_catalog, tmp_path / "store", {"money": 5}, shards=on_cpu)
    with pytest.raises(InputError, match=r"limits\.money: no list price"):
        require_a_unit(setup, setup.plans(), [])
    setup, _ = limited(chat_model, small_catalog, tmp_path / "store", {"money": 1e-9, "gpu_hour_price": 1}, shards=on_cpu)
    require_a_unit(setup, setup.plans(), [0])  # nobody knows how fast a CPU is
