"""A replica: the actor that owns all shards of one copy of the model, and feeds them.

It does whole units by itself: what it computes goes to the store, and only a receipt goes back. Its shards are its
children, so a lost replica leaves nothing behind; a lost shard is started again by the replica, in the same place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any, Protocol, cast

import ray
from ray.experimental.collective import create_collective_group, destroy_collective_group
from ray.util.placement_group import PlacementGroup

from persona_ray.errors import RetryableError
from persona_ray.logs import at_work
from persona_ray.shards.actors.calls import answers
from persona_ray.shards.actors.placement import place_in, shard_options
from persona_ray.shards.actors.process import Owner
from persona_ray.shards.actors.stage import FAILURE_GRACE_S, DirectLink, GroupLink, ObjectLink, StageActor
from persona_ray.shards.engine import ShardEngine
from persona_ray.shards.link import LocalLink, StageLink
from persona_ray.shards.plan import ReplicaSpec
from persona_ray.shards.stage import Stage
from persona_ray.spec import Edit, Engine, Generated, GenerationRequest, Receipt, Rollout, Sampling, Unit

log = logging.getLogger(__name__)

RESTART_DEADLINE_S = 60.0
"""Lost shards are back within this time, or the replica is given up for this unit."""


class UnitWork(Protocol):
    """What a replica does with a unit."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        """Rollouts, activations, commit."""
        ...


class SplitWork(UnitWork, Protocol):
    """Work that can be done in parts."""

    def text(self, unit: Unit, engine: Engine) -> tuple[Rollout, ...]:
        """Rollouts of the unit's rows, which may be some of them only. Nothing is written."""
        ...

    def finish(self, unit: Unit, engine: Engine, rollouts: Sequence[Rollout]) -> Receipt:
        """Activations and commit."""
        ...

    def trial(self, unit: Unit, engine: Engine) -> None:
        """Rollouts and activations of the unit's rows, which may be some of them only. Nothing is kept."""
        ...


class ReplicaActor:
    """All shards of one copy of the model, and the hand that feeds them. A single shard lives in this very process."""

    def __init__(self, spec: ReplicaSpec, work: UnitWork, name: str, place: PlacementGroup, owner: Owner | None = None) -> None:
        """`owner`: for metrics and logs; None: it keeps silent."""
        if owner is not None:
            owner.sign()
        self._spec, self._work = spec, work
        self._shards = _LocalShard(spec) if spec.is_one_process else _Shards(spec, name, place, owner)
        self._engine: ShardEngine | None = None
        self._is_suspect = False
        """Something failed that a lost shard may be behind: look after all of them before the next unit."""
        self._loading = threading.Lock()

    def ready(self) -> Mapping[str, Any]:
        """Wait until every shard has its weights; answers how this replica computes. Comes back after the loss of a shard, too."""
        with self._loading:
            self._is_suspect = False
            hardware, links = self._shards.ready()
            made = {
                "hardware": hardware[0] if len(set(hardware)) == 1 else ", ".join(hardware),
                "attention": self._spec.stages[0].attention,
                "stages": len(self._spec.stages),
                "tensor_parallel": self._spec.tensor_parallel,
                "concurrent_units": self._spec.concurrent_units,
                "versions": {name: version(name) for name in ("torch", "transformers", "ray")},
            }
            if self._engine is None or not self._engine.runs_on(links):
                self._engine = ShardEngine(links, self._spec, made)
            return made

    def run(self, unit: Unit) -> Receipt:
        """The unit, from text to marker."""
        with self._working(unit, "whole") as engine:
            return self._work(unit, engine)

    def text(self, unit: Unit) -> tuple[Rollout, ...]:
        """Of a part of a unit."""
        with self._working(unit, "text") as engine:
            return cast("SplitWork", self._work).text(unit, engine)

    def finish(self, unit: Unit, rollouts: Sequence[Rollout]) -> Receipt:
        """The unit, from its rollouts to the marker."""
        with self._working(unit, "finish") as engine:
            return cast("SplitWork", self._work).finish(unit, engine, rollouts)

    def trial(self, unit: Unit) -> None:
        """Do these rows bring the replica down?"""
        with self._working(unit, "trial") as engine:
            cast("SplitWork", self._work).trial(unit, engine)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit]) -> list[Generated]:
        """Answers outside of any unit, for the steering check."""
        with self._suspicion() as engine:
            return engine.generate(requests, sampling, edits)

    def usage(self) -> list[list[Mapping[str, float]]]:
        """What the processes of each stage took so far."""
        return self._ready_engine().usage()

    @contextmanager
    def _working(self, unit: Unit, kind: str) -> Iterator[ShardEngine]:
        """The engine, for a unit; what is logged meanwhile says for which one."""
        began = time.monotonic()
        with at_work(unit=unit.index, kind=kind), self._suspicion() as engine:
            yield engine
            log.info("%d rows done in %.1f s", len(unit.rows), time.monotonic() - began)

    @contextmanager
    def _suspicion(self) -> Iterator[ShardEngine]:
        """The engine, with its shards in place. Asking them costs a turn in their queues, so it is done after a fault only."""
        if self._engine is None or self._is_suspect:
            self.ready()
        try:
            yield self._ready_engine()
        except RetryableError:
            self._is_suspect = True
            raise

    def _ready_engine(self) -> ShardEngine:
        if self._engine is None:
            raise RetryableError("the replica is not ready")
        return self._engine


