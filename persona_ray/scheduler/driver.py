"""Performs what the state decides, on Ray: sends work to replicas, waits, and turns what comes back into events.

Ray retries nothing here: a unit is written once whoever computes it, so doing it again is our own, visible decision.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, AuthenticationError, RayActorError, RayError, RayTaskError

from persona_ray.errors import InputError, IntegrityError, LostError, PersonaRayError, RetryableError
from persona_ray.metrics import LEASES, REPLICAS, RESTARTS, RETRIES, ROWS, UNIT_SECONDS, UNITS, UNITS_LEFT, record
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
    Tick,
    UnitsFound,
)
from persona_ray.scheduler.state import SchedulerState
from persona_ray.spec import Receipt, Rollout, Unit

log = logging.getLogger(__name__)

MAX_PAUSE_S = 15.0
"""Between two attempts to reach a replica whose process was lost: half a second at first, then twice as long each time."""
RESUME = "What is committed is safe; run the same command again"
SILENCE_S = 60.0
"""After which somebody who waits is told for what."""
LOOK_AROUND_S = 2.0
"""How often new replicas are looked for, and overdue work."""
LOOK_AT_LEDGER_S = 30.0
"""How often it is asked what other runs have committed; before each unit is begun, its own marker is looked for, too."""
CONNECT_TIMEOUT_S = 5.0
HOW_TO_ENTER = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the one that its head was started with"
WHY_REFUSED = "no replica can do it"


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """The Ray cluster at `address`, or a local one that starts and ends here. Raises InputError if it cannot be reached."""
    if address is None:
        _start_local()
    else:
        _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _start_local() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray protects a local cluster by a token; without one in the environment it would leave a token file in the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        _require_listener(address, host, int(port))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise InputError(f"--address {address}: token authentication is on, and there is no token here; {HOW_TO_ENTER}") from error
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(f"--address {address}: no Ray cluster answers there ({why}); if it asks for a token, {HOW_TO_ENTER}") from error


def _require_listener(address: str, host: str, port: int) -> None:
    """Ray itself waits for minutes at an address where nothing listens."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(f"--address {address}: nothing listens there ({error})") from error


class Fleet(Protocol):
    """The replicas of a run, as many as there are at the moment."""

    @property
    def handles(self) -> Mapping[int, Any]:
        """Replica -> actor handle with `ready`, `run`, `text`, `finish` and `trial` methods. A number is never used again."""
        ...

    @property
    def waits_for(self) -> str | None:
        """What the next replica lacks, in words."""
        ...

    @property
    def draining(self) -> Collection[int]:
        """Replicas whose node will be taken away."""
        ...

    def look_around(self) -> None:
        """Take in what the cluster has to offer now. Never waits."""
        ...

    def has_place(self, replica: int) -> bool:
        """False: a node of the replica is gone; it comes back when it finds another place."""
        ...

    def restart(self, replica: int) -> None:
        """End its process; Ray starts it again."""
        ...

    def retire(self, replica: int) -> None:
        """End its process for good, and give its place back."""
        ...


class Others(Protocol):
    """What other runs have put into the store."""

    def committed(self) -> Collection[int]:
        """Units with a marker."""
        ...

    def has(self, unit: int) -> bool:
        """Whether the unit has a marker."""
        ...


class NoOthers:
    """A driver that is alone with its units."""

    def committed(self) -> Collection[int]:
        """None."""
        return ()

    def has(self, unit: int) -> bool:  # noqa: ARG002
        """No."""
        return False


@dataclass(slots=True)
class _Seen:
    """A replica, as far as the driver knows."""

    probe_at_s: float | None = 0.0
    """When to ask next whether it is ready; None: it was asked, or it works."""
    losses: int = 0
    """In a row."""


