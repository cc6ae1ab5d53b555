"""How many units a second the scheduler and its driver give out, and how long replicas idle between two units; on a local Ray.

python jobs/benchmark_scheduler.py                                   no-op replicas, then replicas that take 5 s a unit
python jobs/benchmark_scheduler.py --replicas 4 --units 5000 --json scheduler.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import ray

from persona_ray.scheduler.driver import Driver, cluster
from persona_ray.scheduler.state import Rules, SchedulerState
from persona_ray.spec import Receipt, Unit

UNIT_ROWS = 256


class Pretender:
    """A replica that takes its time, and does nothing."""

    def __init__(self, unit_s: float) -> None:
        self._unit_s = unit_s
        self._spans: list[tuple[float, float]] = []

    def ready(self) -> None:
        """At once."""

    def run(self, unit: Unit) -> Receipt:
        """After the unit's time."""
        began = time.perf_counter()
        time.sleep(self._unit_s)
        self._spans.append((began, time.perf_counter()))
        return Receipt(unit.index, UNIT_ROWS, 0, 0, self._unit_s)

    def idle_share(self) -> float:
        """Of the time from its first unit to its last: the time in which it had none."""
        busy_s = sum(end - began for began, end in self._spans)
        return 1 - busy_s / (self._spans[-1][1] - self._spans[0][0])


@dataclass
class Pretenders:
    """Implements `scheduler.driver.Fleet`: all replicas are there, and stay."""

    handles: Mapping[int, Any]
    waits_for: str | None = None
    draining: Collection[int] = field(default=())

    def look_around(self) -> None:
        """Nothing changes."""

    def has_place(self, replica: int) -> bool:
        """Yes."""
        return replica in self.handles

    def restart(self, replica: int) -> None:
        """Never wanted."""
        raise NotImplementedError

    def retire(self, replica: int) -> None:
        """Never wanted."""
        raise NotImplementedError


def measure(replicas: int, units: int, unit_s: float, leases: int) -> dict[str, float]:
    """One run."""
    actor: Any = ray.remote(Pretender)
    fleet = Pretenders({i: actor.options(num_cpus=0, max_concurrency=leases + 1).remote(unit_s) for i in range(replicas)})
    ray.get([handle.ready.remote() for handle in fleet.handles.values()])
    state = SchedulerState(dict.fromkeys(range(units), UNIT_ROWS), rules=Rules(leases_per_replica=leases, parts=1))
    began, cpu = time.perf_counter(), time.process_time()
    Driver(state, {i: Unit(i, ()) for i in range(units)}, fleet).run(lambda _: None)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    idle = mean(ray.get([handle.idle_share.remote() for handle in fleet.handles.values()])) if leases == 1 else float("nan")
    for handle in fleet.handles.values():
        ray.kill(handle)
    return {
        "replicas": replicas,
        "units": units,
        "unit_s": unit_s,
        "units_per_s": units / seconds,
        "driver_cpu_ms_per_unit": 1000 * cpu_s / units,
        "idle_percent": 100 * idle,
    }


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--units", type=int, default=4000, help="of the no-op replicas")
    parser.add_argument("--unit-s", type=float, default=5.0, help="of the others, which take ten units each")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    settings = parser.parse_args()
    with cluster(None):
        results = {
            "no-op": measure(settings.replicas, settings.units, 0.0, leases=2),
            "paced": measure(settings.replicas, 10 * settings.replicas, settings.unit_s, leases=1),
        }
    no_op, paced = results["no-op"], results["paced"]
    print(f"no-op replicas   {no_op['units_per_s']:.0f} units/s, {no_op['driver_cpu_ms_per_unit']:.2f} CPU-ms of the driver each")
    print(f"{settings.unit_s:g} s a unit       idle {paced['idle_percent']:.2f} % of a replica's time")
    if settings.json is not None:
        settings.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
