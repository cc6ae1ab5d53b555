"""From a laptop without torch to a real head that asks for a token, and back: submit, watch, logs, stop, resume."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import persona_ray
from persona_ray.store.reader import open_store
from persona_ray.submit import NOT_SHIPPED

pytestmark = pytest.mark.timeout(600)

TOKEN = uuid.uuid4().hex
CHECKOUT = Path(persona_ray.__file__).parent.parent
LAPTOP = """
import sys
from importlib.abc import MetaPathFinder

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, NotInstalled())
from persona_ray.cli import main
main(sys.argv[1:])
"""
BARE_PYTHON = os.environ.get("PERSONA_RAY_LAPTOP")
"""Of a virtual environment without the engine (`make test-laptop` makes one); else torch is hidden from this one."""
WITHOUT_CHECKOUT = f"import sys\nsys.path[:] = [place for place in sys.path if place != {str(CHECKOUT)!r}]\n"
"""Read by every interpreter of the cluster as it starts: its nodes have our dependencies, and not us."""


@dataclass(frozen=True)
class Laptop:
    """The command line where neither torch nor transformers can be imported."""

    address: str

    def start(self, *arguments: object, token: str | None = TOKEN) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # What Ray would believe more than the command line; and a home in which no other cluster has left its token.
        environment |= {"RAY_ADDRESS": "127.0.0.1:1", "HOME": tempfile.gettempdir()}
        environment |= {} if token is None else {"RAY_AUTH_TOKEN": token}
        program = [BARE_PYTHON, "-m", "persona_ray"] if BARE_PYTHON else [sys.executable, "-c", LAPTOP]
        command = [*program, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def __call__(self, *arguments: object, token: str | None = TOKEN) -> tuple[int, str, str]:
        process = self.start(*arguments, token=token)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def json(self, *arguments: object) -> Any:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    def submit(self, job: Path, *more: object) -> str:
        return str(self.json("submit", job, "--address", self.address, *more)["run"])

    def state(self, run: str) -> str:
        return str(self.json("status", run, "--address", self.address)["run"]["state"])


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    """A laptop and a head of its own process on loopback, with token authentication."""
    folder = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))  # sockets need a short path
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(WITHOUT_CHECKOUT)
    port, *others = free_ports(8)
    names = (
        "port",
        "ray-client-server-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "runtime-env-agent-port",
        "node-manager-port",
    )
    ports = [f"--{name}={number}" for name, number in zip(names, others, strict=True)]
    bin_folder = Path(sys.executable).parent
    command = [
        str(bin_folder / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}", *ports, "--num-cpus=6", "--object-store-memory=100000000", f"--temp-dir={folder}",
        "--disable-usage-stats", "--include-dashboard=true",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "site"),
    }
    has_us = subprocess.run([sys.executable, "-c", "import persona_ray"], env=environment, cwd=folder, capture_output=True, check=False)
    assert b"No module named 'persona_ray'" in has_us.stderr
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, folder / "head.log")
        yield Laptop(address)
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(60)
        head.kill()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for(address: str, log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    for _ in range(240):
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(log.read_text())


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Eighteen short answers of the tiny model."""
    document = {
        "name": "tiny",
        "model": {"id": "builtin:tiny-persona", "dtype": "float32"},
        "shards": {"stages": 1, "replicas": 1, "gpus_per_shard": 0},
        "catalog": {"archetypes": ["bard", "doctor"], "system_prompts": 1, "questions": 6},
        "rollouts": {"max_new_tokens": 12},
        "capture": {"max_length": 256},
        "store": {"url": str(tmp_path / "store"), "unit_rows": 3},
        "reduce": {"min_count": 2},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def markers(store: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((Path(store) / "_commits").glob("*.json"))}


def wait_until(is_true: Any, what: str) -> None:
    for _ in range(600):
        if is_true():
            return
        time.sleep(0.3)
    pytest.fail(f"never happened: {what}")


def assert_only_package_and_job_travelled(laptop: Laptop, run: str) -> None:
    """The nodes cannot import our checkout, so a run that works is one of the shipped package."""
    from ray.job_submission import JobSubmissionClient

    details = JobSubmissionClient(laptop.address, headers={"Authorization": f"Bearer {TOKEN}"}).get_job_info(run)
    assert details.runtime_env is not None
    assert details.runtime_env["working_dir"].startswith("gcs://")
    assert [uri[:6] for uri in details.runtime_env["py_modules"]] == ["gcs://"]
    assert details.runtime_env["excludes"] == NOT_SHIPPED
    assert set(details.runtime_env["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert {"store", "job", "persona_ray"} <= set(details.metadata or {})
    assert TOKEN not in details.model_dump_json()


def test_a_run_from_submit_to_its_end(laptop: Laptop, job: Path, tmp_path: Path) -> None:
    code, out, err = laptop("submit", job, "--address", laptop.address)
    assert (code, err) == (0, "")
    run = out.split()[1]
    assert f"next     persona-ray watch {run} --address {laptop.address}" in out

    code, out, err = laptop("watch", run, "--address", laptop.address, "--interval", 0.5)
    assert (code, err) == (0, "")
    assert "succeeded, 18 of 18 rows" in out.splitlines()[-1]
    assert open_store(str(tmp_path / "store")).latest_reduced() is not None

    assert_only_package_and_job_travelled(laptop, run)
    facts = laptop.json("status", run, "--address", laptop.address)
    assert (facts["run"]["state"], facts["run"]["version"]) == ("SUCCEEDED", persona_ray.__version__)
    assert facts["store"]["rows"]["asked"] == facts["store"]["rows"]["stored"] + facts["store"]["rows"]["refused"] == 18
    alone = laptop.json("watch", tmp_path / "store")
    assert (alone["run"], alone["store"]) == (None, facts["store"])

    code, out, _ = laptop("logs", run, "--address", laptop.address)
    assert code == 0
    assert "rollouts and activations: 18 rollouts" in out
    followed = laptop("logs", run, "--address", laptop.address, "--follow")
    assert (followed[0], followed[1].splitlines()[-1]) == (0, out.splitlines()[-1])

    page = tmp_path / "axis.html"
    assert laptop("report", run, "--address", laptop.address, "--out", page)[:2] == (0, f"report: {page}\n")
    assert "Assistant Axis" in page.read_text()

    code, out, _ = laptop("stop", run, "--address", laptop.address)
    assert code == 0
    assert f"{run} had ended before: succeeded" in out


def test_a_run_that_fails_says_why_and_watching_it_fails(laptop: Laptop, job: Path) -> None:
    run = laptop.submit(job, "--set", "catalog.archetypes=[nobody]")
    code, out, _ = laptop("watch", run, "--address", laptop.address, "--interval", 0.5)
    assert code == 1
    assert out.splitlines()[-1].split(" ", 1)[1].startswith("failed (persona-ray: ")
    assert "nobody" in out


def test_a_run_is_stopped_and_submitting_the_same_job_resumes_it(laptop: Laptop, job: Path, tmp_path: Path) -> None:
    larger = ("--set", "catalog.questions=40", "--set", "rollouts.max_new_tokens=32")
    store = tmp_path / "store"
    run = laptop.submit(job, *larger)
    wait_until(lambda: len(markers(store)) >= 2, "two units are committed")
    code, out, _ = laptop("stop", run, "--address", laptop.address)
    assert code == 0
    assert f"resumes it: persona-ray submit JOB --address {laptop.address}" in out
    code, out, _ = laptop("watch", run, "--address", laptop.address, "--interval", 0.3)
    assert code == 1
    assert out.splitlines()[-1].split(" ", 1)[1].startswith("stopped, ")
    before = markers(store)
    facts = laptop.json("status", store)
    assert 2 <= facts["store"]["units"]["committed"] == len(before) < facts["store"]["units"]["planned"] == 40
    assert not facts["is_over"]

    again = laptop.submit(job, *larger)
    watching = laptop.start("watch", again, "--address", laptop.address, "--interval", 0.3)
    assert watching.stdout is not None
    assert watching.stdout.readline().split(" ", 1)[1].startswith(("pending, ", "running, "))
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert err.startswith("persona-ray: no longer looking; the run goes on; persona-ray stop ")

    assert laptop("watch", again, "--address", laptop.address, "--interval", 0.5)[0] == 0
    after = markers(store)
    assert len(after) == 40
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("token", "words"), [(None, "asks for its token, and there is none here"), ("0" * 32, "does not accept this token")]
)
def test_without_the_right_token_nothing_is_begun(laptop: Laptop, job: Path, tmp_path: Path, token: str | None, words: str) -> None:
    for command in (("submit", job), ("status", "tiny-00000000"), ("logs", "tiny-00000000"), ("stop", "tiny-00000000")):
        code, out, err = laptop(*command, "--address", laptop.address, token=token)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["status", "watch", "logs", "report", "stop"])
def test_a_run_that_is_not_there(laptop: Laptop, command: str) -> None:
    code, out, err = laptop(command, "tiny-00000000", "--address", laptop.address)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "knows no run of that name" in err
