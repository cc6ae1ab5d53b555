"""What `plan` says beside what a run then wrote; and a run that ends when its money is spent."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from persona_ray import pipeline
from persona_ray.config import Job, parse_job
from persona_ray.costs.estimate import estimate
from persona_ray.interrupt import Interruptions
from persona_ray.planning import prepare
from persona_ray.scheduler.driver import cluster
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.store.expected import plan_objects, unit_keys
from persona_ray.store.ledger import Ledger
from persona_ray.store.prepare import prepare_store
from persona_ray.terminal import TerminalProgress

QUIET = TerminalProgress(Console(quiet=True))


def job_for(url: Path, **limits: float) -> Job:
    return parse_job(
        {
            "model": {"id": "builtin:tiny-persona", "dtype": "float32"},
            "shards": {"gpus_per_shard": 0},
            "catalog": {"archetypes": ["teacher", "vampire", "bard"], "questions": 12, "system_prompts": 2},
            "rollouts": {"max_new_tokens": 96},
            "capture": {"max_length": 512},
            "store": {"url": str(url), "unit_rows": 16},
            "limits": limits,
        }
    )


class Metered(Replicas):
    """Costs an hour for each unit that is committed: how fast the machine is does not matter."""

    url: str

    @property
    def device_hours(self) -> float:
        return len(Ledger(self.url).committed())


def files_of(folder: Path) -> dict[str, int]:
    """Key -> bytes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_run_ends_when_its_money_is_spent_and_the_next_one_leaves_what_was_planned(tmp_path: Path) -> None:
    url = tmp_path / "store"
    limited, free = prepare(job_for(url, money=7.5, gpu_hour_price=10)), prepare(job_for(url))
    whole = estimate(free).facts()["whole"]
    began = time.monotonic()
    with cluster(None), Interruptions() as interruptions, Metered(free.replica, free.work, count=1, name="planned") as replicas:
        replicas.url = free.job.store.url
        replicas.check()
        plans = prepare_store(str(url), identity=free.identity, plan=free.plan, job=free.job.as_dict())
        first = pipeline.extract(limited, plans, replicas, QUIET, interruptions)
        ledger = Ledger(str(url))
        begun = len(ledger.committed())
        left = estimate(free).facts()["left"]
        second = pipeline.extract(free, plans, replicas, QUIET, interruptions)
    took_h = (time.monotonic() - began) / 3600

    # A committed unit costs more than was to be spent: what is under way is finished, and nothing else is begun.
    assert (first.stopped, first.num_units) == ("limits.money: 7.5 are spent", begun)
    assert 1 <= begun <= 2 * free.replica.concurrent_units < plans.num_units
    assert (second.stopped, second.num_units) == (None, left["units"])
    assert 0 < Replicas.device_hours.fget(replicas) <= took_h  # type: ignore[attr-defined]  # one shard

    # What was planned is what was written, before anybody has judged or reduced it. The kept moments belong to the reduction.
    written = files_of(url)
    expected = {*plan_objects(plans, str(url)), *(key for unit in plans.units for key in unit_keys(plans, unit))}
    assert {key for key in written if not key.startswith(("_moments/", "_looks/"))} == expected
    assert whole["objects"] == {"rollouts": len(expected), "scores": 0}
    assert (whole["rows"], whole["units"]) == (sum(marker.num_rows for marker in ledger.markers().values()), len(ledger.committed()))
    num_bytes = sum(written[key] for key in expected)
    tokens = sum(marker.made["tokens"] for marker in ledger.markers().values())
    print(f"\nplanned beside written: bytes {whole['bytes'] / num_bytes - 1:+.2%}, tokens {whole['tokens'] / tokens - 1:+.2%}")
    assert abs(whole["bytes"] / num_bytes - 1) <= 0.05
    assert abs(whole["tokens"] / tokens - 1) <= 0.15
