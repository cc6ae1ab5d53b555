"""Which work goes where. Events in, instructions out: no Ray, no I/O, and time is a number that comes with the event.

    waiting --Run--> leased --LeaseDone--> stored
    ^                |----- passing fault, lost node -----> waiting again, elsewhere, after a pause; given up after `max_attempts`
    |                |----- fault, deadline, `max_faults` times -> trials of ever fewer rows, each alone on a replica
    '--- without the rows that brought down every replica even alone: those are refused, with the reason ---'

Near the end units are split: the text of their rows is made by several replicas, and one of those finishes them; and a task that takes
much longer than expected is leased once more, which the store makes safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from persona_ray.errors import StateError
from persona_ray.scheduler.events import (
    Event,
    Instruction,
    Kind,
    Lease,
    LeaseDone,
    LeaseFailed,
    LeaseFound,
    Refuse,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    Restart,
    Retire,
    Run,
    StopRequested,
    Task,
    Tick,
    UnitsFound,
)
from persona_ray.scheduler.rates import Rates
from persona_ray.scheduler.waiting import Waiting

TAIL = 2
"""The run's end is near when fewer than this many fresh units are left for each lease: those are split, and drawn longest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the scheduler goes by."""

    leases_per_replica: int = 1
    window: int = 128
    """Units of the work order, not begun yet, among which the next one is drawn: so many that two drivers seldom draw the same."""
    max_attempts: int = 6
    """Passing faults of a unit, before it is given up."""
    max_faults: int = 3
    """Faults of a unit that its own rows may be behind, before they are tried apart."""
    max_losses: int = 12
    """Of a replica, in a row; then it is retired."""
    pause_s: float = 1.0
    """After a first fault; twice as long after each further one."""
    max_pause_s: float = 60.0
    deadline_factor: float = 6.0
    """Times the expected time."""
    deadline_floor_s: float = 300.0
    first_deadline_s: float = 3600.0
    """As long as nothing was done yet to learn from."""
    straggler_factor: float = 1.5
    """Times the expected time; then a task is leased once more, when nothing else is left to do."""
    parts: int = 4
    """Into which a unit is split at the tail of the run; 1: never."""
    seed: int = 0


@dataclass(slots=True)
class _Unit:
    """What is known of a unit that is not stored."""

    num_rows: int
    open: set[Task] = field(default_factory=set)
    """Its tasks, each waiting or leased."""
    excluded: dict[int, str] = field(default_factory=dict)
    failures: int = 0
    faults: int = 0
    rounds: int = 0
    """Of trials."""
    row_faults: Counter[int] = field(default_factory=Counter)
    failed_on: set[int] = field(default_factory=set)
    may_split: bool = True


