"""Slurm's file: its shell, its directives, and the whole script with stand-ins for Slurm's programs and for Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster_files.files import CLUSTER

SCRIPT = CLUSTER / "slurm.sh"
TEXT = SCRIPT.read_text(encoding="utf-8")
TIME = r"(\d+-)?\d{1,2}:\d{2}:\d{2}"
DIRECTIVES = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"1",  # one Ray node a machine
    "gpus-per-node": r"([a-z]\w*:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "exclusive": None,
    "time": TIME,
    "signal": r"B:TERM@\d+",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
}
"""Options of sbatch that the script uses -> what their value looks like; None: they have none."""


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_its_directives_are_slurms_and_stand_before_the_first_command() -> None:
    lines = TEXT.splitlines()
    directives = [(number, line) for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(directives) == len(DIRECTIVES)
    for number, line in directives:
        assert number < first_command  # those after it sbatch ignores
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.+))?", line)
        assert found is not None, line
        pattern, value = DIRECTIVES[found[1]], found[2]
        assert (value is None) if pattern is None else re.fullmatch(pattern, value or ""), line


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An allocation of two nodes in which every program writes down how it was called."""
    calls = tmp_path / "calls"
    calls.touch()
    note = f'echo "$(basename "$0") $*" >>{calls}\n'
    programs = {
        "scontrol": f'case $1 in show) printf "alpha\\nbeta\\n" ;; *) {note.strip()} ;; esac',
        "srun": f'{note}while [ "${{1#--}}" != "$1" ]; do shift; done; exec "$@"',
        "hostname": 'echo "fe80::1 10.0.0.7"',
        "ray": f"""
case $1 in
  start) echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN >>{tmp_path}/tokens; {note.strip()}; exec sleep 60 ;;
  list) for node in $(grep -n "^ray start" {calls} | cut -d: -f1); do printf '{{"node_id": "%s"}}' $node; done ;;
esac""",
        "persona-ray": f"""
trap 'echo drained >>{calls}; exit 130' TERM
{note.strip()}
[ -z "$LASTS" ] || {{ sleep 60 & wait; }}
exit ${{CODE:-0}}""",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "[alpha,beta]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "TOKENS": str(tmp_path / "tokens"), "LASTS": "", **slurm}


def _start(environment: dict[str, str]) -> subprocess.Popen[str]:
    words = ["bash", str(SCRIPT), "jobs/a.yaml", "--set", "store.url=/shared/my store"]
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def _end(script: subprocess.Popen[str]) -> int:
    """As Slurm does it: what the script has left behind goes with it."""
    try:
        return script.wait(timeout=60)
    finally:
        with suppress(ProcessLookupError):  # nothing was left
            os.killpg(script.pid, signal.SIGKILL)


def _calls(environment: dict[str, str]) -> list[str]:
    return Path(environment["CALLS"]).read_text().splitlines()


def test_it_brings_up_a_head_and_a_worker_with_one_token_and_runs_the_job(cluster: dict[str, str]) -> None:
    assert _end(_start(cluster)) == 0
    calls = _calls(cluster)
    starts = [call for call in calls if call.startswith("ray start")]
    assert len(starts) == 2
    assert sum("--head --node-ip-address 10.0.0.7 --port 23456" in call for call in starts) == 1
    assert sum("--address 10.0.0.7:23456" in call for call in starts) == 1
    assert all("--temp-dir /tmp/ray-123456" in call for call in starts)
    assert any("--nodelist=alpha" in call and "--head" in call for call in calls)
    assert any("--exclude=alpha" in call for call in calls)
    assert calls[-1] == "persona-ray run jobs/a.yaml --set store.url=/shared/my store --address 10.0.0.7:23456"
    modes, tokens = zip(*(line.split() for line in Path(cluster["TOKENS"]).read_text().splitlines()), strict=True)
    assert set(modes) == {"token"}
    assert len(set(tokens)) == 1
    assert re.fullmatch(r"[0-9a-f]{32}", tokens[0])


def test_when_its_time_is_up_the_run_drains_and_the_job_queues_itself_again(cluster: dict[str, str]) -> None:
    script = _start(cluster | {"LASTS": "yes"})
    deadline = time.monotonic() + 60
    while not any(call.startswith("persona-ray") for call in _calls(cluster)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert _end(script) == 130
    assert _calls(cluster)[-2:] == ["drained", "scontrol requeue 123456"]


def test_a_job_that_is_wrong_is_not_queued_again(cluster: dict[str, str]) -> None:
    assert _end(_start(cluster | {"CODE": "2"})) == 2
    assert not any(call.startswith("scontrol requeue") for call in _calls(cluster))


def test_without_a_job_it_says_what_is_missing() -> None:
    ended = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "which job?" in ended.stderr
