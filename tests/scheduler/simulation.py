"""A run on a simulated clock: replicas that take what a unit takes, and spot markets that take replicas away."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import exp

from persona_ray.scheduler.events import (
    Event,
    Instruction,
    Kind,
    Lease,
    LeaseDone,
    LeaseFound,
    ReplicaLost,
    ReplicaReady,
    Run,
    Tick,
    UnitsFound,
)
from persona_ray.scheduler.state import Rules, SchedulerState

FINISH_SHARE = 0.1
"""Of a unit's time that is capture and writing, which is not split."""


def lognormal_units(num: int, sigma: float, seed: int) -> list[float]:
    """Seconds of each unit, of median 60."""
    dice = random.Random(seed)
    return [60 * exp(dice.gauss(0, sigma)) for _ in range(num)]


@dataclass
class Simulation:
    """Unit seconds, replicas, and how many of those are lost in an hour; a lost one is back after `away_s`."""

    seconds: Sequence[float]
    replicas: int
    rules: Rules
    losses_per_hour: float = 0.0
    away_s: float = 120.0
    unit_rows: int = 256
    wasted_s: float = field(default=0.0, init=False)
    """Of leases whose replica was lost."""
    worked_s: float = field(default=0.0, init=False)
    """Of leases that came to their end."""
    num_losses: int = field(default=0, init=False)

    def run(self) -> float:
        """When the last unit is stored."""
        self._state = SchedulerState(dict.fromkeys(range(len(self.seconds)), self.unit_rows), rules=self.rules)
        self._events: list[tuple[float, int, Event]] = []
        self._tickets = count()
        dice = random.Random(7)
        for replica in range(self.replicas):
            self._put(0.0, ReplicaReady(replica))
        self._put(60.0, Tick())
        if self.losses_per_hour:
            self._put(dice.expovariate(self.losses_per_hour / 3600), ReplicaLost(-1, "spot", is_fault=False))
        now_s = 0.0
        while not self._state.is_done:
            now_s, _, event = heapq.heappop(self._events)
            if isinstance(event, Tick):
                self._put(now_s + 60.0, Tick())
            if isinstance(event, ReplicaLost):
                self._put(now_s + dice.expovariate(self.losses_per_hour / 3600), event)
                ready = sorted(self._state.replicas)
                if not ready:
                    continue
                event = ReplicaLost(dice.choice(ready), "spot", is_fault=False)
                self.num_losses += 1
                self.wasted_s += sum(now_s - self._state.leases[number].began_s for number in self._state.replicas[event.replica])
                self._put(now_s + self.away_s, ReplicaReady(event.replica))
            if isinstance(event, LeaseDone) and event.lease in self._state.leases:
                self.worked_s += self.takes_s(self._state.leases[event.lease])
            self._perform(self._state.handle(event, now_s), now_s)
        return now_s

    def _put(self, at_s: float, event: Event) -> None:
        heapq.heappush(self._events, (at_s, next(self._tickets), event))

    def _perform(self, instructions: Sequence[Instruction], now_s: float) -> None:
        for instruction in instructions:
            if isinstance(instruction, Run):
                lease = instruction.lease
                self._put(now_s + self.takes_s(lease), LeaseDone(lease.number))

    def takes_s(self, lease: Lease) -> float:
        """Seconds of a lease."""
        whole_s, rows = self.seconds[lease.task.unit], lease.task.rows
        if lease.task.kind is Kind.FINISH:
            return whole_s * FINISH_SHARE
        return whole_s if rows is None else whole_s * (1 - FINISH_SHARE) * len(rows) / self.unit_rows


def static_split_s(seconds: Sequence[float], replicas: int) -> float:
    """Makespan of equal shares that are dealt out beforehand, as by role in the published scripts."""
    share = len(seconds) // replicas
    return max(sum(seconds[i * share : (i + 1) * share]) for i in range(replicas))


def lower_bound_s(seconds: Sequence[float], replicas: int) -> float:
    """The larger of mean load and longest unit."""
    return max(sum(seconds) / replicas, *seconds)


LOOK_AT_LEDGER_S = 30.0


class TwoDrivers:
    """Two drivers with `replicas` each, that begin at the same moment on one store.

    By the rules of a run: units are split at the tail, and a replica has two leases, which share it. Each driver asks for a unit's
    marker before it begins it, and lists all of them now and then.
    """

    def __init__(self, seconds: Sequence[float], replicas: int, seed: int) -> None:
        rules = [Rules(seed=seed + driver, leases_per_replica=2) for driver in range(2)]
        self.replicas = replicas
        self.states = [SchedulerState(dict.fromkeys(range(len(seconds)), 256), rules=of_driver) for of_driver in rules]
        self._clocks = [Simulation(seconds, replicas, of_driver) for of_driver in rules]
        self.committed: set[int] = set()
        self.num_double = 0
        """Units that both have computed."""
        self._events: list[tuple[float, int, int, Event]] = []
        self._tickets = count()

    def run(self) -> None:
        """Until both see that all is done."""
        for driver in range(2):
            self._put(LOOK_AT_LEDGER_S, driver, Tick())
            for replica in range(self.replicas):
                self._handle(driver, ReplicaReady(replica), 0.0)
        while not all(state.is_done for state in self.states):
            now_s, _, driver, event = heapq.heappop(self._events)
            if isinstance(event, Tick):
                self._put(now_s + LOOK_AT_LEDGER_S, driver, Tick())
                event = UnitsFound(frozenset(self.committed))
            elif isinstance(event, LeaseDone):
                self._commit(driver, event)
            self._handle(driver, event, now_s)
            self.states[driver].validate()

    def _put(self, at_s: float, driver: int, event: Event) -> None:
        heapq.heappush(self._events, (at_s, next(self._tickets), driver, event))

    def _handle(self, driver: int, event: Event, now_s: float) -> None:
        for instruction in self.states[driver].handle(event, now_s):
            if isinstance(instruction, Run):
                lease = instruction.lease
                if lease.task.unit in self.committed:
                    self._handle(driver, LeaseFound(lease.number), now_s)
                else:
                    self._put(now_s + 2 * self._clocks[driver].takes_s(lease), driver, LeaseDone(lease.number))

    def _commit(self, driver: int, event: LeaseDone) -> None:
        lease = self.states[driver].leases.get(event.lease)
        if lease is not None and lease.task.kind in {Kind.WHOLE, Kind.FINISH}:
            self.num_double += lease.task.unit in self.committed
            self.committed.add(lease.task.unit)
