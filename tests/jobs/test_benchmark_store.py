"""The script measures every kind of place, leaves nothing behind, and says what is wrong in one line. Never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from persona_ray.bench_store.settings import Settings
from tests.jobs.scripts import script

SMALL = ["--pairs", "2", "--units", "3", "--threads", "2", "--layers", "2", "--hidden", "64", "--unit-mb", "0.002"]


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """The script as a module."""
    return script("benchmark_store")


def test_every_option_arrives(job: ModuleType) -> None:
    assert job.parsed([]).settings == Settings()
    given = job.parsed(["--url", "a", "--url", "b", "--moto", "--json", "x.json", *SMALL])
    assert given.settings == Settings(pairs=2, units=3, threads=2, layers=2, hidden=64, unit_mb=0.002)
    assert (given.url, given.moto, given.json) == (["a", "b"], True, Path("x.json"))


def test_a_folder_and_a_server_are_measured(job: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = tmp_path / "place", tmp_path / "bench.json"
    assert job.main(["--url", str(place), "--moto", "--link-mb-per-s", "100", "--json", str(out), *SMALL]) == 0
    document = json.loads(out.read_text())
    assert [one["place"] for one in document["places"]] == [str(place), f"{place}, 100 MB/s", "moto", "moto, 100 MB/s"]
    for one in document["places"]:
        # Text, activations, three columns, marker, `committed`.
        assert one["writing"]["objects_per_unit"] == one["writing"]["requests_per_unit"]["create_once"] == 7
        # Marker and activations.
        assert one["reading"]["requests_per_unit"] == {"get_or_none": 2}
        assert one["reading"]["gets_at_once"] >= 1
        for part in ("writing", "reading", "layer"):
            assert len(one[part]["pairs"]) == 2
            assert min(one[part]["pairs"]) <= one[part]["over_bare"] <= max(one[part]["pairs"])
            assert min(one[part][name] for name in ("over_bare", "mb_per_s", "bare_mb_per_s", "cpu_s_per_gb")) > 0
        if one["link_mb_per_s"]:
            continue
        assert one["peak_mb_above_start"]["unit_float32_mb"] == 4 * document["settings"]["unit_rows"] * 2 * 64 / 1e6
        assert one["peak_mb_above_start"]["writing"] >= 0
    assert document["encoded"]["of"] == "made-up activations"
    assert document["encoding_cpu_s_per_gb"] > 0
    assert not list(place.iterdir())
    shown = capsys.readouterr().out
    assert shown.count("reading, one pass") == 4
    assert "moto" in shown


def test_wrong_input_is_one_line(job: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert job.main(["--url", "http://somewhere", *SMALL]) == 2
    assert "http: is not served" in capsys.readouterr().err.splitlines()[-1]
    assert job.main(["--store", str(tmp_path / "none"), "--url", str(tmp_path), *SMALL]) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) > len("benchmark: ")
    with pytest.raises(SystemExit):
        job.parsed(["--units", "0"])
