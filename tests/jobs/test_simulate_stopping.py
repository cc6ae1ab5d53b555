"""The rule, on simulated runs: it saves most of the plan where rows lie close, nothing where they do not, and keeps its word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from persona_ray.reduce.convergence import StopRule
from tests.jobs.scripts import script


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return script("simulate_stopping")


def test_rows_lie_as_far_from_their_mean_as_was_said(job: ModuleType) -> None:
    size = job.Size(archetypes=30, prompts=3, questions=40, width=64)
    rows = job.Rows(size, 0.8, seed=3)
    waves = np.stack([rows.wave(place % 3, place) for place in range(40)])
    spread = np.sqrt(((waves - rows.mean_GD) ** 2).sum(axis=-1).mean()) / np.linalg.norm(rows.axis_D)
    assert spread == pytest.approx(0.8, rel=0.1)
    assert sum(job.SHARES.values()) == pytest.approx(1)


def test_close_rows_end_a_run_early_and_far_ones_never(job: ModuleType) -> None:
    size = job.Size(archetypes=12, prompts=4, questions=50, width=64)
    rule = StopRule(cosine=0.999, patience=3, min_per_archetype=10)
    close, far = (job.simulate(size, spread, replace(rule)) for spread in (0.2, 3.0))
    assert close.share_of_plan < 0.5
    assert close.cosine_with_full_plan >= 0.998
    assert far.share_of_plan == 1
    assert far.cosine_with_full_plan == pytest.approx(1)


def test_the_script_prints_a_table(job: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stopping.json"
    job.main(["--archetypes", "4", "--questions", "12", "--width", "16", "--prompts", "2", "--json", str(out)])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(job.SPREADS) == 1 + len(json.loads(out.read_text())["runs"])
    with pytest.raises(SystemExit):
        job.main(["--passing", "0"])
