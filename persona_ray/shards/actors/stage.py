"""A stage, or one tensor-parallel rank of it, in its own process; and the links by which a replica reaches it.

Constructors do nothing that can fail: loading happens in `ready`, whose errors keep their type on the way to the caller.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_ray.errors import RetryableError
from persona_ray.shards.actors.calls import answer, answers
from persona_ray.shards.actors.process import Owner
from persona_ray.shards.plan import StageSpec
from persona_ray.shards.stage import DecodeStep, Hidden, Rank, Stage
from persona_ray.spec import Edit, Float32, Float64, Int32, Sampling

FAILURE_GRACE_S = 10.0
"""After one rank of a group failed, the others may take this long to fail, too, before they count as stuck."""


class StageActor:
    """A stage in its own process."""

    def __init__(self, spec: StageSpec, rank: int, hands_on_tensors: bool, stage: int, owner: Owner | None) -> None:
        """`stage`: its number in the replica that owns it."""
        if owner is not None:
            owner.sign(stage=stage, rank=rank)
        self._spec, self._rank, self._hands_on_tensors = spec, rank, hands_on_tensors
        self._stage: Stage | None = None
        self._kept: dict[int, Float32 | Exception] = {}

    def free_port(self) -> int:
        """Of this node, for the ranks of a stage to meet at."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    def ready(self, port: int | None) -> str:
        """Load, unless that was done; answers the hardware's name."""
        if self._stage is None:
            rank = None if port is None else Rank(self._rank, port)
            self._stage = Stage(self._spec, rank=rank, hands_on_tensors=self._hands_on_tensors)
        return self._stage.hardware

    def capture(self, x: Hidden, start_B: Int32, end_B: Int32) -> tuple[Hidden | None, Float32 | None]:
        """See Stage. All ranks of a stage come to the same result; the first one tells it."""
        hidden_BTD, means_LBD = self._loaded().capture(x, start_B, end_B)
        return (hidden_BTD, means_LBD) if self._rank == 0 else (None, None)

    def capture_and_keep(self, ticket: int, x: Hidden, start_B: Int32, end_B: Int32) -> Hidden | None:
        """Hidden states alone, for a direct transport, which knows single values only; the means wait for `take_means`."""
        try:
            hidden_BTD, self._kept[ticket] = self._loaded().capture(x, start_B, end_B)
        except Exception as error:
            self._kept[ticket] = error
            raise
        return hidden_BTD

    def take_means(self, ticket: int) -> Float32:
        """What `capture_and_keep` kept, or the error it ended with; RetryableError if it never came to it."""
        kept = self._kept.pop(ticket, None)
        if isinstance(kept, Exception):
            raise kept
        if kept is None:
            raise RetryableError(f"{self._spec.name}: the batch was not captured")
        return kept

    def decode(self, step: DecodeStep, x: Hidden, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> Hidden | None:
        """See Stage."""
        output = self._loaded().decode(step, x, uniform_B, sampling, edits)
        return output if self._rank == 0 else None

    def drop(self, batch: str) -> None:
        """See Stage."""
        if self._stage is not None:
            self._stage.drop(batch)

    def usage(self) -> Mapping[str, float]:
        """See Stage."""
        return self._loaded().usage()

    def _loaded(self) -> Stage:
        if self._stage is None:
            raise RetryableError(f"{self._spec.name} was restarted and holds no weights yet")
        return self._stage


class ObjectLink:
    """A stage of one process. Hidden states go from actor to actor through Ray's object store, and outlive who made them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def capture(self, x: object, start_B: Int32, end_B: Int32) -> tuple[object, object]:
        """See StageLink."""
        hidden, means = self._handle.capture.options(num_returns=2).remote(x, start_B, end_B)
        return hidden, means

    def decode(self, step: DecodeStep, x: object, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> object:
        """See StageLink."""
        return self._handle.decode.remote(step, x, uniform_B, sampling, edits)

    def drop(self, batch: str) -> None:
        """See StageLink."""
        self._handle.drop.remote(batch)

    def result(self, future: object) -> Any:
        """See StageLink."""
        return answer(future)

    def usage(self) -> list[Mapping[str, float]]:
        """See StageLink."""
        return [answer(self._handle.usage.remote())]


class DirectLink(ObjectLink):
    """A stage of one process that hands its hidden states straight to the next one, by Ray's gloo or NCCL transport."""

    def __init__(self, handle: Any, transport: str, *, hands_on: bool) -> None:
        """`hands_on`: whether capture goes on in the next stage."""
        super().__init__(handle)
        self._transport, self._hands_on = transport, hands_on
        self._ticket = 0
        self._submitting = threading.Lock()

    def capture(self, x: object, start_B: Int32, end_B: Int32) -> tuple[object, object]:
        """See StageLink."""
        if not self._hands_on:
            return super().capture(x, start_B, end_B)
        with self._submitting:
            self._ticket += 1
            ticket = self._ticket
        hidden = self._handle.capture_and_keep.options(tensor_transport=self._transport).remote(ticket, x, start_B, end_B)
        return hidden, _Kept(hidden, self._handle.take_means.remote(ticket))

    def decode(self, step: DecodeStep, x: object, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> object:
        """See StageLink."""
        return self._handle.decode.options(tensor_transport=self._transport).remote(step, x, uniform_B, sampling, edits)

    def result(self, future: object) -> Any:
        """See StageLink."""
        return answer(future.means) if isinstance(future, _Kept) else answer(future)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Means that wait in their actor; the hidden states stay alive as long."""

    hidden: object
    means: object


class GroupLink:
    """The tensor-parallel ranks of one stage: all get the same calls in the same order, and the first one's results count."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = tuple(handles)
        self._submitting = threading.Lock()

    def capture(self, x: object, start_B: Int32, end_B: Int32) -> tuple[object, object]:
        """See StageLink."""
        with self._submitting:
            pairs = [handle.capture.options(num_returns=2).remote(_first(x), start_B, end_B) for handle in self._handles]
        hidden, means = zip(*pairs, strict=True)
        return _Group(hidden, ()), _Group(means, ())

    def decode(self, step: DecodeStep, x: object, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> object:
        """See StageLink."""
        with self._submitting:
            futures = tuple(handle.decode.remote(step, _first(x), uniform_B, sampling, edits) for handle in self._handles)
        return _Group(futures, (*x.earlier, *x.futures) if isinstance(x, _Group) else ())

    def drop(self, batch: str) -> None:
        """See StageLink."""
        with self._submitting:
            for handle in self._handles:
                handle.drop.remote(batch)

    def result(self, future: object) -> Any:
        """See StageLink."""
        if not isinstance(future, _Group):
            return answer(future)
        return answers((*future.futures, *future.earlier), FAILURE_GRACE_S)[0]

    def usage(self) -> list[Mapping[str, float]]:
        """See StageLink."""
        return [answer(handle.usage.remote()) for handle in self._handles]


@dataclass(frozen=True, slots=True)
class _Group:
    """One future of each rank."""

    futures: tuple[Any, ...]
    earlier: tuple[Any, ...]
    """Those of the stages before, watched as well: a rank that fails there leaves this stage waiting for ever."""


def _first(x: object) -> object:
    """What goes on to the next stage."""
    return x.futures[0] if isinstance(x, _Group) else x
