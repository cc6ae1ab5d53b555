"""cluster/local on this machine: it comes up on loopback alone, with the token on, loses and gains a worker, and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster_files.files import CLUSTER

pytestmark = pytest.mark.serial

ASK = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
keys = ("NodeID", "NodeManagerAddress", "Alive", "Resources", "Labels")
print(json.dumps([{key: node[key] for key in keys} for node in ray.nodes()]))
"""


class Local:
    """The script, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"}}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**inherited, "PERSONA_RAY_LOCAL": str(folder), "PATH": path}

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CLUSTER / "local", *words], env=self.environment, capture_output=True, text=True, check=False, timeout=240)

    def nodes(self) -> list[dict[str, Any]]:
        """Those that are alive, as a driver sees them that did what the script said."""
        command = f'source {self.folder}/env && exec "{sys.executable}" -c "$0" "$(cat {self.folder}/address)"'
        answer = subprocess.run(
            ["bash", "-c", command, ASK], env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert answer.returncode == 0, answer.stderr
        return [node for node in json.loads(answer.stdout) if node["Alive"]]

    def processes(self) -> list[psutil.Process]:
        """Of all nodes: each has a session of its own, and what it starts stays in it or names the folder."""
        groups = {int(file.read_text()) for file in self.folder.glob("*.pid")}
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            try:
                is_ours = os.getpgid(process.pid) in groups or str(self.folder) in " ".join(process.info["cmdline"] or ())
            except ProcessLookupError:
                continue
            if is_ours:
                found.append(process)
        return found


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    # Ray's sockets are in this folder, and the path of a socket may have 107 characters.
    local = Local(Path("/tmp") / f"persona-ray-local-{os.getpid()}")
    yield local
    local("stop")


def test_a_cluster_comes_up_loses_a_worker_gains_one_and_leaves_nothing(local: Local) -> None:
    started = local("start", "2", "--num-gpus", "8", "--labels", "ray.io/accelerator-type=H100")
    assert started.returncode == 0, started.stderr
    assert f"address    {(local.folder / 'address').read_text().strip()}" in started.stdout
    nodes = local.nodes()
    assert [node["Resources"].get("GPU", 0) for node in sorted(nodes, key=lambda node: "GPU" in node["Resources"])] == [0, 8, 8]
    assert sum(node["Labels"].get("ray.io/accelerator-type") == "H100" for node in nodes) == 2
    assert {node["NodeManagerAddress"] for node in nodes} == {"127.0.0.1"}
    _assert_on_loopback(local)

    assert local("start").returncode == 1  # there is one
    unknown = local("remove", "worker-7")
    assert (unknown.returncode, unknown.stderr) == (1, "cluster/local: there is no worker-7; there are worker-1 worker-2\n")
    assert local("remove", "worker-1").returncode == 0
    _wait_for(local, 2)
    assert local("add").returncode == 0
    assert len(local.nodes()) == 3

    ours = local.processes()
    stopped = local("stop")
    assert stopped.returncode == 0, stopped.stderr
    _, left = psutil.wait_procs(ours, timeout=20)
    assert not left
    assert not local.folder.exists()


def _assert_on_loopback(local: Local) -> None:
    listening = {place.laddr.ip for process in local.processes() for place in process.net_connections("tcp") if place.status == "LISTEN"}
    assert listening
    assert all(address.removeprefix("::ffff:") == "127.0.0.1" for address in listening), listening


def _wait_for(local: Local, number: int) -> None:
    """Ray notices a lost node after seconds."""
    deadline = time.monotonic() + 90
    while len(local.nodes()) != number:
        assert time.monotonic() < deadline
        time.sleep(1)


def test_without_the_token_nobody_gets_in(local: Local) -> None:
    assert local("start", "0").returncode == 0
    url = (local.folder / "dashboard").read_text().strip() + "/api/version"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=20)
    assert refused.value.code == 401
    token = (local.folder / "token").read_text().strip()
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=20) as answer:
        assert answer.status == 200
    assert (local.folder / "token").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("words", [(), ("strat",), ("stop",), ("add",), ("remove",)])
def test_wrong_use_is_one_line(local: Local, words: tuple[str, ...]) -> None:
    ended = local(*words)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("cluster/local: ")
