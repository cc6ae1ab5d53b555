"""The command line: exit codes, one-line complaints, output for people and for machines. Whole runs are in tests/cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from persona_ray import cli


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


@pytest.fixture
def job(tmp_path: Path, chat_model: Path, small_catalog: Path) -> Path:
    """A job file that would run; its store does not exist yet."""
    file = tmp_path / "job.yaml"
    document = {
        "name": "small",
        "model": {"id": str(chat_model), "dtype": "float32"},
        "shards": {"gpus_per_shard": 0},
        "catalog": {"source": str(small_catalog), "system_prompts": 1, "questions": 2},
        "rollouts": {"max_new_tokens": 4},
        "store": {"url": str(tmp_path / "store")},
    }
    file.write_text(yaml.safe_dump(document))
    return file


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    assert code == 0
    assert json.loads(out)["properties"]["store"]


def commands_of(group: Any, *names: str) -> Iterator[list[str]]:
    """Every command of the program, as it is typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, *names, name)
        else:
            yield [*names, name]


COMMANDS = list(commands_of(typer.main.get_command(cli.app)))


def test_all_commands_of_the_design_are_there() -> None:
    wanted = [
        "quickstart",
        "plan",
        "run",
        "submit",
        "status",
        "watch",
        "logs",
        "stop",
        "verify-model",
        "bench",
        "reduce",
        "axis",
        "report",
        "judge",
        "compare",
        "project",
        "schema",
    ]
    of_stores = ["ls", "info", "verify", "gc", "diff", "copy", "export", "import"]
    assert {tuple(command) for command in COMMANDS} == {(name,) for name in wanted} | {("store", name) for name in of_stores}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_an_answer_for_machines(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert f"Example: persona-ray {' '.join(command)}" in out
    assert "--json" in out or command == ["schema"]  # which prints nothing else


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "Missing command"),
        (["nonsense"], "No such command 'nonsense'"),
        (["store"], "Missing command"),
        (["run"], "Missing argument 'JOB'"),
        (["run", "/nowhere/job.yaml"], "/nowhere/job.yaml: cannot be read as a job file"),
        (["axis", "/nowhere/store"], "no persona_ray store here"),
        (["report", "/nowhere/store"], "no persona_ray store here"),
        (["store", "info", "ftp://x/y"], "ftp"),
        (["store", "verify", "/nowhere/store"], "no persona_ray store here"),
        (["store", "gc", "/nowhere/store", "--yes"], "no persona_ray store here"),
        (["store", "ls", "/nowhere"], "/nowhere"),
        (["store", "diff", "/nowhere/a", "/nowhere/b"], "no persona_ray store here"),
        (["store", "copy", "/nowhere/a", "/nowhere/b"], "no persona_ray store here"),
        (["store", "export", "/nowhere/a", "/tmp/x", "--format", "dataset"], "no persona_ray store here"),
        (["store", "export", "/nowhere/a", "/tmp/x", "--format", "csv"], "csv"),
        (["store", "import", "/nowhere/published", "/nowhere/store", "--model", "m"], "/nowhere/published"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("persona-ray: ")
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("modle.id=x", "modle: unknown key"),
        ("model.id=/nowhere/model", "is not a model folder"),
        ("model.id=builtin:other", "builtin:tiny-persona is"),
        ("model.id=nobody/has-this-model", "cannot be opened as a model"),
        ("shards.stages=9", "9 stages for 4 layers"),
        ("capture.layers=[4]", "this model has layers 0 to 3"),
        ("catalog.source=/nowhere/catalog.yaml", "/nowhere/catalog.yaml"),
        ("catalog.archetypes=[pirat]", "did you mean pirate?"),
        ("catalog.questions=99", "the catalogue has 4"),
        ("catalog.system_prompts=3", "has only 2 system prompts"),
        ("judge={backend: lexicon}", "this model comes without a lexicon"),
        ("judge={backend: scores, path: /nowhere}", "/nowhere"),
        ("rollouts={source: import, path: /nowhere}", "holds no {archetype}.jsonl file"),
        ("store.url=/proc/store", "/proc/store"),
        ("store.url=/dev/null/store", "/dev/null/store"),
        ("store.url=ftp://host/store", "ftp"),
        ("limits.money=3", "limits.money: no list price of this hardware is known; give limits.gpu_hour_price"),
        ("limits.rows=1", "limits.rows: 1, and the next unit alone has 2 rows"),
    ],
)
def test_what_a_job_gets_wrong_is_one_line_exit_2_and_nothing_is_begun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: Path, override: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    code, out, err = call(capsys, "run", str(job), "--set", override)
    assert (code, out) == (2, "")
    assert complaint in err
    assert len([line for line in err.splitlines() if line.startswith("persona-ray: ")]) == 1
    assert "Traceback" not in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("archetypes: {}\nquestions: [Why?]\n", "archetype"),
        (
            "archetypes:\n  bard: &bard {description: d, system_prompts: [a]}\n  bard: *bard\nquestions: [Why?]\n",
            "bard",
        ),
        ("archetypes:\n  bard: {description: d, system_prompts: [a]}\nquestions: [Why?]\n", "default"),
    ],
    ids=["empty", "duplicate", "no default"],
)
def test_a_catalogue_that_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, job: Path, text: str, complaint: str
) -> None:
    catalog = tmp_path / "own.yaml"
    catalog.write_text(text)
    code, _, err = call(capsys, "run", str(job), "--set", f"catalog.source={catalog}")
    assert code == 2
    assert "own.yaml" in err
    assert complaint in err
    assert not (tmp_path / "store").exists()


