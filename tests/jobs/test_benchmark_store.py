"""The script measures every kind of place, leaves nothing behind, and says what is wrong in one line. Never how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "jobs" / "benchmark_store.py"
SMALL = ["--pairs", "2", "--units", "3", "--threads", "2", "--layers", "2", "--hidden", "64", "--unit-mb", "0.002"]


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_store", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up.
    sys.modules["benchmark_store"] = module
    spec.loader.exec_module(module)
    return module


def test_every_option_arrives(job: ModuleType) -> None:
    assert job.parsed([]).settings == job.Settings()
    given = job.parsed(["--url", "a", "--url", "b", "--moto", "--json", "x.json", *SMALL])
    assert given.settings == job.Settings(pairs=2, units=3, threads=2, layers=2, hidden=64, unit_mb=0.002)
    assert (given.url, given.moto, given.json) == (["a", "b"], True, Path("x.json"))


def test_a_folder_and_a_server_are_measured(job: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = tmp_path / "place", tmp_path / "bench.json"
    assert job.main(["--url", str(place), "--moto", "--json", str(out), *SMALL]) == 0
    document = json.loads(out.read_text())
    assert [one["place"] for one in document["places"]] == [str(place), "moto"]
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
        assert one["peak_mb_above_start"]["unit_float32_mb"] == 4 * document["settings"]["unit_rows"] * 2 * 64 / 1e6
        assert one["peak_mb_above_start"]["writing"] >= 0
    assert document["encoded"]["of"] == "made-up activations"
    assert document["encoding_cpu_s_per_gb"] > 0
    assert not list(place.iterdir())
    shown = capsys.readouterr().out
    assert shown.count("reading, one pass") == 2
    assert "moto" in shown


def test_the_encoded_share_is_that_of_the_objects(job: ModuleType, tmp_path: Path) -> None:
    work = job.Work(job.Settings(pairs=1, units=2, threads=1, layers=2, hidden=64, unit_mb=0.004))
    work.prepare(str(tmp_path))
    writer = job.UnitWriter(str(tmp_path))
    for unit in work.batch(0):
        job.write(writer, unit)
    sizes = [path.stat().st_size for path in (tmp_path / "activations" / "c").rglob("*") if path.is_file()]
    assert len(sizes) == 2
    assert job.encoded_share(str(tmp_path)) == sum(sizes) / (2 * 2 * work.settings.unit_rows * 2 * 64)


def test_made_up_activations_have_massive_dims_and_a_common_mean(job: ModuleType) -> None:
    values_RLD = job.like_a_residual_stream(np.random.default_rng(0), 64, 3, 512)
    assert values_RLD.shape == (64, 3, 512)
    assert values_RLD.dtype == np.float32
    largest_D = np.sort(np.abs(values_RLD[:, -1]).mean(axis=0))
    assert largest_D[-1] > 20 * np.median(largest_D)
    centred_RD = values_RLD[:, -1] - values_RLD[:, -1].mean(axis=0)
    assert np.linalg.norm(centred_RD) < np.linalg.norm(values_RLD[:, -1])


def test_work_is_shared_out_and_its_faults_come_back(job: ModuleType) -> None:
    done: list[int] = []
    job.share_out(range(20), ["left", "right"], lambda _, number: done.append(number))
    assert sorted(done) == list(range(20))
    with pytest.raises(ZeroDivisionError):
        job.share_out([1, 0], ["only"], lambda _, number: 1 / number)


def test_turns_alternate(job: ModuleType) -> None:
    order: list[str] = []

    def contestant(name: str) -> job.Took:
        return lambda turn: order.append(f"{name}{turn}") or job.Took(1e6, 1.0, 0.5)

    took = job.in_turns(2, {"a": contestant("a"), "b": contestant("b")})
    assert order == ["a0", "b0", "b1", "a1"]
    assert job.compared(took["a"], [job.Took(1e6, 0.5, 0.5)] * 2)["over_bare"] == 0.5


def test_wrong_input_is_one_line(job: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert job.main(["--url", "http://somewhere", *SMALL]) == 2
    assert "http: is not served" in capsys.readouterr().err.splitlines()[-1]
    assert job.main(["--store", str(tmp_path / "none"), "--url", str(tmp_path), *SMALL]) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) > len("benchmark: ")
    with pytest.raises(SystemExit):
        job.parsed(["--units", "0"])