class _LocalShard:
    """The whole model in this process."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._link: LocalLink | None = None

    def ready(self) -> tuple[list[str], Sequence[StageLink]]:
        """Hardware, and the link."""
        if self._link is None:
            self._link = LocalLink(Stage(self._spec.stages[0], hands_on_tensors=True))
        return [self._link.stage.hardware], [self._link]


class _Shards:
    """The shards of a replica in actors of their own: started, loaded, and started again when one is lost."""

    def __init__(self, spec: ReplicaSpec, name: str, place: PlacementGroup, owner: Owner | None) -> None:
        self._spec, self._name, self._place, self._owner = spec, name, place, owner
        self._handles: dict[int, list[Any]] = {}
        """Stage -> its ranks."""
        self._ports: dict[int, int] = {}
        """Stage -> where its ranks meet."""
        self._links: list[StageLink] = []
        self._communicator: Any = None
        self._num_started = 0

    @property
    def _is_direct(self) -> bool:
        return self._spec.transport != "object-store"

    @property
    def _fate_is_shared(self) -> bool:
        """Ranks, and stages that are directly connected, cannot go on with a new neighbour."""
        return self._is_direct or self._spec.tensor_parallel > 1

    def ready(self) -> tuple[list[str], Sequence[StageLink]]:
        """Hardware of all shards, and the links to the stages. Raises what loading raised; RetryableError if shards stay away."""
        deadline = time.monotonic() + RESTART_DEADLINE_S
        while True:
            try:
                hardware = [name for stage in self._loading() for name in self._loaded(*stage)]
            except RetryableError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("%s: %s; starting it again", self._name, error)
                time.sleep(0.5)
            else:
                self._links = self._links or self._connect()
                return hardware, self._links

    def _loading(self) -> list[tuple[int, list[Any]]]:
        """Every stage with the futures of its ranks, which load at the same time."""
        for stage in range(len(self._spec.stages)):
            if stage not in self._handles:
                self._handles[stage] = self._start(stage)
        return [(stage, self._load(stage)) for stage in sorted(self._handles)]

    def _load(self, stage: int) -> list[Any]:
        ranks = self._handles[stage]
        if len(ranks) > 1 and stage not in self._ports:
            self._ports[stage] = self._or_end(stage, [ranks[0].free_port.remote()])[0]
        return [rank.ready.remote(self._ports.get(stage)) for rank in ranks]

    def _loaded(self, stage: int, loading: Sequence[Any]) -> list[str]:
        """Hardware of the stage's ranks."""
        return [str(name) for name in self._or_end(stage, loading)]

    def _or_end(self, stage: int, futures: Sequence[Any]) -> list[Any]:
        """Their answers. A stage that was lost, or failed, is ended; the next try starts it anew."""
        try:
            return answers(futures, FAILURE_GRACE_S)
        except Exception:
            self._end(list(self._handles) if self._fate_is_shared else [stage])
            raise

    def _start(self, stage: int) -> list[Any]:
        actor: Any = ray.remote(enable_tensor_transport=self._is_direct)(StageActor)  # type: ignore[call-overload]
        spec = self._spec
        options = {
            **shard_options(spec),
            **place_in(self._place, stage),
            "max_restarts": 0,
            "max_task_retries": 0,
            # Two batches at a time overlap one's way to the host with the other's computing; ranks, and direct neighbours, need one order.
            "max_concurrency": 1 if self._fate_is_shared else 2,
        }
        self._num_started += 1  # a name is free again only when its actor's end has come around
        return [
            actor.options(name=f"{self._name}-stage-{stage}-rank-{rank}-{self._num_started}", **options).remote(
                spec.stages[stage], rank, self._is_direct, stage, self._owner
            )
            for rank in range(spec.tensor_parallel)
        ]

    def _connect(self) -> list[StageLink]:
        stages = [ranks for _, ranks in sorted(self._handles.items())]
        if self._spec.tensor_parallel > 1:
            return [GroupLink(ranks) for ranks in stages]
        handles = [ranks[0] for ranks in stages]
        if not self._is_direct:
            return [ObjectLink(handle) for handle in handles]
        self._communicator = create_collective_group(handles, backend=self._spec.transport)
        return [
            ObjectLink(handle) if stage.has_head else DirectLink(handle, self._spec.transport, hands_on=not stage.ends_capture)
            for handle, stage in zip(handles, self._spec.stages, strict=True)
        ]

    def _end(self, stages: Sequence[int]) -> None:
        for stage in stages:
            self._ports.pop(stage, None)
            for rank in self._handles.pop(stage):
                ray.kill(rank)
        self._links = []
        if self._communicator is not None:
            with suppress(ValueError):  # after a failed transfer Ray has destroyed the group itself
                destroy_collective_group(self._communicator)
            self._communicator = None
