"""Every command line of ours that somebody may copy is one that our program understands."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from persona_ray.cli import UsageError
from persona_ray.config import load_job
from tests.cluster_files.files import CLUSTER, JOBS, ROOT, Command, commands_of, parse

READ = [
    ROOT / "README.md",
    *sorted(path for path in CLUSTER.iterdir() if path.is_file()),
    *sorted(JOBS.glob("*.yaml")),
    *sorted(path for path in (ROOT / "infra").rglob("*") if path.is_file() and path.suffix not in {".png", ".json"}),
]
COMMANDS = [command for path in READ for command in commands_of(path)]


def test_none_is_overlooked() -> None:
    """As many as a plain search finds in files where each line that names the program calls it."""
    found = {path: len(list(commands_of(path))) for path in READ}
    for path in [*JOBS.glob("*.yaml"), CLUSTER / "slurm.sh", CLUSTER / "skypilot.yaml", CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]:
        text = path.read_text(encoding="utf-8").replace("those of persona-ray run", "")
        assert found[path] == len(re.findall(r"persona-ray (?:run|plan|submit|watch|quickstart)", text)), path.name
    assert found[CLUSTER / "kuberay-rayjob.yaml"] == 2
    assert found[CLUSTER / "README.md"] == 3
    assert found[ROOT / "README.md"] > 20


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {command.line[:60]}")
def test_our_program_understands_it(command: Command) -> None:
    assert parse(command.words).startswith("persona-ray ")


@pytest.mark.parametrize(
    "line", ["run", "run a.yaml --adress auto", "sumbit a.yaml", "store", "plan a.yaml b.yaml", "watch --interval soon x"]
)
def test_it_does_not_understand_everything(line: str) -> None:
    with pytest.raises(UsageError):
        parse(line.split())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {command.line[:60]}")
def test_the_files_it_names_are_there_and_its_settings_are_keys(command: Command) -> None:
    words = command.words
    jobs = [Path(word).name for word in words if re.search(r"(^|/)jobs/[a-z0-9.-]+\.yaml$", word)]
    settings = [value for option, value in pairwise(words) if option == "--set"]
    for name in jobs:
        assert load_job(JOBS / name, settings)