@dataclass(slots=True)
class Driver:
    """One run's conversation with its replicas."""

    state: SchedulerState
    units: Mapping[int, Unit]
    fleet: Fleet
    others: Others = field(default_factory=NoOthers)
    stop_reason: Callable[[], str | None] = lambda: None
    """Asked again and again: why no new work is to be begun."""
    double: set[int] = field(default_factory=set, init=False)
    """Units that this run computed, and another one had committed by then."""
    _ours: set[int] = field(default_factory=set, init=False)
    """Units that this run has committed."""
    _leases: dict[Any, Lease] = field(default_factory=dict, init=False)
    """Pending object ref -> the lease that it ends."""
    _probes: dict[Any, int] = field(default_factory=dict, init=False)
    """Pending object ref -> the replica that will be ready."""
    _seen: dict[int, _Seen] = field(default_factory=dict, init=False)
    _parts: dict[int, dict[int, Sequence[Rollout]]] = field(default_factory=dict, init=False)
    """Unit -> first row of a part -> its rollouts."""
    _last_loss: str = field(default="none was started", init=False)
    _told_s: float = field(default_factory=time.monotonic, init=False)
    _looked_s: float = field(default_factory=time.monotonic, init=False)
    _ticked_s: float = field(default=0.0, init=False)

    def run(self, on_receipt: Callable[[Receipt], None]) -> None:
        """Until every unit is stored or given up, or the run was stopped and nothing is under way.

        Raises RetryableError if units were given up or all replicas are gone, and whatever a replica raised that is not a passing fault.
        """
        while not self.state.is_done:
            self._look_around()
            if self._seen and self._seen.keys() <= self.state.retired.keys() and self.fleet.waits_for is None:
                raise RetryableError(f"no replica can be reached any more ({self._last_loss}). {RESUME}")
            for ref in self._wait():
                self._take(ref, on_receipt)
        self._record_depths()
        if self.state.given_up:
            unit, reason = next(iter(self.state.given_up.items()))
            raise RetryableError(
                f"{len(self.state.given_up)} units failed again and again, on every replica, first unit {unit}: {reason}. {RESUME}"
            )

    def _handle(self, event: Event) -> None:
        self._perform(self.state.handle(event, time.monotonic()))

    # ---- what the driver sees by itself ---------------------------------------------------------------------------

    def _look_around(self) -> None:
        now_s = time.monotonic()
        reason = self.stop_reason() if self.state.stop_reason is None else None
        if reason is not None:
            log.warning("%s: %d leases under way are finished, nothing new is begun", reason, len(self.state.leases))
            self._handle(StopRequested(reason))
        if now_s - self._ticked_s >= LOOK_AROUND_S:
            self._ticked_s = now_s
            self._handle(Tick())
            self._look_at_fleet()
            self._record_depths()
        if now_s - self._looked_s >= LOOK_AT_LEDGER_S:
            self._looked_s = now_s
            self._handle(UnitsFound(frozenset(self.others.committed())))
        for replica, seen in self._seen.items():
            if seen.probe_at_s is not None and seen.probe_at_s <= now_s:
                seen.probe_at_s = None
                self._probes[self.fleet.handles[replica].ready.remote()] = replica

    def _look_at_fleet(self) -> None:
        """Replicas that have found their place since, and such as will lose it."""
        if self.state.stop_reason is None and (not self._seen or self.state.waiting.num_fresh):
            self.fleet.look_around()
        for replica in self.fleet.handles:
            self._seen.setdefault(replica, _Seen())
        for replica in self.fleet.draining:
            if replica in self.state.replicas and replica not in self.state.draining:
                log.warning("replica %d: its node will be taken away; it finishes what it holds", replica, extra={"replica": replica})
                self._handle(ReplicaDraining(replica))

    def _record_depths(self) -> None:
        state = self.state
        record(UNITS_LEFT, state.num_left)
        for replica in self._seen:
            record(LEASES, len(state.replicas.get(replica, ())), replica=str(replica))
        num_draining = len(state.draining & state.replicas.keys())
        record(REPLICAS, len(state.replicas) - num_draining, state="ready")
        record(REPLICAS, num_draining, state="draining")
        record(REPLICAS, len(state.retired), state="retired")
        record(REPLICAS, len(self._seen.keys() - state.replicas.keys() - state.retired.keys()), state="loading")

    def _wait(self) -> list[Any]:
        """What has ended, or nothing after a while. Who waits in vain is told for what."""
        pending = [*self._leases, *self._probes]
        finished: list[Any] = []
        if not pending:
            time.sleep(min(LOOK_AROUND_S, 0.2))
        else:
            # Whoever asks for one alone is given one alone; with many replicas that would be a turn of this loop for each.
            finished, _ = ray.wait(pending, num_returns=1, timeout=self._patience_s())
            if finished and len(pending) > 1:
                more, _ = ray.wait([ref for ref in pending if ref != finished[0]], num_returns=len(pending) - 1, timeout=0)
                finished = [*finished, *more]
        if finished or self.state.replicas:
            self._told_s = time.monotonic()
        elif time.monotonic() - self._told_s > SILENCE_S:
            log.warning("still %s", self.fleet.waits_for or "waiting for a replica to load the model")
            self._told_s = time.monotonic()
        return finished

    def _patience_s(self) -> float:
        """Until something else than an answer is due."""
        probes = [seen.probe_at_s - time.monotonic() for seen in self._seen.values() if seen.probe_at_s is not None]
        return max(0.0, min([LOOK_AROUND_S, *probes]))

    # ---- what the state wants -------------------------------------------------------------------------------------

    def _perform(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(lease):
                    self._start(lease)
                case Restart(replica, reason):
                    log.warning("replica %d %s; it is started again", replica, reason, extra={"replica": replica})
                    self._record_restart(replica, "overdue")
                    self._forget(replica)
                    self.fleet.restart(replica)
                    self._probe_later(replica)
                case Retire(replica, reason):
                    log.error("replica %d fails again and again, and is left alone: %s", replica, reason, extra={"replica": replica})
                    self._forget(replica)
                    self._seen[replica].probe_at_s = None
                    self.fleet.retire(replica)
                case Refuse(unit, row, reason):
                    log.error("unit %d: row %d is refused: %s", unit, self.units[unit].rows[row].index, reason, extra={"unit": unit})

    def _start(self, lease: Lease) -> None:
        task, whole = lease.task, self.units[lease.task.unit]
        if task.kind in {Kind.WHOLE, Kind.TEXT} and self.others.has(task.unit):
            self._handle(LeaseFound(lease.number))
            return
        handle = self.fleet.handles[lease.replica]
        rows = whole.rows if task.rows is None else whole.rows[task.rows.start : task.rows.stop]
        unit = Unit(task.unit, rows, {whole.rows[place].index: f"{WHY_REFUSED}: {why}" for place, why in task.excluded.items()})
        match task.kind:
            case Kind.WHOLE:
                ref = handle.run.remote(unit)
            case Kind.TEXT:
                ref = handle.text.remote(unit)
            case Kind.FINISH:
                parts = self._parts[task.unit]
                ref = handle.finish.remote(unit, [rollout for first in sorted(parts) for rollout in parts[first]])
            case Kind.TRIAL:
                ref = handle.trial.remote(unit)
        self._leases[ref] = lease
        log.debug(
            "lease %d begins: unit %d, %s, on replica %d", lease.number, task.unit, task.kind.value, lease.replica, extra=about(lease)
        )

    def _forget(self, replica: int) -> None:
        """What it was asked is not waited for any more."""
        self._leases = {ref: lease for ref, lease in self._leases.items() if lease.replica != replica}
        self._probes = {ref: other for ref, other in self._probes.items() if other != replica}

    def _probe_later(self, replica: int) -> None:
        seen = self._seen[replica]
        seen.losses += 1
        seen.probe_at_s = time.monotonic() + min(0.5 * 2 ** (seen.losses - 1), MAX_PAUSE_S)

    # ---- what became of it ----------------------------------------------------------------------------------------

    def _take(self, ref: Any, on_receipt: Callable[[Receipt], None]) -> None:
        if ref in self._probes:
            self._take_probe(ref, self._probes.pop(ref))
        elif ref in self._leases:  # otherwise it was written off meanwhile
            self._take_lease(ref, self._leases.pop(ref), on_receipt)

    def _take_probe(self, ref: Any, replica: int) -> None:
        try:
            ray.get(ref)
        except ActorUnavailableError as error:  # it is on its way back
            log.debug("replica %d: %s", replica, _first_line(error), extra={"replica": replica})
            self._probe_later(replica)
        except RayActorError as error:
            self._lost(replica, _first_line(error))
        except RayTaskError as error:
            if not isinstance(error.cause, RetryableError):
                raise at_work(error) from error
            self._lost(replica, str(error.cause))
        else:
            self._seen[replica].losses = 0
            self._handle(ReplicaReady(replica))

    def _take_lease(self, ref: Any, lease: Lease, on_receipt: Callable[[Receipt], None]) -> None:
        try:
            answer = ray.get(ref)
        except RayActorError as error:
            self._lost(lease.replica, _first_line(error))
        except RayTaskError as error:
            self._handle(self._failure(lease, error))
        except RayError as error:  # what it answered was lost with its node
            self._handle(LeaseFailed(lease.number, _first_line(error)))
        else:
            self._seen[lease.replica].losses = 0
            log.debug("lease %d is done: unit %d", lease.number, lease.task.unit, extra=about(lease))
            self._keep(lease, answer, on_receipt)
            self._handle(LeaseDone(lease.number))

    def _keep(self, lease: Lease, answer: Any, on_receipt: Callable[[Receipt], None]) -> None:
        task = lease.task
        if task.kind is Kind.TEXT and task.rows is not None:
            self._parts.setdefault(task.unit, {})[task.rows.start] = answer
        elif task.kind in {Kind.WHOLE, Kind.FINISH}:
            self._parts.pop(task.unit, None)
            self._count_double(task.unit, is_ours=answer.is_ours)
            if task.unit not in self.state.stored:  # the second of two leases of one unit has nothing new to say
                _record_receipt(answer, lease.replica)
                on_receipt(answer)

    def _count_double(self, unit: int, *, is_ours: bool) -> None:
        """Also if the ledger has told meanwhile that the unit is there; but of two leases of this run, one comes second."""
        if is_ours:
            self._ours.add(unit)
            self.double.discard(unit)
        elif unit not in self._ours:
            self.double.add(unit)

    def _failure(self, lease: Lease, error: RayTaskError) -> LeaseFailed:
        """Raises what ends the run: wrong data, a defect, or anything unknown before a single unit has succeeded."""
        cause = error.cause
        record(RETRIES, 1, replica=str(lease.replica), reason="failed")
        if isinstance(cause, RetryableError):
            log.warning("unit %d on replica %d: %s; it will be done again", lease.task.unit, lease.replica, cause, extra=about(lease))
            return LeaseFailed(lease.number, str(cause), is_fault=isinstance(cause, LostError))
        if isinstance(cause, PersonaRayError) or not self.state.has_succeeded:
            raise at_work(error) from error
        reason = f"{type(cause).__name__}: {_first_line(cause)}"
        log.warning("unit %d on replica %d: %s; it will be done again", lease.task.unit, lease.replica, reason, extra=about(lease))
        return LeaseFailed(lease.number, reason, is_fault=True)

    def _lost(self, replica: int, reason: str) -> None:
        is_fault = self.fleet.has_place(replica)
        held = sorted({self.state.leases[number].task.unit for number in self.state.replicas.get(replica, ())})
        struck = f"units {', '.join(map(str, held))} were under way" if held else "nothing was under way"
        why = reason if is_fault else "a node of it is gone"
        self._last_loss = reason
        log.warning(
            "replica %d was lost (%s); %s; it is being started again", replica, why, struck, extra={"replica": replica, "units": held}
        )
        self._record_restart(replica, "lost")
        self._forget(replica)
        self._probe_later(replica)
        self._handle(ReplicaLost(replica, reason, is_fault=is_fault))

    def _record_restart(self, replica: int, reason: str) -> None:
        """To be called before it is forgotten what the replica held."""
        num_held = sum(lease.replica == replica for lease in self._leases.values())
        record(RESTARTS, 1, replica=str(replica), reason=reason)
        record(RETRIES, num_held, replica=str(replica), reason=reason)


def about(lease: Lease) -> dict[str, Any]:
    """What a log record of the lease is about."""
    return {"lease": lease.number, "replica": lease.replica, "unit": lease.task.unit, "kind": lease.task.kind.value}


def _record_receipt(receipt: Receipt, replica: int) -> None:
    """Of units that are this run's own: those of two runs on one store add up to what it holds."""
    if not receipt.is_ours:
        return
    name = str(replica)
    record(UNITS, 1, replica=name)
    record(UNIT_SECONDS, receipt.seconds, replica=name)
    record(ROWS, receipt.num_stored, replica=name, outcome="stored")
    record(ROWS, receipt.num_refused, replica=name, outcome="refused")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def at_work(error: RayTaskError) -> Exception:
    """What a worker raised, as itself, without the remote traceback in its text. Work has begun, so nothing is wrong input any more."""
    cause = error.cause
    if isinstance(cause, InputError):
        return IntegrityError(str(cause))
    return cause if isinstance(cause, PersonaRayError) else error
