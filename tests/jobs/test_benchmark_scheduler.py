"""The script drives no-op replicas to the end and says what it took. Never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.scripts import JOBS

pytestmark = pytest.mark.serial


def test_all_units_are_dispatched_and_the_numbers_told(tmp_path: Path) -> None:
    out = tmp_path / "scheduler.json"
    few = ["--replicas", "2", "--units", "20", "--unit-s", "0.01", "--json", str(out)]
    # In a process of its own: the actors' class is found by them in the script that was started.
    done = subprocess.run([sys.executable, JOBS / "benchmark_scheduler.py", *few], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["no-op"]["units"], found["paced"]["units"]) == (20, 20)
    assert found["no-op"]["units_per_s"] > 0
    assert "of a replica's time" in done.stdout
