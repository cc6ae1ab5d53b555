"""A run that ends when its axis holds still: on the shipped model, beside the same run going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from persona_ray import pipeline
from persona_ray.config import Job, parse_job
from persona_ray.errors import InputError
from persona_ray.report.watch import Watched, status_table
from persona_ray.spec import Float32
from persona_ray.store.reader import open_store
from persona_ray.terminal import TerminalProgress

QUIET = TerminalProgress(Console(quiet=True))
STOP = {"cosine": 0.98, "patience": 2, "min_per_archetype": 10}
ROWS_PER_ARCHETYPE = 12 * 2 * 40


def job_for(url: Path, **reduce: Any) -> Job:
    return parse_job(
        {
            "model": {"id": "builtin:tiny-persona", "dtype": "float32"},
            "shards": {"gpus_per_shard": 0},
            "catalog": {"archetypes": ["teacher", "vampire"], "questions": 12, "system_prompts": 2, "samples": 40},
            "rollouts": {"max_new_tokens": 8, "temperature": 0.2},
            "capture": {"layers": [2]},
            "store": {"url": str(url), "unit_rows": 36},
            "judge": {"backend": "lexicon"},
            "reduce": {"min_score": 0, "bootstrap": 0, "stop": STOP} | reduce,
        }
    )


def printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cosine(left_LD: Float32, right_LD: Float32) -> float:
    left_D, right_D = left_LD[0].astype(float), right_LD[0].astype(float)
    return float(left_D @ right_D / np.linalg.norm(left_D) / np.linalg.norm(right_D))


def test_it_stops_at_a_fraction_says_so_begins_nothing_again_and_can_go_on(tmp_path: Path) -> None:
    url = tmp_path / "store"
    early = pipeline.run(job_for(url), QUIET)
    assert early.stopped is not None
    assert early.has_converged
    assert early.stopped.startswith("reduce.stop: the axis at layer 2 has held still for 2 looks")
    assert "--set reduce.stop=null" in early.stopped
    num_rows: int = early.counts.stored
    fraction = num_rows / (3 * ROWS_PER_ARCHETYPE)
    print(f"\nstopped after {fraction:.1%} of the rows")
    assert fraction < 0.5
    assert early.reduced.attributes["num_rows"] == num_rows
    facts = Watched(store_url=str(url)).look()
    look = facts["store"]["axis_so_far"]
    assert look["layers"] == (2,)
    assert look["expected_cosine"][0] >= STOP["cosine"]
    assert f"after {look['rows_per_archetype']} of each (layer 2)" in printed(status_table(facts))

    before = open_store(str(url)).ledger.committed()
    again = pipeline.run(job_for(url), QUIET)
    assert (again.units_done, again.stopped is not None) == (0, True)
    assert open_store(str(url)).ledger.committed() == before

    longer = job_for(url, stop=None).model_copy(update={"limits": job_for(url).limits.model_copy(update={"rows": 2 * num_rows})})
    further = pipeline.run(longer, QUIET)
    assert further.counts.stored >= 2.5 * num_rows
    assert before < open_store(str(url)).ledger.committed()
    assert cosine(early.reduced.axis_LD, further.reduced.axis_LD) >= 0.97


def test_a_layer_that_is_not_captured_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reduce\.stop\.layers: \[4\] are not among the captured layers \[2\]"):
        pipeline.run(job_for(tmp_path / "store", stop=STOP | {"layers": [2, 4]}), QUIET)
    assert not (tmp_path / "store").exists()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_at_a_cosine_of_0_999_a_fraction_does_and_its_axis_is_that_of_the_whole_plan(tmp_path: Path) -> None:
    url = tmp_path / "store"
    job = job_for(url, stop={"cosine": 0.999})
    job = job.model_copy(update={"catalog": job.catalog.model_copy(update={"samples": 80})})
    early = pipeline.run(job, QUIET)
    assert early.has_converged
    whole = pipeline.run(job.model_copy(update={"reduce": job.reduce.model_copy(update={"stop": None})}), QUIET)
    fraction, found = early.counts.stored / whole.counts.stored, cosine(early.reduced.axis_LD, whole.reduced.axis_LD)
    look = open_store(str(url)).latest_look()
    assert look is not None
    held = f"the axis held still after {look.rows_per_archetype:,} rows of each archetype"
    print(f"\n{held}; stopped after {early.counts.stored:,} of {whole.counts.stored:,} rows ({fraction:.0%}); axes have cosine {found:.5f}")
    assert fraction < 1
    assert found >= 0.998
