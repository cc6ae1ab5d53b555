"""The script understands its command line, measures, and says what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from persona_ray.bench.settings import Settings, options
from persona_ray.cli import app
from tests.jobs.scripts import script


@pytest.fixture(scope="module")
def job() -> ModuleType:
    return script("benchmark_engine")


def test_every_option_arrives(job: ModuleType) -> None:
    assert job.parsed([]) == (Settings(), None)
    given = job.parsed(["--random", "hidden=64", "--stages", "3", "--temperature", "0", "--in-process", "--json", "x.json"])
    assert given == (Settings(random="hidden=64", stages=3, temperature=0.0, in_process=True), Path("x.json"))


def test_wrong_input_is_one_line(job: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert job.main(["--config", str(tmp_path), "--device", "cpu"]) == 2
    assert "has no config.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_config_alone_is_measured(job: ModuleType, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((chat_model / "config.json").read_text())
    small = ["--conversations", "4", "--longest", "24", "--repeats", "1", "--cost-rows", "2", "--growth-batches", "0"]
    out = tmp_path / "bench.json"
    assert job.main(["--config", str(tmp_path), "--device", "cpu", "--dtype", "float32", "--in-process", "--json", str(out), *small]) == 0
    document = json.loads(out.read_text())
    assert document["model"]["layers"] == 4
    assert "engine / floor" in capsys.readouterr().out


def test_the_command_has_the_same_options() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output
    assert all(f"--{name.replace('_', '-')}" in shown for name in [*options(), "json"])
    assert "--as-json" not in shown
    refused = CliRunner().invoke(app, ["bench", "--dtype", "int8"])
    assert "--dtype" in str(refused.exception)
