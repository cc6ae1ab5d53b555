"""Whatever strikes a run, at whatever moment: its store is that of a run that nothing has struck."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_ray import pipeline
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from tests.cluster.chaos import Chaos, LocalCluster
from tests.cluster.runs import QUIET, bits_of, job_for

FEW = {"actor killed": 2, "actor told to exit": 1, "node lost": 1, "driver killed": 1}
MANY = {"actor killed": 10, "actor told to exit": 10, "node lost": 5, "driver killed": 5, "head killed": 2}


def markers_of(url: Path) -> dict[int, dict[str, Any]]:
    """Markers without their timings."""
    markers = {}
    for path in url.glob("_commits/*.json"):
        marker = json.loads(path.read_text())
        del marker["created"], marker["made"]["seconds"]
        markers[int(path.stem)] = marker
    return markers


def survive(model: Path, catalog: Path, tmp_path: Path, *, samples: int, faults: dict[str, int], between: int) -> None:
    """Run once in peace and once through all faults, in a random order; `PERSONA_RAY_SEED` replays one."""
    seed = int(os.environ.get("PERSONA_RAY_SEED") or random.randrange(10**6))
    print(f"\nPERSONA_RAY_SEED={seed} replays this")  # before anything can go wrong
    sections: dict[str, Any] = {
        "catalog": {"source": str(catalog), "system_prompts": 2, "questions": 4, "samples": samples},
        "rollouts": {"max_new_tokens": 40, "temperature": 1.0},  # units that take a while, so that they are struck under way
        "store": {"dtype": "float32", "unit_rows": 2},
        "shards": {"gpus_per_shard": 0, "replicas": 2},
    }
    peaceful, struck = tmp_path / "peaceful", tmp_path / "struck"
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(json.loads(job_for(model, catalog, struck, **sections).model_dump_json())))
    order = [fault for fault, number in faults.items() for _ in range(number)]
    random.Random(seed).shuffle(order)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:  # Ray's sockets need a short path
        chaos = Chaos(LocalCluster(Path(folder) / "ray", workers=2), job, struck, tmp_path / "chaos.log", random.Random(seed))
        try:
            chaos.run(order, between)
        finally:
            chaos.end()
    in_flight = sum(bool(strike.units) for strike in chaos.strikes)
    print(f"seed {seed}: {len(chaos.strikes)} faults, {in_flight} of them struck units under way")
    for strike in chaos.strikes:
        units = ", ".join(map(str, strike.units)) or "none"
        print(f"{strike.at_s:7.1f} s  {strike.num_committed:4} committed  {strike.fault:18}  units {units}")
    pipeline.run(job_for(model, catalog, peaceful, **sections), QUIET)
    assert len(chaos.strikes) == sum(faults.values())
    assert 2 * in_flight >= len(chaos.strikes)
    assert bits_of(struck) == bits_of(peaceful)
    assert markers_of(struck) == markers_of(peaceful)  # with the digests of all objects
    assert verify(str(struck)).is_right
    counts = open_store(str(struck)).ledger.counts()
    assert counts.asked == counts.stored + counts.refused == 32 * samples


@pytest.mark.timeout(600)
def test_a_few_faults_of_every_kind(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    survive(chat_model, small_catalog, tmp_path, samples=6, faults=FEW, between=4)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_all_of_them_in_one_run(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    survive(chat_model, small_catalog, tmp_path, samples=18, faults=MANY, between=3)