def test_a_place_that_holds_something_else_is_not_touched(capsys: pytest.CaptureFixture[str], tmp_path: Path, job: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("years of work")
    code, _, err = call(capsys, "run", str(job))
    assert code == 2
    assert "thesis.txt" in err
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.txt"]


def test_a_report_that_cannot_be_written_is_known_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path, job: Path) -> None:
    code, _, err = call(capsys, "run", str(job), "--report", "/dev/null/report.html")
    assert code == 2
    assert "/dev/null/report.html" in err
    assert not (tmp_path / "store").exists()


def test_a_cluster_whose_token_is_not_here_is_refused_in_one_line(tmp_path: Path, job: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", "from persona_ray.cli import main; main()", "run", str(job), "--address", address],
            env=environment | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("persona-ray: ")]
    assert line.startswith(f"persona-ray: --address {address}: token authentication is on, and there is no token here; set RAY_AUTH_MODE")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_ctrl_c_says_how_to_resume(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, job: Path) -> None:
    from persona_ray import pipeline

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    monkeypatch.setattr(cli.shutil, "which", lambda name: name)
    code, _, err = call(capsys, "run", str(job), "--set", "name=with space".replace(" ", "-"))
    assert code == 130
    assert f"the same command resumes: persona-ray run {job} --set name=with-space" in err


def test_a_plan_says_what_is_asked_for_and_how_the_model_is_cut(capsys: pytest.CaptureFixture[str], job: Path, tmp_path: Path) -> None:
    code, out, _ = call(capsys, "plan", str(job), "--set", "shards.stages=2", "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["rollouts"], plan["archetypes"], plan["units_to_do"]) == (8, 4, plan["units"])
    assert [stage["layers"] for stage in plan["stages"]] == ["0-1", "2-3"]
    assert sum(stage["flops_percent"] for stage in plan["stages"]) == pytest.approx(100, abs=0.2)
    code, out, _ = call(capsys, "plan", str(job))
    assert code == 0
    assert "one replica:" in out
    assert not (tmp_path / "store").exists(), "planning writes nothing"


def test_a_plan_says_what_it_costs_and_what_that_rests_on(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    on_a_gpu = ("--set", "shards={accelerator: H100}", "--set", "model.dtype=bfloat16", "--assume", "gpu_hour=2.5")
    code, out, _ = call(capsys, "plan", str(job), *on_a_gpu, "--json")
    costs = json.loads(out)["costs"]
    assert code == 0
    assert costs["whole"]["rows"] == 8
    assert costs["whole"]["money"]["gpu"] == pytest.approx(2.5 * costs["whole"]["gpu_hours"]["total"])
    assumed = {one["name"]: (one["value"], one["source"]) for one in costs["assumptions"]}
    assert assumed["gpu_hour"] == (2.5, "--assume")
    assert assumed["prompt_tokens"][1] == "all 8 rows, tokenized"
    code, out, _ = call(capsys, "plan", str(job), *on_a_gpu)
    assert code == 0
    said = " ".join(out.split())
    for words in ("objects, without results", "gpu_hour 2.5 $/h --assume", "TFLOP/s of prefill", "Not counted: loading the model"):
        assert words in said
    code, out, _ = call(capsys, "plan", str(job))
    assert "speed unknown: no data sheet says how fast a CPU is" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--assume", "gpu_hours=1"), "--assume gpu_hours=1: expected name=number; the names are prompt_tokens, answer_tokens"),
        (("--assume", "gpu_hour=much"), "much is not a number"),
        (("--bench", "/nowhere/bench.json"), "--bench /nowhere/bench.json: cannot be read"),
        (("--bench", "{job}"), "not what persona-ray bench --json prints"),
    ],
)
def test_an_assumption_that_is_none_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], job: Path, arguments: tuple[str, str], complaint: str
) -> None:
    code, out, err = call(capsys, "plan", str(job), arguments[0], arguments[1].format(job=job))
    assert (code, out, err.count("persona-ray: ")) == (2, "", 1)
    assert complaint in err


@pytest.mark.parametrize("limit", ["hours", "money"])
def test_a_limit_below_the_cost_of_one_unit_is_refused_before_anything_is_begun(
    capsys: pytest.CaptureFixture[str], job: Path, tmp_path: Path, limit: str
) -> None:
    settings = ("shards={accelerator: H100}", "model.dtype=bfloat16", f"limits.{limit}=1e-12")
    code, out, err = call(capsys, "run", str(job), *(word for setting in settings for word in ("--set", setting)))
    assert (code, out, err.count("persona-ray: ")) == (2, "", 1)
    assert f"limits.{limit}: 1e-12, and one unit of 2 rows " in err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("shards.stages=9", "shards.stages: 9 stages for 4 layers; a stage needs at least one layer"),
        ("capture.layers=[0, 4]", "capture.layers: [4]; this model has layers 0 to 3"),
        ("shards.tensor_parallel=3", "3 ranks cannot share this model's num_attention_heads of 4"),
        ("shards={stages: auto}", "auto needs shards.accelerator"),
        ("shards={accelerator: GTX}", "GTX is not known; known are"),
        ("model.kind=base", "model.kind: base needs rollouts.source: import"),
        ("rollouts={source: import, path: /nowhere}", "holds no {archetype}.jsonl file"),
    ],
)
def test_what_cannot_be_cut_or_read_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], job: Path, setting: str, complaint: str
) -> None:
    code, out, err = call(capsys, "plan", str(job), "--set", setting)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err


def test_a_family_that_cannot_be_cut_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], job: Path, tmp_path: Path, chat_model: Path
) -> None:
    folder = tmp_path / "mamba"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((chat_model / name).read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 330}))
    code, _, err = call(capsys, "plan", str(job), "--set", f"model.id={folder}")
    assert (code, err.count("\n")) == (2, 1)
    assert "mamba" in err
