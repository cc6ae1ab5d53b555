"""One run on a real cluster of several nodes, struck at random times until all faults have struck.

The driver is a process of its own, started again by the same command whenever it is gone; the head is another one, and a new
cluster takes its place when that is lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Struck = TypeVar("Struck", int, str)
LOCAL = Path(__file__).parents[2] / "cluster" / "local"
PATIENCE_S = 240.0
"""Without a single new marker; then the run hangs."""
GIVE_UP_SOON = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""For whoever has lost the head of the cluster; a minute otherwise."""


@dataclass
class LocalCluster:
    """`cluster/local`, in a folder of its own."""

    folder: Path
    workers: int
    _adding: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._call("start", str(self.workers))

    def stop(self) -> None:
        self._await_node()
        self._call("stop")

    def lose_a_node_and_add_one(self, worker: str) -> None:
        """The new one is on its way when this comes back; the run does not wait for it either."""
        self._call("remove", worker)
        self._adding = subprocess.Popen([str(LOCAL), "add"], env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _await_node(self) -> None:
        if self._adding is not None:
            self._adding.wait(timeout=240)

    def kill_head(self) -> None:
        self._await_node()
        os.killpg(int((self.folder / "head.pid").read_text()), signal.SIGKILL)

    @property
    def address(self) -> str:
        return (self.folder / "address").read_text().strip()

    @property
    def environment(self) -> dict[str, str]:
        token = (self.folder / "token").read_text().strip()
        # The last one keeps Ray from replacing loopback by the machine's own address, at which nobody listens.
        of_cluster = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        return {**os.environ, **of_cluster, **GIVE_UP_SOON}

    def replica_processes(self, nodes: str = "*") -> list[int]:
        """Process ids of the replicas on these nodes: children of a raylet in a node's process group."""
        groups = {int(path.read_text()) for path in self.folder.glob(f"{nodes}.pid")}
        return sorted(pid for pid, command, parent in _processes() if command.startswith(b"ray::ReplicaActor") and _group(parent) in groups)

    def workers_that_stand(self) -> list[str]:
        """All nodes but the head. Waits for one that is on its way."""
        self._await_node()
        return sorted(path.stem for path in self.folder.glob("worker-*.pid"))

    def replica_of(self, pid: int) -> int | None:
        """The number of the replica in this process, by its log; None: it has said nothing yet."""
        for path in self.folder.glob(f"*/session_*/logs/worker-*-{pid}.err"):
            for line in path.read_text().splitlines():
                if line.startswith("{"):
                    return int(json.loads(line)["replica"])
        return None

    @property
    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return environment | {"PERSONA_RAY_LOCAL": str(self.folder), "OMP_NUM_THREADS": "1"} | GIVE_UP_SOON

    def _call(self, *arguments: str) -> None:
        done = subprocess.run([str(LOCAL), *arguments], env=self._environment, check=False, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"cluster/local {' '.join(arguments)}: {done.stderr}"


def _processes() -> list[tuple[int, bytes, int]]:
    """(process id, command line, parent)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found.append((int(folder.name), (folder / "cmdline").read_bytes(), parent))
        except (OSError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@dataclass(frozen=True)
class Strike:
    """What was done to the run, and the units that were under way then on what was struck."""

    fault: str
    at_s: float
    num_committed: int
    """Units that were safe by then."""
    units: tuple[int, ...]


@dataclass
class Chaos:
    """The run, its cluster, and what has struck it so far."""

    cluster: LocalCluster
    job: Path
    store: Path
    log: Path
    dice: random.Random
    strikes: list[Strike] = field(default_factory=list)
    _driver: subprocess.Popen[bytes] | None = None
    _num_drivers: int = 0

    def run(self, faults: Sequence[str], units_between: int) -> None:
        """Strike with all faults, each when some units more are committed, and a random moment later; then let the run end."""
        begin_s = time.monotonic()
        strike: Mapping[str, Callable[[], tuple[int, ...]]] = {
            "actor killed": lambda: self._signal_actor(signal.SIGKILL),
            "actor told to exit": lambda: self._signal_actor(signal.SIGTERM),
            "node lost": self._lose_node,
            "driver killed": self._kill_driver,
            "head killed": self._kill_head,
        }
        self.cluster.start()
        for fault in faults:
            self._await(self._num_committed() + units_between, fault)
            time.sleep(self.dice.uniform(0.0, 0.4))
            at_s, num_committed = time.monotonic() - begin_s, self._num_committed()
            self.strikes.append(Strike(fault, at_s, num_committed, strike[fault]()))
        self._await(None, "the end")

    def under_way(self) -> dict[int, set[int]]:
        """Replica -> the units that it holds now, by the driver's log."""
        held: dict[int, dict[int, int]] = {}
        for record in self._records():
            if record["message"].startswith("lease") and " begins" in record["message"]:
                held.setdefault(record["replica"], {})[record["lease"]] = record["unit"]
            elif "lease" in record:
                held.get(record["replica"], {}).pop(record["lease"], None)
            elif "started again" in record["message"]:  # lost, or overdue
                held.pop(record["replica"], None)
        committed = self._committed()
        return {replica: set(leases.values()) - committed for replica, leases in held.items()}

    def _all_held(self) -> tuple[int, ...]:
        return tuple(sorted(set().union(*self.under_way().values())))

    def _held_by(self, processes: Iterable[int]) -> tuple[int, ...]:
        held = self.under_way()
        replicas = {self.cluster.replica_of(pid) for pid in processes} - {None}
        return tuple(sorted(set().union(*(held.get(replica, set()) for replica in replicas))))

    def _records(self) -> list[dict[str, Any]]:
        """Of the driver that is there now; what a line has of it only in part is yet to come."""
        path = self.log.with_suffix(f".{self._num_drivers - 1}")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _await(self, num_committed: int | None, before: str) -> None:
        """Until so many units are committed, or the run has ended (None)."""
        deadline_s, seen = time.monotonic() + PATIENCE_S, self._num_committed()
        while True:
            ended = self._ended()
            assert not ended or num_committed is None, f"the run ended before {before}; {len(self.strikes)} faults have struck"
            if ended or (num_committed is not None and seen >= num_committed):
                return
            now = self._num_committed()
            deadline_s = time.monotonic() + PATIENCE_S if now > seen else deadline_s
            seen = now
            assert time.monotonic() < deadline_s, f"no unit was committed for {PATIENCE_S:.0f} s, {seen} are; after {self.strikes[-1:]}"
            time.sleep(0.05)

    def _ended(self) -> bool:
        """Whether the driver has done its work; one that is gone, or gave up, is started again."""
        if self._driver is not None and self._driver.poll() is None:
            return False
        if self._driver is not None and self._driver.returncode == 0:
            return True
        assert self._num_drivers < 60, f"the driver ends again and again: {self.log.with_suffix('.err').read_text()[-2000:]}"
        log = self.log.with_suffix(f".{self._num_drivers}")
        command = [sys.executable, "-m", "persona_ray", "run", str(self.job), "--address", self.cluster.address, "--log", str(log)]
        command += ["--report", str(self.log.with_suffix(".html"))]
        with self.log.with_suffix(".err").open("ab") as told:
            self._driver = subprocess.Popen(command, env=self.cluster.environment, stdout=told, stderr=told)
        self._num_drivers += 1
        return False

    def _signal_actor(self, number: signal.Signals) -> tuple[int, ...]:
        held = {pid: self._held_by([pid]) for pid in self._replica_processes()}
        pid = self._one_at_work(held)
        os.kill(pid, number)
        return held[pid]

    def _replica_processes(self) -> list[int]:
        """Of one replica at least: what was committed may be the last that the ones before did, and the next ones are on their way."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not (found := self.cluster.replica_processes()):
            assert not self._ended(), "the run ended, and there was an actor to be struck"
            assert time.monotonic() < deadline_s, f"no replica for {PATIENCE_S:.0f} s"
            time.sleep(0.05)
        return found

    def _lose_node(self) -> tuple[int, ...]:
        held = {worker: self._held_by(self.cluster.replica_processes(worker)) for worker in self.cluster.workers_that_stand()}
        worker = self._one_at_work(held)
        self.cluster.lose_a_node_and_add_one(worker)
        return held[worker]

    def _one_at_work(self, held: Mapping[Struck, tuple[int, ...]]) -> Struck:
        """Any of those that hold units, if one does: to end what only loads, or idles, proves little."""
        return self.dice.choice([struck for struck in held if held[struck]] or list(held))

    def _kill_driver(self) -> tuple[int, ...]:
        assert self._driver is not None
        units = self._all_held()
        self._driver.kill()
        self._driver.wait()
        return units

    def _kill_head(self) -> tuple[int, ...]:
        """The driver may notice by itself; whether it does or hangs on, the same command is started at the new cluster."""
        units = self._all_held()
        self.cluster.kill_head()
        assert self._driver is not None
        try:
            self._driver.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill_driver()
        self.cluster.stop()
        self.cluster.start()
        return units

    def end(self) -> None:
        """Nothing of it stays."""
        if self._driver is not None and self._driver.poll() is None:
            self._kill_driver()
        if self.cluster.folder.exists():
            self.cluster.stop()

    def _committed(self) -> set[int]:
        return {int(path.stem) for path in self.store.glob("_commits/*.json")}

    def _num_committed(self) -> int:
        return len(self._committed())
