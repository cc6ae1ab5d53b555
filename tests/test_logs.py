"""Logs for machines."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from persona_ray.errors import InputError
from persona_ray.logs import KEYS, JsonLines, at_work, log_to


def test_a_record_is_one_line_with_what_it_is_about() -> None:
    record = logging.LogRecord("persona_ray.x", logging.WARNING, "x.py", 1, "unit %d\nis late", (7,), None)
    record.__dict__.update(unit=7, replica=2, secret="no")
    line = JsonLines("a-run").format(record)
    assert "\n" not in line
    facts = json.loads(line)
    assert facts.pop("time").endswith("+00:00")
    expected = {"level": "WARNING", "run": "a-run", "logger": "persona_ray.x", "message": "unit 7\nis late", "unit": 7, "replica": 2}
    assert facts == expected


def test_details_go_to_the_file_and_not_to_people(tmp_path: Path) -> None:
    program = (
        "import logging, pathlib\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "logging.getLogger('persona_ray').setLevel(logging.INFO)\n"
        "from persona_ray.logs import log_to\n"
        f"log_to(pathlib.Path({str(tmp_path / 'log')!r}), 'r')\n"
        "log = logging.getLogger('persona_ray.scheduler')\n"
        "log.debug('a lease'); log.info('a loss')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in (tmp_path / "log").read_text().splitlines()] == ["a lease", "a loss"]
    assert "a loss" in done.stderr
    assert "a lease" not in done.stderr


def test_a_file_that_cannot_be_written_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--log .*cannot be written"):
        log_to(tmp_path / "none" / "log", "r")


def test_what_a_thread_works_on_is_in_all_it_logs_and_in_nobody_elses() -> None:
    lines = JsonLines("a-run", replica=3, stage=0)

    def facts(**extra: object) -> dict[str, object]:
        record = logging.LogRecord("persona_ray.x", logging.INFO, "x.py", 1, "done", (), None)
        record.__dict__.update(extra)
        kept: dict[str, object] = json.loads(lines.format(record))
        return {key: kept[key] for key in KEYS if key in kept}

    always = {"run": "a-run", "replica": 3, "stage": 0}
    with ThreadPoolExecutor(1) as pool, at_work(unit=7, kind="whole"):
        with at_work(kind="trial"):
            assert facts() == always | {"unit": 7, "kind": "trial"}
            assert facts(unit=8) == always | {"unit": 8, "kind": "trial"}
        assert facts() == always | {"unit": 7, "kind": "whole"}
        assert pool.submit(facts).result() == always
    assert facts() == always
