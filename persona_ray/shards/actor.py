"""The thin Ray skin: a stage as an actor, and a replica as the actor that owns its stages.

A replica does whole units by itself: what it computes goes to the store, and only a receipt goes back. Its stage actors
are its children, so a lost replica leaves nothing behind. Constructors do nothing that can fail: loading happens in
`ready`, whose errors keep their type on the way to the caller.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal, Protocol, Self

import numpy.typing as npt
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from persona_ray.errors import InputError, PersonaRayError, RetryableError
from persona_ray.shards.engine import ShardEngine
from persona_ray.shards.stage import DecodeStep, Stage, StageSpec
from persona_ray.spec import Edit, Engine, Float32, Float64, Generated, GenerationRequest, Int32, ProgressCallback, Receipt, Sampling, Unit

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
RESTART_DEADLINE_S = 60.0
"""A lost actor process is back within this time, or the replica is given up for this unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """Everything that an actor needs to become a replica. Picklable."""

    stages: tuple[StageSpec, ...]
    batch_tokens: int
    stop_ids: tuple[int, ...]
    gpus_per_shard: float
    accelerator: str | None
    concurrent_units: int
    """Units under way at once, so that every stage has work."""

    @property
    def num_captured(self) -> int:
        """Layers in a row of activations."""
        return len(self.stages[0].captured)


EditedBatch = tuple[Sequence[GenerationRequest], Sequence[Edit]]
"""Requests, and the edits under which all of them are answered."""


class UnitWork(Protocol):
    """What a replica does with a unit."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        """Rollouts, activations, commit."""
        ...


class _StageActor:
    """A stage in its own process."""

    def __init__(self, spec: StageSpec, num_threads: int) -> None:
        self._spec, self._num_threads = spec, num_threads
        self._stage: Stage | None = None

    def ready(self) -> str:
        """Load, unless that was done; answers the hardware's name."""
        if self._stage is None:
            self._stage = Stage(self._spec, self._num_threads)
        return self._stage.hardware

    def capture(self, x: npt.NDArray[Any], start_B: Int32, end_B: Int32) -> tuple[npt.NDArray[Any], Float32]:
        return self._loaded().capture(x, start_B, end_B)

    def decode(
        self, step: DecodeStep, x: npt.NDArray[Any], uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]
    ) -> npt.NDArray[Any]:
        return self._loaded().decode(step, x, uniform_B, sampling, edits)

    def drop(self, batch: str) -> None:
        if self._stage is not None:
            self._stage.drop(batch)

    def _loaded(self) -> Stage:
        if self._stage is None:
            raise RetryableError(
                f"stage of layers [{self._spec.first_layer}, {self._spec.end_layer}) was restarted and holds no weights yet"
            )
        return self._stage


