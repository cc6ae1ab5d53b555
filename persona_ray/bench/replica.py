"""The engine as a run has it: a replica of Ray actors, which a driver hands units to."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from persona_ray.bench.measure import Pass
from persona_ray.bench.work import BenchWork, Done, LookAround
from persona_ray.scheduler.driver import Driver
from persona_ray.scheduler.state import Rules, SchedulerState
from persona_ray.shards.actors.calls import answer
from persona_ray.shards.actors.replicas import Replicas
from persona_ray.shards.plan import ReplicaSpec
from persona_ray.spec import Receipt, Unit

Usage = Mapping[str, float]
"""As `Stage.usage` gives it."""


class RayReplica:
    """One replica, loaded. Ends with the `with` block."""

    def __init__(self, spec: ReplicaSpec, work: BenchWork) -> None:
        self._spec, self._work = spec, work
        self._replicas = Replicas(spec, work, count=1, name="benchmark")
        self._replicas.check()

    def run(self, units: Sequence[int]) -> tuple[list[Done], Pass]:
        """The units through the driver, and what they took, by process. Loading is over; the first units may still warm up."""
        before, asking_s, began = self._processes(), _own_cpu_s(), time.perf_counter()
        done = self._drive(units)
        wall_s, asking_s, after = time.perf_counter() - began, _own_cpu_s() - asking_s, self._processes()
        return done, Pass(
            tokens=sum(one.num_tokens for one in done),
            padded_tokens=sum(one.padded_tokens for one in done),
            wall_s=wall_s,
            cpu_s={name: after[name]["cpu_s"] - before[name]["cpu_s"] for name in after},
            asking_cpu_s=asking_s,
            busy_s=self._busy_s(before, after),
            unit_s={"capture": sum(one.capture_s for one in done), "commit": sum(one.commit_s for one in done)},
            peak_host_bytes={name: int(usage["peak_host_bytes"]) for name, usage in after.items()},
            peak_device_bytes={name: int(usage["peak_device_bytes"]) for name, usage in after.items()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._replicas.__exit__()

    @property
    def _handle(self) -> Any:
        return self._replicas.handles[0]

    def _drive(self, units: Sequence[int]) -> list[Done]:
        state = SchedulerState(dict.fromkeys(units, 1), rules=Rules(leases_per_replica=self._spec.concurrent_units, window=1, parts=1))
        receipts: list[Receipt] = []
        Driver(state, {index: Unit(index, ()) for index in units}, self._replicas).run(receipts.append)
        return sorted(cast("list[Done]", receipts), key=lambda done: done.unit)

    def _processes(self) -> dict[str, Usage]:
        """Process -> what it took so far: the replica's own, and each rank of each stage that has another."""
        stages: list[list[Usage]] = answer(self._handle.usage.remote())
        if self._spec.is_one_process:
            return {"replica": stages[0][0]}
        looked: Done = answer(self._handle.run.remote(Unit(self._work.indices(LookAround)[0], ())))
        assert looked.used is not None
        own = {
            "busy_s": 0.0,
            "cpu_s": looked.used.cpu_s,
            "peak_host_bytes": looked.used.peak_host_bytes,
            "peak_device_bytes": looked.used.peak_device_bytes,
        }
        ranks = {_name(stage, rank): usage for stage, group in enumerate(stages) for rank, usage in enumerate(group)}
        return {"replica": own, **ranks}

    def _busy_s(self, before: Mapping[str, Usage], after: Mapping[str, Usage]) -> tuple[float, ...]:
        busy_s = {name: after[name]["busy_s"] - before[name]["busy_s"] for name in after}
        if self._spec.is_one_process:
            return (busy_s["replica"],)
        ranks = range(self._spec.tensor_parallel)
        return tuple(max(busy_s[_name(stage, rank)] for rank in ranks) for stage in range(len(self._spec.stages)))


def _name(stage: int, rank: int) -> str:
    return f"stage {stage} rank {rank}"


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
