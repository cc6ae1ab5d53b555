"""Which unit goes where. Events in, instructions out: no Ray, no clock, no I/O.

waiting --Run--> running --UnitStored--> stored
^                |-----UnitFailed---> waiting again, or given up after `max_attempts`
'----ReplicaLost-'
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from persona_ray.errors import StateError


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """The replica can take units (again)."""

    replica: int


@dataclass(frozen=True, slots=True)
class UnitStored:
    """The unit's marker exists."""

    replica: int
    unit: int


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A passing fault: the replica is alive, the unit is not done."""

    replica: int
    unit: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """The replica's process is gone, and all it was doing with it."""

    replica: int
    reason: str


Event = ReplicaReady | UnitStored | UnitFailed | ReplicaLost


@dataclass(frozen=True, slots=True)
class Run:
    """Give the unit to the replica."""

    replica: int
    unit: int


class SchedulerState:
    """Units and replicas of one run."""

    def __init__(self, units: Iterable[int], *, units_per_replica: int = 1, max_attempts: int = 4) -> None:
        self.units_per_replica = units_per_replica
        self.max_attempts = max_attempts
        self.waiting: deque[int] = deque(units)
        """Work order is kept: a unit that failed goes to the front."""
        self.running: dict[int, set[int]] = {}
        """Ready replica -> its units. A unit is in exactly one of waiting, running, stored, given_up."""
        self.stored: set[int] = set()
        self.given_up: dict[int, str] = {}
        """Unit -> the reason of its last failure."""
        self.failures: Counter[int] = Counter()
        self._all = frozenset(self.waiting)

    @property
    def is_done(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not any(self.running.values())

    def handle(self, event: Event) -> list[Run]:
        """Take the event in; answers what is to be done now. Raises StateError for an event that cannot be."""
        match event:
            case ReplicaReady(replica):
                self.running.setdefault(replica, set())
            case UnitStored(replica, unit):
                self._take_back(replica, unit)
                self.stored.add(unit)
            case UnitFailed(replica, unit, reason):
                self._take_back(replica, unit)
                self._retry(unit, reason)
            case ReplicaLost(replica, reason):
                for unit in sorted(self.running.pop(replica, set()), reverse=True):
                    self._retry(unit, reason)
        return self._assign()

    def validate(self) -> None:
        """Invariants, checked by every test after every event. Raises StateError."""
        places = [*self.waiting, *(unit for units in self.running.values() for unit in units), *self.stored, *self.given_up]
        if len(places) != len(set(places)) or frozenset(places) != self._all:
            raise StateError(f"units lost or doubled: {sorted(places)} against {sorted(self._all)}")
        for replica, units in self.running.items():
            if len(units) > self.units_per_replica:
                raise StateError(f"replica {replica} holds {sorted(units)}, at most {self.units_per_replica} are allowed")
            if self.waiting and len(units) < self.units_per_replica:
                raise StateError(f"replica {replica} idles while {len(self.waiting)} units wait")

    def _take_back(self, replica: int, unit: int) -> None:
        if unit not in self.running.get(replica, set()):
            raise StateError(f"replica {replica} reports unit {unit}, which it does not hold")
        self.running[replica].remove(unit)

    def _retry(self, unit: int, reason: str) -> None:
        self.failures[unit] += 1
        if self.failures[unit] >= self.max_attempts:
            self.given_up[unit] = reason
        else:
            self.waiting.appendleft(unit)

    def _assign(self) -> list[Run]:
        """Least loaded replicas first."""
        instructions: list[Run] = []
        while self.waiting and self.running:
            replica = min(self.running, key=lambda r: (len(self.running[r]), r))
            if len(self.running[replica]) >= self.units_per_replica:
                break
            unit = self.waiting.popleft()
            self.running[replica].add(unit)
            instructions.append(Run(replica, unit))
        return instructions