class _RayLink:
    """A stage behind an actor handle; futures are object refs, and hidden states go from actor to actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def capture(self, x: object, start_B: Int32, end_B: Int32) -> tuple[object, object]:
        hidden, mean = self._handle.capture.options(num_returns=2).remote(x, start_B, end_B)
        return hidden, mean

    def decode(self, step: DecodeStep, x: object, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> object:
        return self._handle.decode.remote(step, x, uniform_B, sampling, edits)

    def drop(self, batch: str) -> None:
        self._handle.drop.remote(batch)

    def result(self, future: object) -> Any:
        return _get(future)


def _get(future: object) -> Any:
    """`ray.get`, with a lost process or object as RetryableError, and our own errors as themselves."""
    try:
        return ray.get(future)  # type: ignore[call-overload]
    except (RayActorError, ObjectLostError) as error:
        raise RetryableError(f"a shard was lost: {str(error).strip().splitlines()[0]}") from error
    except RayTaskError as error:
        if isinstance(error.cause, PersonaRayError):
            raise error.cause from error
        raise


class _ReplicaActor:
    """All stages of one copy of the model, and the hand that feeds them."""

    def __init__(self, spec: ReplicaSpec, work: UnitWork) -> None:
        self._spec, self._work = spec, work
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": spec.gpus_per_shard, "max_restarts": -1, "max_task_retries": 0}
        if spec.accelerator is not None:
            options["accelerator_type"] = spec.accelerator
        actor: Any = ray.remote(_StageActor).options(**options)
        num_threads = max(1, (os.cpu_count() or 1) // len(spec.stages)) if spec.gpus_per_shard == 0 else 1
        self._stages = [actor.remote(stage, num_threads) for stage in spec.stages]
        self._engine: ShardEngine | None = None

    def ready(self) -> Mapping[str, Any]:
        """Wait until every stage has its weights; answers how this replica computes. Comes back after a restart of a stage, too."""
        hardware = self._load()
        made = {
            "hardware": hardware[0] if len(set(hardware)) == 1 else ", ".join(hardware),
            "attention": self._spec.stages[0].attention,
            "stages": len(hardware),
            "versions": {name: version(name) for name in ("torch", "transformers", "ray")},
        }
        self._engine = ShardEngine(
            [_RayLink(handle) for handle in self._stages],
            num_captured=self._spec.num_captured,
            batch_tokens=self._spec.batch_tokens,
            stop_ids=self._spec.stop_ids,
            made=made,
        )
        return made

    def run(self, unit: Unit) -> Receipt:
        """The unit, from text to marker."""
        self.ready()
        return self._work(unit, self._ready_engine())

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit]) -> list[Generated]:
        """Answers outside of any unit, for the steering check."""
        self.ready()
        return self._ready_engine().generate(requests, sampling, edits)

    def _ready_engine(self) -> ShardEngine:
        if self._engine is None:
            raise RetryableError("the replica is not ready")
        return self._engine

    def _load(self) -> list[str]:
        deadline = time.monotonic() + RESTART_DEADLINE_S
        while True:
            try:
                return [str(_get(ref)) for ref in [stage.ready.remote() for stage in self._stages]]
            except RetryableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)  # the actor's process is being started again


class Replicas:
    """The copies of the model that one run uses. They start when they are first needed, and end with the `with` block."""

    def __init__(self, spec: ReplicaSpec, work: UnitWork, *, count: int | Literal["auto"], name: str) -> None:
        self._spec, self._work, self._count = spec, work, count
        self._name = f"{name}-{uuid.uuid4().hex[:8]}"
        self._handles: dict[int, Any] = {}

    def check(self) -> None:
        """Wait until one copy of the model is loaded. What is wrong with model or cluster comes out here, before anything is written."""
        _get(self.handles[0].ready.remote())

    @property
    def handles(self) -> Mapping[int, Any]:
        """Replica -> actor handle with `ready`, `run` and `generate`. Raises InputError if the cluster is too small for one."""
        if not self._handles:
            self._handles = {index: self._start(index) for index in range(self._number())}
        return self._handles

    def generate(self, batches: Sequence[EditedBatch], sampling: Sampling, advance: ProgressCallback) -> list[list[Generated]]:
        """For every batch of requests, under its edits, one answer each, in order; batches are under way at once on all replicas."""
        refs = [self._generate(number, batch, sampling) for number, batch in enumerate(batches)]
        answers: list[list[Generated]] = []
        for number, (batch, ref) in enumerate(zip(batches, refs, strict=True)):
            answers.append(self._answers(number, batch, sampling, ref))
            advance(len(answers[-1]))
        return answers

    def _generate(self, number: int, batch: EditedBatch, sampling: Sampling) -> Any:
        return self.handles[number % len(self.handles)].generate.remote(batch[0], sampling, batch[1])

    def _answers(self, number: int, batch: EditedBatch, sampling: Sampling, ref: Any) -> list[Generated]:
        """Asked again, of the next replica, after a passing fault: the answers are the same whoever gives them."""
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                return list(_get(ref))
            except RetryableError as error:
                log.warning("answers of batch %d: %s; asked again", number, error)
                ref = self._generate(number + attempt, batch, sampling)
        return list(_get(ref))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            ray.kill(handle)
        self._handles = {}

    def _number(self) -> int:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        accelerator = self._spec.accelerator
        if accelerator is not None and f"accelerator_type:{accelerator}" not in resources:
            known = sorted(name.partition(":")[2] for name in resources if name.startswith("accelerator_type:"))
            raise InputError(
                f"shards.accelerator: no node of the cluster has a {accelerator}; it has {', '.join(known) or 'no accelerators'}"
            )
        gpus_per_replica = self._spec.gpus_per_shard * len(self._spec.stages)
        if not gpus_per_replica:
            return 1 if self._count == "auto" else self._count
        fit = int(resources.get("GPU", 0) // gpus_per_replica)
        wanted = 1 if self._count == "auto" else self._count
        if fit < wanted:
            raise InputError(
                f"shards: {wanted} replicas of {gpus_per_replica:g} GPUs, the cluster has {resources.get('GPU', 0):g} GPUs. "
                "Use fewer shards, or shards.gpus_per_shard: 0 to run on CPU"
            )
        return fit if self._count == "auto" else self._count

    def _start(self, index: int) -> Any:
        """A replica reserves no CPU: its own share is small, and reduce tasks must not wait for it."""
        return (
            ray.remote(_ReplicaActor)
            .options(
                name=f"{self._name}-replica-{index}",
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=self._spec.concurrent_units + 1,
            )
            .remote(self._spec, self._work)
        )


def plan_stages(whole: StageSpec, cuts: Sequence[tuple[int, int]]) -> tuple[StageSpec, ...]:
    """`whole`, once for each layer range."""
    return tuple(replace(whole, first_layer=first, end_layer=end) for first, end in cuts)
