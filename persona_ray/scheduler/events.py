"""What the scheduler hears, and what it answers. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What a replica is asked to do with a unit."""

    WHOLE = "whole"
    """Text, activations, commit."""
    TEXT = "text"
    """The text of some of its rows, handed back: a unit that is split at the tail of a run."""
    FINISH = "finish"
    """Activations and commit, from the parts of its text."""
    TRIAL = "trial"
    """Text and activations of some of its rows, nothing kept: does one of them bring the replica down?"""


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work, whoever does it."""

    unit: int
    kind: Kind = Kind.WHOLE
    rows: range | None = None
    """Places within the unit; None: all."""
    excluded: Mapping[int, str] = field(default_factory=dict, hash=False)
    """Place within the unit -> why it is refused without being tried."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A task in the hands of a replica."""

    number: int
    """Never used again."""
    replica: int
    task: Task
    began_s: float


# ---- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """The replica can take work (again)."""

    replica: int


@dataclass(frozen=True, slots=True)
class ReplicaDraining:
    """The replica will be taken away: it finishes what it holds, and gets no more."""

    replica: int


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """The replica's process is gone, and all it was doing with it."""

    replica: int
    reason: str
    is_fault: bool = True
    """False: its node was taken away, which says nothing against the rows it held, nor against the replica."""


@dataclass(frozen=True, slots=True)
class LeaseDone:
    """What was asked for is there: for a whole or a finished unit, its marker."""

    lease: int


@dataclass(frozen=True, slots=True)
class LeaseFailed:
    """The replica is alive, the work is not done."""

    lease: int
    reason: str
    is_fault: bool = False
    """True: the rows themselves may be behind it. False: a passing fault, for example of the store."""


@dataclass(frozen=True, slots=True)
class LeaseFound:
    """The unit had its marker before the work was begun: another run is at the same store."""

    lease: int


@dataclass(frozen=True, slots=True)
class UnitsFound:
    """Markers that somebody else has created."""

    units: frozenset[int]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """No new work; what is under way is finished."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = ReplicaReady | ReplicaDraining | ReplicaLost | LeaseDone | LeaseFailed | LeaseFound | UnitsFound | StopRequested | Tick


# ---- instructions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Give the task to the replica."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Restart:
    """End the replica's process and start it again: it holds work that is over its deadline, and nothing else ends a call."""

    replica: int
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Leave the replica alone for the rest of the run."""

    replica: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The row brings every replica down; the unit will be done without it. For the log."""

    unit: int
    row: int
    reason: str


Instruction = Run | Restart | Retire | Refuse
