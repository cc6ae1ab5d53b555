"""The copies of the model that one run uses: as many as were asked for, or as the cluster holds, now and when it grows."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Self

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from persona_ray.errors import RetryableError
from persona_ray.shards.actors.calls import answer
from persona_ray.shards.actors.placement import (
    draining_nodes,
    in_words,
    is_placed,
    nodes_of,
    place_in,
    require_hope,
    require_room,
    reserve,
    shard_options,
    stands,
)
from persona_ray.shards.actors.process import Owner
from persona_ray.shards.actors.replica import ReplicaActor, UnitWork
from persona_ray.shards.plan import ReplicaSpec
from persona_ray.shards.prices import devices_of
from persona_ray.spec import Edit, Generated, GenerationRequest, ProgressCallback, Sampling

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
SILENCE_S = 10.0
"""After which somebody who waits for a place is told for what."""

EditedBatch = tuple[Sequence[GenerationRequest], Sequence[Edit]]
"""Requests, and the edits under which all of them are answered."""


class Replicas:
    """Replicas that start when their place on the cluster is there, and end with the `with` block.

    Without a fixed number one more place is always asked for, so that a run takes what becomes free and what joins.
    """

    def __init__(self, spec: ReplicaSpec, work: UnitWork, *, count: int | Literal["auto"], name: str) -> None:
        self._spec, self._work = spec, work
        # On CPUs `auto` is one: how many the cores would carry says nothing about how fast they would be.
        self._count = 1 if count == "auto" and not spec.gpus_per_shard else count
        self._run, self._name = name, f"{name}-{uuid.uuid4().hex[:8]}"
        self._handles: dict[int, Any] = {}
        self._asked_for: dict[int, PlacementGroup] = {}
        """Replica -> its place, there or not."""
        self._retired: set[int] = set()
        self._placed_s: dict[int, float] = {}
        """Replica -> when it got its place, on this process's clock."""
        self._spent_s = 0.0
        """Seconds for which the places that were given back were held."""

    @property
    def device_hours(self) -> float:
        """So far: hours of every GPU (on CPU: of every shard) from when its replica got a place until it gave it back.

        Loading counts. So does the time in which a replica whose node was lost waits for another place.
        """
        now_s = time.monotonic()
        held_s = self._spent_s + sum(now_s - placed_s for placed_s in self._placed_s.values())
        return held_s / 3600 * devices_of(self._spec.gpus_per_shard, self._spec.num_shards)

    @property
    def handles(self) -> Mapping[int, Any]:
        """Replica -> actor handle with `ready`, `run` and `generate`, of all that have their place."""
        return self._handles

    @property
    def waits_for(self) -> str | None:
        """What the next replica lacks, in words; None if all are placed."""
        return None if len(self._handles) == len(self._asked_for) else in_words(self._spec)

    @property
    def draining(self) -> Collection[int]:
        """Replicas on nodes that will be taken away: the cloud has said so, and Ray was told."""
        nodes = draining_nodes()
        return [replica for replica in self._handles if nodes and nodes.intersection(nodes_of(self._asked_for[replica]))]

    def has_place(self, replica: int) -> bool:
        """False: a node of the replica is gone, and its place with it."""
        return replica in self._asked_for and stands(self._asked_for[replica])

    def restart(self, replica: int) -> None:
        """End its process; Ray starts it again."""
        ray.kill(self._handles[replica], no_restart=False)

    def retire(self, replica: int) -> None:
        """End its process for good, and give its place back."""
        ray.kill(self._handles[replica])
        remove_placement_group(self._asked_for[replica])
        self._retired.add(replica)
        self._spent_s += time.monotonic() - self._placed_s.pop(replica)

    def check(self) -> None:
        """Wait until one copy of the model is loaded. What is wrong with model or cluster comes out here, before anything is written.

        Raises InputError if the cluster is too small.
        """
        self.require_one()
        answer(next(iter(self._handles.values())).ready.remote())

    def require_one(self) -> None:
        """Wait until one replica has its place. Raises InputError if the cluster is too small."""
        if not self._asked_for:
            require_room(self._spec, 1 if self._count == "auto" else self._count)
        told = time.monotonic()
        while not self._handles:
            self.look_around()
            if not self._handles and time.monotonic() - told > SILENCE_S:
                require_hope(self._spec, self._asked_for[0])
                log.warning("%s", self.waits_for)
                told = time.monotonic()
            if not self._handles:
                time.sleep(0.1)

    def look_around(self) -> None:
        """Start the replicas whose place has come, and ask for more places if more are wanted. Never waits."""
        for index, place in self._asked_for.items():
            if index not in self._handles and is_placed(place):
                self._handles[index] = self._start(index, place)
                self._placed_s[index] = time.monotonic()
        while len(self._asked_for) < (len(self._handles) + 1 if self._count == "auto" else self._count):
            index = len(self._asked_for)
            self._asked_for[index] = reserve(self._spec, f"{self._name}-replica-{index}")

    def generate(self, batches: Sequence[EditedBatch], sampling: Sampling, advance: ProgressCallback) -> list[list[Generated]]:
        """For every batch of requests, under its edits, one answer each, in order; batches are under way at once on all replicas."""
        self.require_one()
        refs = [self._generate(number, batch, sampling) for number, batch in enumerate(batches)]
        answers: list[list[Generated]] = []
        for number, (batch, ref) in enumerate(zip(batches, refs, strict=True)):
            answers.append(self._answers(number, batch, sampling, ref))
            advance(len(answers[-1]))
        return answers

    def _generate(self, number: int, batch: EditedBatch, sampling: Sampling) -> Any:
        handles = [handle for replica, handle in self._handles.items() if replica not in self._retired]
        return handles[number % len(handles)].generate.remote(batch[0], sampling, batch[1])

    def _answers(self, number: int, batch: EditedBatch, sampling: Sampling, ref: Any) -> list[Generated]:
        """Asked again, of the next replica, after a passing fault: the answers are the same whoever gives them."""
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                return list(answer(ref))
            except RetryableError as error:
                log.warning("answers of batch %d: %s; asked again", number, error)
                ref = self._generate(number + attempt, batch, sampling)
        return list(answer(ref))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for replica in self._asked_for.keys() - self._retired:
            if replica in self._handles:
                ray.kill(self._handles[replica])
            remove_placement_group(self._asked_for[replica])
        self._spent_s += sum(time.monotonic() - placed_s for placed_s in self._placed_s.values())
        self._handles, self._asked_for, self._placed_s = {}, {}, {}

    def _start(self, index: int, place: PlacementGroup) -> Any:
        """A replica of one process holds its shard itself; any other reserves nothing, its own share is small."""
        name = f"{self._name}-replica-{index}"
        options = {
            "name": name,
            **place_in(place, 0),
            **(shard_options(self._spec) if self._spec.is_one_process else {"num_cpus": 0}),
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": self._spec.concurrent_units + 1,
        }
        return ray.remote(ReplicaActor).options(**options).remote(self._spec, self._work, name, place, Owner(self._run, index))
