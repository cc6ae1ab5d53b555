"""The script decomposes the same rows in every way, and its errors are small. Never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.jobs.scripts import script


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return script("benchmark_reduce")


def test_ours_and_theirs_find_the_same_components(job: ModuleType) -> None:
    size = job.Size(rows=600, width=80, layers=2, batch=50, rank=12)
    found = {way: measure(size) for way, measure in job.WAYS.items()}
    told = {way: job.errors(result, found["scatter"]) for way, result in found.items()}
    for way, most in (("scatter", 1e-12), ("incremental", 0.02), ("scikit-incremental", 0.2), ("scikit-pca", 0.02)):
        assert told[way]["variance_error_first_10"] < most, way
    for error in ("variance_error_first_10", "variance_error_all"):
        assert told["incremental"][error] <= told["scikit-incremental"][error]


def test_the_script_writes_what_it_measured(job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "reduce.json"
    monkeypatch.setattr(job, "apart", lambda way, size: job.WAYS[way](size))  # a process for each is a script's own business
    monkeypatch.setattr(
        "sys.argv",
        ["benchmark", "--rows", "120", "--width", "40", "--layers", "1", "--batch", "30", "--rank", "4", "--grow", "--json", str(out)],
    )
    job.main()
    document = json.loads(out.read_text())
    assert {way["name"] for way in document["ways"]} == {
        "persona_ray incremental",
        "persona_ray scatter",
        "scikit-learn IncrementalPCA",
        "scikit-learn PCA",
    }
    assert [grown["rows"] for grown in document["growth"]] == [120, 240, 480, 120]


def test_a_rank_that_does_not_fit_is_told(job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--rank", "300"])
    with pytest.raises(SystemExit) as end:
        job.main()
    assert end.value.code == 2
    assert "--rank 300 must be below" in capsys.readouterr().err
