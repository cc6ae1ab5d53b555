"""What the tests of this folder read: the files of cluster/, jobs/ and the READMEs, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from persona_ray.cli import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
JOBS = ROOT / "jobs"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)

BEFORE = r"^(?:[#\s*-]|\$ |run: |entrypoint: >-)*"
"""What may stand before a command that begins its line: comment signs, indentation, a prompt."""
PLACEHOLDERS = {'"$@"': "jobs/quickstart.yaml", "HEAD:6379": "127.0.0.1:6379"}
SHELL = re.compile(r"\s(?:&|\|\||&&|;|>|<|\|)(?:\s|$)|\s&$")
"""Where the command ends and the shell goes on."""


@dataclass(frozen=True)
class Command:
    """A command line of ours, and where it stands."""

    where: str
    line: str

    @property
    def words(self) -> list[str]:
        """After the program's name; without comment, and without what the shell does with its output."""
        text = SHELL.split(self.line)[0]
        for placeholder, value in PLACEHOLDERS.items():
            text = text.replace(placeholder, value)
        return shlex.split(text, comments=True)[1:]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands_of(path: Path) -> Iterator[Command]:
    """Every line that begins with our program: of a README, only those of its fenced blocks of shell; of YAML, the entry point, too."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    if path.name == "kuberay-rayjob.yaml":
        yield Command(name, load(path)["spec"]["entrypoint"])
        text = re.sub(r"entrypoint: >-\n.*?\n  #", "#", text, flags=re.DOTALL)
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        if found := re.search(BEFORE + r"(persona-ray [a-z].*)$", line):
            # In the job files' first lines a second way of doing the same may follow after a wide gap.
            for part in re.split(r"\s{4,}or\s{4,}", found[1]):
                yield Command(name, part)


def parse(words: list[str]) -> str:
    """Name of the command that our program understands `words` as; nothing is run. Raises click's UsageError."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("persona-ray", list(words), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        if not (left := [*context._protected_args, *context.args]):
            context.fail("a command is missing")
        name, command, rest = command.resolve_command(context, left)
        context = command.make_context(name, rest, parent=context)
    return str(context.command_path)
