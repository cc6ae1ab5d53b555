"""Rows that no replica survives, limits, and runs that are told to stop: on a real local Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from persona_ray import pipeline
from persona_ray.errors import EXIT_INTERRUPTED, NothingUsableError
from persona_ray.planning import prepare
from persona_ray.rollouts.extract import ExtractUnit
from persona_ray.scheduler.driver import WHY_REFUSED, Driver, cluster
from persona_ray.scheduler.state import Rules, SchedulerState
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.spec import Captured, Engine, Receipt, Rollout, Spans, Unit
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from tests.cluster.runs import QUIET, bits_of, job_for

POISON = 9
"""Index of the row: the second of the third unit."""
RULES = Rules(max_faults=1, first_deadline_s=8, deadline_floor_s=8, pause_s=0.1)


class NotANumber:
    """The engine, but its activations of some token ids are not finite."""

    def __init__(self, engine: Engine, poison: set[bytes]) -> None:
        self._engine, self._poison = engine, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def capture(self, rollouts: Sequence[Spans]) -> Captured:
        captured = self._engine.capture(rollouts)
        means_RLD = captured.means_RLD.copy()
        means_RLD[[rollout.token_ids.tobytes() in self._poison for rollout in rollouts]] = np.nan
        return replace(captured, means_RLD=means_RLD)


@dataclass(frozen=True)
class Poisoned:
    """The real work, but one row crashes the process, never ends, or gives NaN."""

    work: ExtractUnit
    how: str
    token_ids: bytes

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        return self.work(unit, self._strike(unit, engine))

    def text(self, unit: Unit, engine: Engine) -> tuple[Rollout, ...]:
        return self.work.text(unit, self._strike(unit, engine))

    def finish(self, unit: Unit, engine: Engine, rollouts: Sequence[Rollout]) -> Receipt:
        return self.work.finish(unit, self._strike(unit, engine), rollouts)

    def trial(self, unit: Unit, engine: Engine) -> None:
        self.work.trial(unit, self._strike(unit, engine))

    def _strike(self, unit: Unit, engine: Engine) -> Engine:
        if self.how == "nan":
            return NotANumber(engine, {self.token_ids})
        if any(row.index == POISON and row.index not in unit.excluded for row in unit.rows):
            if self.how == "crash":
                os._exit(1)
            time.sleep(3600)
        return engine


@pytest.mark.parametrize(
    ("how", "reason"),
    [("crash", WHY_REFUSED), ("hang", f"{WHY_REFUSED}: did not end within"), ("nan", "activations are not finite")],
    ids=["crashes", "never-ends", "not-a-number"],
)
def test_exactly_the_poison_row_is_refused(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path, how: str, reason: str
) -> None:
    expected = bits_of(finished)
    setup = prepare(job_for(chat_model, small_catalog, tmp_path / "store"))
    plans = prepare_store(setup.job.store.url, identity=setup.identity, plan=setup.plan, job=setup.job.as_dict())
    units = {index: setup.unit(plans, index) for index in plans.units}
    work = Poisoned(setup.work, how, expected[POISON][0])
    state = SchedulerState({index: len(unit.rows) for index, unit in units.items()}, rules=replace(RULES, window=1))
    with cluster(None), Replicas(setup.replica, work, count=1, name="poisoned") as replicas:
        Driver(state, units, replicas).run(lambda _: None)
    state.validate()
    ledger = open_store(setup.job.store.url).ledger
    refused = {row: why for marker in ledger.markers().values() for row, why in marker.refused.items()}
    assert reason in refused[POISON]
    assert refused.keys() == {POISON} | (set(range(32)) - expected.keys())
    del expected[POISON]
    assert bits_of(tmp_path / "store") == expected


def test_a_limit_of_rows_is_a_clean_stop_and_the_next_run_goes_on(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path
) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store", limits={"rows": 22})
    first = pipeline.run(job, QUIET)
    assert (first.units_done, first.stopped) == (5, "limits.rows: 22 in one run")
    assert open_store(first.store_url).ledger.committed() == {0, 1, 2, 3, 4}
    second = pipeline.run(job, QUIET)
    assert (second.units_done, second.stopped) == (3, None)
    assert bits_of(tmp_path / "store") == bits_of(finished)


def test_a_limit_below_one_unit_is_wrong_input(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limits\.rows: 3, and the next unit alone has 4 rows"):
        pipeline.run(job_for(chat_model, small_catalog, tmp_path / "store", limits={"rows": 3}), QUIET)
    assert not (tmp_path / "store").exists()


def test_hours_that_are_over_stop_the_run_after_what_is_under_way(chat_model: Path, small_catalog: Path, tmp_path: Path) -> None:
    job = job_for(chat_model, small_catalog, tmp_path / "store", limits={"hours": 1e-9})
    with pytest.raises(NothingUsableError, match="not one unit is committed"):
        pipeline.run(job, QUIET)
    assert not open_store(job.store.url).ledger.committed()


def test_a_run_that_is_told_to_stop_finishes_its_units_and_says_how_to_go_on(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path
) -> None:
    url, path = tmp_path / "store", tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(job_for(chat_model, small_catalog, url).model_dump_json())))
    command = [sys.executable, "-m", "persona_ray", "run", str(path), "--report", str(tmp_path / "report.html")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while not list(url.glob("_commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # Ctrl-C; SIGTERM is what `persona-ray stop` sends (test_submit)
    _, said = process.communicate(timeout=200)
    assert process.returncode == EXIT_INTERRUPTED
    assert "SIGINT received" in said
    assert said.strip().splitlines()[-1].startswith("persona-ray: interrupted; what is committed is safe, and the same command resumes:")
    texts = {path.stem.removeprefix("part-") for path in url.glob("rollouts/part-*.parquet")}
    markers = {path.stem for path in url.glob("_commits/*.json")}
    assert texts == markers  # nothing was begun and left undone
    assert 0 < len(markers) < 8
    pipeline.run(job_for(chat_model, small_catalog, url), QUIET)
    assert bits_of(url) == bits_of(finished)
