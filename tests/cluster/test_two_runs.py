"""Two runs of one job at the same time, each with its own driver and its own cluster: they share the work by the store's ledger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from tests.cluster.runs import job_for

NUM_UNITS = 208


def start(job: Path, number: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "persona_ray", "run", str(job), "--json", "--report", str(job.with_suffix(f".{number}.html"))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_units_are_shared_and_hardly_any_is_computed_twice(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    url, file = tmp_path / "store", tmp_path / "job.yaml"
    job = job_for(chat_model, small_catalog, url, catalog={"samples": 13}, rollouts={"max_new_tokens": 48}, store={"unit_rows": 2})
    file.write_text(yaml.safe_dump(json.loads(job.model_dump_json())))
    runs = [start(file, number) for number in range(2)]
    ends = [run.communicate(timeout=800) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], [said for _, said in ends]
    told = [json.loads(out) for out, _ in ends]
    # What was left to do when each began, whoever did it then.
    left, double = [one["units_done"] for one in told], [one["units_double"] for one in told]
    share = f"{sum(double)} were computed by both ({sum(double) / NUM_UNITS:.1%})"
    print(f"\n{left[0]} and {left[1]} of {NUM_UNITS} units were left to do, {share}")
    assert min(left) > NUM_UNITS // 2, "they were at work at the same time"
    assert sum(double) <= NUM_UNITS // 10
    store = open_store(str(url))
    assert store.ledger.committed() == set(range(NUM_UNITS))
    assert {one["rows"]["asked"] for one in told} == {2 * NUM_UNITS}
    assert verify(str(url)).is_right
