"""What is assumed has a source, and gives way to whoever knows better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persona_ray.config import Job, parse_job
from persona_ray.costs.assumptions import default_assumptions
from persona_ray.costs.speed import measured_rates, rates_of, why_no_rates
from persona_ray.errors import InputError
from persona_ray.shards.hardware import accelerator


def job(**sections: Any) -> Job:
    document = {"model": {"id": "m"}, "shards": {"accelerator": "H100"}, "store": {"url": "s3://b/s"}}
    return parse_job(document | sections)


def test_everything_has_a_source_and_a_unit() -> None:
    found = default_assumptions(job())
    assert all(one.source and one.unit for one in found.values())
    assert found.value("answer_tokens") == 435
    assert found["gpu_hour"].value == 2.99
    assert not any(name.startswith("judge") for name in found)  # this judge asks nobody


@pytest.mark.parametrize(
    ("sections", "name", "value", "words"),
    [
        ({"rollouts": {"max_new_tokens": 64}}, "answer_tokens", 54.4, "85 % of max_new_tokens 64"),
        ({"model": {"id": "builtin:tiny-persona"}}, "answer_tokens", 36, "quickstart"),
        ({"model": {"id": "builtin:tiny-persona"}, "rollouts": {"max_new_tokens": 8}}, "answer_tokens", 8, "quickstart"),
        ({"shards": {"gpus_per_shard": 0}}, "gpu_hour", None, "a CPU"),
        ({"limits": {"gpu_hour_price": 7}}, "gpu_hour", 7, "limits.gpu_hour_price"),
        ({"store": {"url": "/data/store"}}, "put_1000", 0, "a folder charges nothing"),
        ({"store": {"url": "s", "dtype": "float32"}}, "stored_share", 0.925, "measured"),
    ],
)
def test_they_follow_the_job(sections: dict[str, Any], name: str, value: float | None, words: str) -> None:
    found = default_assumptions(job(**sections))[name]
    assert found.value == value
    assert words in found.source


def test_who_says_otherwise_is_believed() -> None:
    found = default_assumptions(job()).replaced(["gpu_hour=2.5", "answer_tokens=300"])
    assert (found.value("gpu_hour"), found.value("answer_tokens")) == (2.5, 300)
    assert found["gpu_hour"].source == found["answer_tokens"].source == "--assume"
    assert found.value("padding") == default_assumptions(job()).value("padding")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gpu_hours=2", "expected name=number; the names are answer_tokens, padding"),
        ("gpu_hour", "expected name=number"),
        ("gpu_hour=", "nothing is not a number"),
        ("gpu_hour=two", "two is not a number"),
        ("gpu_hour=-1", "not a number of 0 or more"),
        ("gpu_hour=nan", "not a number of 0 or more"),
        ("gpu_hour=inf", "not a number of 0 or more"),
    ],
)
def test_what_is_no_assumption_is_refused_in_one_line(override: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        default_assumptions(job()).replaced([override])
    assert str(refused.value).startswith(f"--assume {override}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- speed


def test_a_data_sheet_gives_a_share_of_its_figures() -> None:
    assumptions = default_assumptions(job()).replaced(["prefill_share=0.5", "decode_share=0.25"])
    rates, sheet = rates_of(job(), assumptions), accelerator("H100")
    assert rates is not None
    assert (rates.flops, rates.bytes) == (sheet.flops / 2, sheet.bandwidth / 4)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"shards": {"gpus_per_shard": 0, "accelerator": "H100"}}, "how fast a CPU is"),
        ({"shards": {}}, "set shards.accelerator"),
        ({"model": {"id": "m", "dtype": "float32"}}, "not float32"),
    ],
)
def test_where_no_data_sheet_tells_it_is_said(sections: dict[str, Any], words: str) -> None:
    other = job(**sections)
    assert rates_of(other, default_assumptions(other)) is None
    assert words in why_no_rates(other)


def document(**changes: Any) -> dict[str, Any]:
    return {
        "settings": {"stages": 2, "tensor_parallel": 1, "in_process": False},
        "machine": {"device": "cuda", "hardware": "H100", "copy_bandwidth": 3e12},
        "model": {"model_type": "llama", "flops_per_token": 2e10},
        "capture": {"engine": {"tokens_per_s": 4e4}},
        "generation": {"wall_over_bandwidth_limit": 1.5},
    } | changes


def test_a_benchmark_is_taken_by_device(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(document()))
    rates = measured_rates(file)
    assert (rates.flops, rates.bytes) == (pytest.approx(4e14), pytest.approx(2e12))
    assert "measured on H100" in rates.source
    alone = document(settings={"stages": 2, "tensor_parallel": 1, "in_process": True})  # both stages on one GPU
    del alone["generation"]
    file.write_text(json.dumps(alone))
    rates = measured_rates(file)
    assert (rates.flops, rates.bytes) == (pytest.approx(8e14), None)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(document(capture={})), json.dumps(document(machine=None))])
def test_another_file_is_no_benchmark(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(InputError, match="not what persona-ray bench --json prints") as refused:
        measured_rates(file)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"absent\.json: cannot be read"):
        measured_rates(tmp_path / "absent.json")