class SchedulerState:
    """Units, replicas and leases of one run."""

    def __init__(
        self, units: Mapping[int, int], *, work: Mapping[int, float] | None = None, rules: Rules | None = None, has_succeeded: bool = False
    ) -> None:
        """`units`: index -> rows, in work order. `work`: expected tokens of each. `has_succeeded`: this job has stored rows before."""
        self.rules = rules or Rules()
        self._work = dict(work) if work is not None else {unit: float(rows) for unit, rows in units.items()}
        self._units = {unit: _Unit(num_rows, {Task(unit)}) for unit, num_rows in units.items()}
        """Those that are neither stored nor given up."""
        self.waiting = Waiting(units, window=self.rules.window, seed=self.rules.seed)
        self.leases: dict[int, Lease] = {}
        self.replicas: dict[int, set[int]] = {}
        """Ready replica -> its leases."""
        self.draining: set[int] = set()
        self.retired: dict[int, str] = {}
        self.stored: set[int] = set()
        """Units whose marker exists."""
        self.given_up: dict[int, str] = {}
        self.refused: dict[int, dict[int, str]] = {}
        """Unit -> place of a row -> why no replica can do it."""
        self.num_retries = 0
        self.stop_reason: str | None = None
        self._holders: dict[Task, set[int]] = {}
        self._free: dict[int, None] = {}
        """Replicas that can take a lease."""
        self._losses: Counter[int] = Counter()
        self._rates = Rates()
        self._next_lease = 0
        self.has_succeeded = has_succeeded
        """Something could be done here: what fails now may be the fault of single rows."""
        self._is_shared = False
        self._all = frozenset(units)

    @property
    def is_done(self) -> bool:
        """Every unit is stored or given up; or the run was stopped, and nothing is under way."""
        return not self._units or (self.stop_reason is not None and not self.leases)

    @property
    def num_left(self) -> int:
        """Units that are neither stored nor given up."""
        return len(self._units)

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take the event in; answers what is to be done now. Raises StateError for an event that cannot be."""
        instructions: list[Instruction] = []
        match event:
            case ReplicaReady(replica):
                self._welcome(replica)
            case ReplicaDraining(replica):
                self.draining.add(replica)
                self._free.pop(replica, None)
            case ReplicaLost(replica, reason, is_fault):
                instructions += self._lose(replica, reason, now_s, is_fault=is_fault)
            case LeaseDone(number):
                self._done(number, now_s)
            case LeaseFailed(number, reason, is_fault):
                instructions += self._failed(number, reason, now_s, is_fault=is_fault)
            case LeaseFound(number):
                self._lease_found(number)
            case UnitsFound(units):
                self._found(units)
            case StopRequested(reason):
                self.stop_reason = self.stop_reason or reason
            case Tick():
                instructions += self._overdue(now_s)
        return [*instructions, *self._assign(now_s)]

    def deadline_s(self, lease: Lease) -> float:
        """When the lease is over its time."""
        rules, expected_s = self.rules, self._expected_s(lease)
        patience_s = rules.first_deadline_s if expected_s is None else rules.deadline_factor * expected_s
        return lease.began_s + max(patience_s, rules.deadline_floor_s)

    # ---- replicas -------------------------------------------------------------------------------------------------

    def _welcome(self, replica: int) -> None:
        if replica not in self.retired and replica not in self.replicas:
            self.replicas[replica] = set()
            self.draining.discard(replica)
            self._free[replica] = None

    def _lose(self, replica: int, reason: str, now_s: float, *, is_fault: bool, blamed: Iterable[int] | None = None) -> list[Instruction]:
        """All leases of the replica end; `blamed` (default: all, if it is a fault) are held against their rows."""
        numbers = sorted(self.replicas.pop(replica, set()))
        self._free.pop(replica, None)
        guilty = set(numbers if is_fault else ()) if blamed is None else set(blamed)
        is_trial = any(self.leases[number].task.kind is Kind.TRIAL for number in guilty)
        instructions: list[Instruction] = []
        for number in numbers:
            lease = self._end(number)
            if number in guilty:
                instructions += self._blame(lease, reason, now_s)
            else:
                self._put_back(lease.task)
        if is_fault and not is_trial:
            self._losses[replica] += 1
        if self._losses[replica] >= self.rules.max_losses and replica not in self.retired:
            self.retired[replica] = reason
            instructions.append(Retire(replica, reason))
        return instructions

    def _overdue(self, now_s: float) -> list[Instruction]:
        late: dict[int, list[Lease]] = {}
        for lease in self.leases.values():
            if now_s > self.deadline_s(lease):
                late.setdefault(lease.replica, []).append(lease)
        instructions: list[Instruction] = []
        for replica, leases in late.items():
            reason = f"did not end within {now_s - leases[0].began_s:.0f} s"
            instructions.append(Restart(replica, reason))
            instructions += self._lose(replica, reason, now_s, is_fault=True, blamed=[lease.number for lease in leases])
        return instructions

    # ---- what became of a lease -----------------------------------------------------------------------------------

    def _done(self, number: int, now_s: float) -> None:
        lease = self._end_or_none(number)
        if lease is None:
            return  # written off before, with its replica
        task, unit = lease.task, self._units.get(lease.task.unit)
        self._losses[lease.replica] = 0
        self.has_succeeded = True
        self._rates.learn(task.kind, self._work_of(task), now_s - lease.began_s)
        if task.kind in {Kind.WHOLE, Kind.FINISH}:
            self._store(task.unit)
        elif unit is not None and task in unit.open:
            self._close(unit, task)
            if not unit.open:
                self._follow(unit, task)

    def _follow(self, unit: _Unit, last: Task) -> None:
        """All parts of the text are there, or all rows were tried: the unit as a whole comes next."""
        if last.kind is Kind.TRIAL:
            unit.rounds, unit.faults = unit.rounds + 1, 0
            self._open(unit, Task(last.unit, excluded=dict(unit.excluded)))
        else:
            self._open(unit, Task(last.unit, Kind.FINISH, excluded=dict(unit.excluded)))

    def _failed(self, number: int, reason: str, now_s: float, *, is_fault: bool) -> list[Instruction]:
        lease = self._end_or_none(number)
        if lease is None:
            return []
        if is_fault:
            return self._blame(lease, reason, now_s)
        unit = self._units.get(lease.task.unit)
        if unit is None or lease.task not in unit.open:
            return []
        unit.failed_on.add(lease.replica)
        unit.failures += 1
        if self._holders.get(lease.task):  # somebody else is at it, too, and may have more luck
            return []
        self.num_retries += 1
        if unit.failures >= self.rules.max_attempts:
            self._give_up(lease.task.unit, reason)
        else:
            self._again(unit, lease.task, unit.failures, now_s)
        return []

    def _blame(self, lease: Lease, reason: str, now_s: float) -> list[Instruction]:
        """The replica went down over this task, or did not come back from it."""
        task, unit = lease.task, self._units.get(lease.task.unit)
        if unit is None or task not in unit.open:
            return []
        unit.failed_on.add(lease.replica)
        if task.kind is Kind.TRIAL:  # which nobody else has
            self.num_retries += 1
            return self._narrow(unit, task, reason, now_s)
        unit.faults += 1
        if self._holders.get(task):  # what becomes of it there decides; but it counts, or two replicas could go down over it in turns
            return []
        self.num_retries += 1
        if unit.faults < self.rules.max_faults:
            self._again(unit, task, unit.faults, now_s)
        elif unit.rounds >= 2 or (unit.num_rows == len(unit.excluded)):
            self._give_up(task.unit, reason)
        else:
            self._restart_with(unit, task.unit, self._halves(task.unit, range(unit.num_rows)))
        return []

    def _narrow(self, unit: _Unit, task: Task, reason: str, now_s: float) -> list[Instruction]:
        rows = task.rows
        assert rows is not None
        if len(rows) > 1:
            self._close(unit, task)
            for half in self._halves(task.unit, rows):
                self._open(unit, half)
            return []
        row = rows[0]
        unit.row_faults[row] += 1
        if unit.row_faults[row] < 2:
            self._again(unit, task, 1, now_s)
            return []
        if not self.has_succeeded:  # nothing at all works here: that is not the row's doing
            self._give_up(task.unit, reason)
            return []
        unit.excluded[row] = reason
        self.refused.setdefault(task.unit, {})[row] = reason
        self._close(unit, task)
        if not unit.open:
            self._follow(unit, task)
        return [Refuse(task.unit, row, reason)]

    def _halves(self, unit: int, rows: range) -> list[Task]:
        excluded = self._units[unit].excluded
        middle = rows.start + (len(rows) + 1) // 2
        halves = [range(rows.start, middle), range(middle, rows.stop)]
        return [Task(unit, Kind.TRIAL, half) for half in halves if any(row not in excluded for row in half)]

    def _again(self, unit: _Unit, task: Task, times: int, now_s: float) -> None:
        """After a pause. A part of a split unit goes back into the whole: what its neighbours made may be lost with their node."""
        pause_s = min(self.rules.pause_s * 2 ** (times - 1), self.rules.max_pause_s)
        if task.kind in {Kind.TEXT, Kind.FINISH}:
            unit.may_split = False
            self._restart_with(unit, task.unit, [Task(task.unit, excluded=dict(unit.excluded))], now_s + pause_s)
        else:
            self.waiting.put(task, not_before_s=now_s + pause_s)

    def _put_back(self, task: Task) -> None:
        """Nobody's fault."""
        unit = self._units.get(task.unit)
        if unit is None or task not in unit.open or self._holders.get(task):
            return
        self.num_retries += 1
        if task.kind is Kind.FINISH:
            self._restart_with(unit, task.unit, [Task(task.unit, excluded=dict(unit.excluded))])
        else:
            self.waiting.put(task)

    def _restart_with(self, unit: _Unit, index: int, tasks: Iterable[Task], not_before_s: float | None = None) -> None:
        """These tasks in place of all that the unit had; leases of the former ones count for nothing any more."""
        self.waiting.drop(index)
        unit.open.clear()
        for task in tasks:
            unit.open.add(task)
            self.waiting.put(task, not_before_s=not_before_s)

    def _open(self, unit: _Unit, task: Task) -> None:
        unit.open.add(task)
        self.waiting.put(task)

    def _close(self, unit: _Unit, task: Task) -> None:
        unit.open.remove(task)

    def _store(self, index: int) -> None:
        self.given_up.pop(index, None)
        self.stored.add(index)
        if self._units.pop(index, None) is not None:
            self.waiting.drop(index)

    def _give_up(self, index: int, reason: str) -> None:
        self.given_up[index] = reason
        self.waiting.drop(index)
        del self._units[index]

    def _lease_found(self, number: int) -> None:
        lease = self._end_or_none(number)
        if lease is not None:
            self._is_shared = True
            self._store(lease.task.unit)

    def _found(self, units: frozenset[int]) -> None:
        for index in units & self._all - self.stored:
            if not any(self._holders.get(task) for task in self._open_tasks(index)):
                self._is_shared = True
            self._store(index)

    def _open_tasks(self, index: int) -> set[Task]:
        unit = self._units.get(index)
        return set() if unit is None else unit.open

    # ---- leases ---------------------------------------------------------------------------------------------------

    def _end_or_none(self, number: int) -> Lease | None:
        if number >= self._next_lease:
            raise StateError(f"lease {number} was never given")
        return self._end(number) if number in self.leases else None

    def _end(self, number: int) -> Lease:
        lease = self.leases.pop(number)
        holders = self._holders[lease.task]
        holders.remove(number)
        if not holders:
            del self._holders[lease.task]
        held = self.replicas.get(lease.replica)
        if held is not None:
            held.remove(number)
            if lease.replica not in self.draining:
                self._free[lease.replica] = None
        return lease

    def _assign(self, now_s: float) -> list[Run]:
        """Least loaded replicas first."""
        if self.stop_reason is not None or not self._free or not self._units:
            return []
        self.waiting.end_pauses(now_s)
        given: list[Run] = []
        reserved = self._reserved()
        free = sorted(self._free, key=lambda r: (len(self.replicas[r]), r))
        while free:
            still: list[int] = []
            for replica in free:
                task = None if replica == reserved and self.replicas[replica] else self._next_task(replica)
                if task is None:
                    continue
                given.append(self._lease(replica, task, now_s))
                if replica in self._free:
                    still.append(replica)
            free = still
        return given + self._lease_stragglers(now_s)

    def _reserved(self) -> int | None:
        """The replica that is kept from new work until it is empty, because a task waits that wants it alone."""
        if not any(self._is_exclusive(task) for task in self.waiting.first):
            return None
        return min(self._free, key=lambda r: (len(self.replicas[r]), r))

    def _next_task(self, replica: int) -> Task | None:
        def suits(task: Task) -> bool:
            failed_on = self._units[task.unit].failed_on
            is_elsewhere = replica not in failed_on or failed_on.issuperset(self.replicas.keys() - self.draining)
            return is_elsewhere and (not self._is_exclusive(task) or not self.replicas[replica])

        task = self.waiting.take_first(suits)
        if task is not None:
            return task
        num_slots = len(self.replicas) * self.rules.leases_per_replica
        is_tail = self.waiting.num_fresh < TAIL * num_slots
        task = self.waiting.take_fresh(self._work.__getitem__ if is_tail and not self._is_shared else None)
        if task is not None and is_tail and len(self.replicas) > 1:
            return self._split(task)
        return task

    def _split(self, task: Task) -> Task:
        """The first part of the unit; the others come next. The unit itself, if it cannot be split."""
        unit = self._units[task.unit]
        num_parts = min(self.rules.parts, unit.num_rows)
        if num_parts < 2 or not unit.may_split:
            return task
        cuts = [unit.num_rows * i // num_parts for i in range(num_parts + 1)]
        parts = [Task(task.unit, Kind.TEXT, range(a, b)) for a, b in pairwise(cuts)]
        self._close(unit, task)
        unit.open.add(parts[0])
        for part in parts[1:]:
            self._open(unit, part)
        return parts[0]

    def _lease(self, replica: int, task: Task, now_s: float) -> Run:
        lease = Lease(self._next_lease, replica, task, now_s)
        self._next_lease += 1
        self.leases[lease.number] = lease
        self._holders.setdefault(task, set()).add(lease.number)
        self.replicas[replica].add(lease.number)
        if len(self.replicas[replica]) >= self.rules.leases_per_replica or self._is_exclusive(task):
            self._free.pop(replica, None)
        return Run(lease)

    def _lease_stragglers(self, now_s: float) -> list[Run]:
        """Once more, on replicas that have nothing else to do. Never a third time."""
        if not self._free or self.waiting.num_fresh:
            return []
        late = [lease for lease in self.leases.values() if self._is_straggler(lease, now_s)]
        late.sort(key=lambda lease: lease.began_s)
        given: list[Run] = []
        for lease in late:
            failed_on = self._units[lease.task.unit].failed_on
            replica = next((r for r in self._free if r != lease.replica and r not in failed_on), None)
            if replica is not None:
                given.append(self._lease(replica, lease.task, now_s))
        return given

    def _is_straggler(self, lease: Lease, now_s: float) -> bool:
        expected_s = self._expected_s(lease)
        is_late = expected_s is not None and now_s - lease.began_s > self.rules.straggler_factor * expected_s
        unit = self._units.get(lease.task.unit)
        is_wanted = unit is not None and lease.task in unit.open
        return is_late and is_wanted and not self._is_exclusive(lease.task) and len(self._holders[lease.task]) == 1

    def _is_exclusive(self, task: Task) -> bool:
        """Alone on its replica: whoever brings that down shall not take others with it, nor be blamed for them."""
        unit = self._units.get(task.unit)
        return task.kind is Kind.TRIAL or (unit is not None and unit.faults >= self.rules.max_faults - 1)

    def _expected_s(self, lease: Lease) -> float | None:
        """As far as is known now; None: nothing was done yet."""
        return self._rates.expected_s(lease.task.kind, self._work_of(lease.task))

    def _work_of(self, task: Task) -> float:
        work = self._work[task.unit]
        unit = self._units.get(task.unit)
        return work if task.rows is None or unit is None else work * len(task.rows) / unit.num_rows

    # ---- what must hold -------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Invariants, checked by every test after every event. Raises StateError."""
        if self._units.keys() | self.stored | self.given_up.keys() != self._all or self._units.keys() & (
            self.stored | self.given_up.keys()
        ):
            raise StateError("units lost, or in two places")
        open_tasks = Counter(task for unit in self._units.values() for task in unit.open)
        waiting = Counter(self.waiting)
        held = Counter(task for task in self._holders if task.unit in self._units and task in self._units[task.unit].open)
        if waiting + held != open_tasks or any(not unit.open for unit in self._units.values()):
            raise StateError(f"tasks lost or doubled: waiting {waiting}, leased {held}, open {open_tasks}")
        if {n for numbers in self._holders.values() for n in numbers} != self.leases.keys():
            raise StateError("leases without holders")
        if any(len(numbers) > 2 for numbers in self._holders.values()):
            raise StateError("a task is leased more than twice")
        self._validate_replicas()

    def _validate_replicas(self) -> None:
        for replica, numbers in self.replicas.items():
            if len(numbers) > self.rules.leases_per_replica:
                raise StateError(f"replica {replica} holds {len(numbers)} leases, at most {self.rules.leases_per_replica} are allowed")
            if any(self.leases[number].replica != replica for number in numbers):
                raise StateError(f"replica {replica} holds leases of another")
        if sum(map(len, self.replicas.values())) != len(self.leases):
            raise StateError("leases of replicas that are gone")
        if self._free and self.waiting.num_fresh and self.stop_reason is None and self._reserved() is None:
            raise StateError(f"replicas {sorted(self._free)} idle while {self.waiting.num_fresh} units wait")
