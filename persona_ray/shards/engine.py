"""One replica of the model, seen from outside: generate and capture over a chain of stages.

Knows batches and the order of calls; not how a stage is reached. A `StageLink` hides that: its calls return futures at
once, so that several batches are under way and every stage has work.
"""

from __future__ import annotations

import itertools
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from persona_ray.errors import IntegrityError
from persona_ray.shards.sampling import uniform_stream
from persona_ray.shards.stage import DecodeStep, Stage
from persona_ray.spec import Edit, FinishReason, Float32, Float64, Generated, GenerationRequest, Int32, Sampling, Spans

Array = npt.NDArray[Any]
PAD_ID = 0
"""Any id will do where attention never looks."""


class StageLink(Protocol):
    """A stage as its engine sees it. What `x` is given may be the future that another link returned."""

    def capture(self, x: object, start_B: Int32, end_B: Int32) -> tuple[object, object]:
        """Futures of `Stage.capture`'s hidden states and means."""
        ...

    def decode(self, step: DecodeStep, x: object, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> object:
        """Future of `Stage.decode`."""
        ...

    def drop(self, batch: str) -> None:
        """Free the batch's KV cache; not waited for."""
        ...

    def result(self, future: object) -> Any:
        """Wait. Raises RetryableError if the stage was lost."""
        ...


class LocalLink:
    """A stage in this very process; futures are values."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def capture(self, x: Any, start_B: Int32, end_B: Int32) -> tuple[object, object]:
        """See StageLink."""
        return self.stage.capture(x, start_B, end_B)

    def decode(self, step: DecodeStep, x: Any, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> object:
        """See StageLink."""
        return self.stage.decode(step, x, uniform_B, sampling, edits)

    def drop(self, batch: str) -> None:
        """See StageLink."""
        self.stage.drop(batch)

    def result(self, future: object) -> Any:
        """See StageLink."""
        return future


def batches_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[tuple[int, ...]]:
    """Positions in batches of similar length, shortest first, at most `token_budget` padded tokens each (a single row may exceed it).

    A pure function of the lengths: equal units are batched equally, whoever computes them and whenever.
    """
    order = sorted(range(len(lengths)), key=lambda position: (lengths[position], position))
    batch: list[int] = []
    for position in order:
        if batch and lengths[position] * (len(batch) + 1) > token_budget:
            yield tuple(batch)
            batch = []
        batch.append(position)
    if batch:
        yield tuple(batch)


class ShardEngine:
    """A replica over its stages, in layer order. Implements `spec.Engine`. Safe to use from several threads at once."""

    def __init__(
        self, links: Sequence[StageLink], *, num_captured: int, batch_tokens: int, stop_ids: Sequence[int], made: Mapping[str, Any]
    ) -> None:
        self._links = tuple(links)
        self._num_captured = num_captured
        self._batch_tokens = batch_tokens
        self._stop_ids = np.asarray(sorted(stop_ids), np.int64)
        self.made = made

    # ---- capture ----

    def capture(self, rollouts: Sequence[Spans]) -> Float32:
        """Mean over the span of each captured decoder block's output: (len(rollouts), L, D), float32.

        Raises IntegrityError if a layer is missing, all zero or was not really computed: wrong numbers are never handed on.
        """
        in_flight: deque[tuple[tuple[int, ...], list[tuple[StageLink, object]]]] = deque()
        means_BLD: dict[int, Float32] = {}
        for positions in batches_by_length([len(r.token_ids) for r in rollouts], self._batch_tokens):
            in_flight.append((positions, self._submit_capture([rollouts[i] for i in positions])))
            if len(in_flight) > len(self._links) + 1:
                means_BLD.update(self._collect(*in_flight.popleft()))
        while in_flight:
            means_BLD.update(self._collect(*in_flight.popleft()))
        return np.stack([means_BLD[i] for i in range(len(rollouts))])

    def _submit_capture(self, rollouts: Sequence[Spans]) -> list[tuple[StageLink, object]]:
        start_B = np.array([r.start for r in rollouts], np.int32)
        end_B = np.array([r.end for r in rollouts], np.int32)
        x: object = pad_right([r.token_ids for r in rollouts])
        means = []
        for link in self._links:
            x, mean_LBD = link.capture(x, start_B, end_B)
            means.append((link, mean_LBD))
        return means

    def _collect(self, positions: tuple[int, ...], futures: list[tuple[StageLink, object]]) -> dict[int, Float32]:
        mean_LBD = np.concatenate([link.result(future) for link, future in futures])
        check_captured(mean_LBD, self._num_captured)
        return {position: mean_LBD[:, b] for b, position in enumerate(positions)}

    # ---- generation ----

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit] = ()) -> list[Generated]:
        """One answer for every request, in order."""
        answers: dict[int, Generated] = {}
        lengths = [len(request.prompt_ids) + sampling.max_new_tokens for request in requests]
        for positions in batches_by_length(lengths, self._batch_tokens):
            batch = self._generate_batch([requests[i] for i in positions], sampling, edits)
            answers.update(zip(positions, batch, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _generate_batch(self, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit]) -> list[Generated]:
        batch = uuid.uuid4().hex
        try:
            return self._decode_to_end(batch, requests, sampling, edits)
        finally:
            for link in self._links:
                link.drop(batch)

    def _decode_to_end(
        self, batch: str, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit]
    ) -> list[Generated]:
        prompt_BT, pad_B = pad_left([request.prompt_ids for request in requests])
        uniform_BS = np.stack([uniform_stream(sampling.seed, request.stream, sampling.max_new_tokens) for request in requests])
        answers: list[list[int]] = [[] for _ in requests]
        reasons = [FinishReason.LENGTH] * len(requests)
        going = np.arange(len(requests))
        keep: tuple[int, ...] | None = None
        x: Array = prompt_BT
        past_length = 0
        for step in range(sampling.max_new_tokens):
            token_B = self._decode(DecodeStep(batch, past_length, pad_B[going], keep), x, uniform_BS[going, step], sampling, edits)
            past_length += x.shape[1]
            stopped_B = np.isin(token_B, self._stop_ids)
            for sequence, token, stopped in zip(going, token_B, stopped_B, strict=True):
                if stopped:
                    reasons[sequence] = FinishReason.STOP
                else:
                    answers[sequence].append(int(token))
            if stopped_B.all():
                break
            # Finished sequences leave the batch: their cache is dropped and the others go on with less work.
            keep = tuple(int(b) for b in np.flatnonzero(~stopped_B)) if stopped_B.any() else None
            going, x = going[~stopped_B], token_B[~stopped_B, None]
        return [Generated(np.asarray(ids, np.int32), reason) for ids, reason in zip(answers, reasons, strict=True)]

    def _decode(self, step: DecodeStep, x: object, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> Array:
        link = self._links[0]
        for link in self._links:
            x = link.decode(step, x, uniform_B, sampling, edits)
        return np.asarray(link.result(x))


def pad_right(sequences: Sequence[Int32]) -> Int32:
    """(B, T) token ids, int32, short rows filled with PAD_ID at the end."""
    padded_BT = np.full((len(sequences), max(map(len, sequences))), PAD_ID, np.int32)
    for row, ids in zip(padded_BT, sequences, strict=True):
        row[: len(ids)] = ids
    return padded_BT


def pad_left(sequences: Sequence[Int32]) -> tuple[Int32, Int32]:
    """(B, T) token ids with PAD_ID in front, and the number of pads of each row (B,), both int32."""
    padded_BT = np.full((len(sequences), max(map(len, sequences))), PAD_ID, np.int32)
    for row, ids in zip(padded_BT, sequences, strict=True):
        row[len(row) - len(ids) :] = ids
    return padded_BT, np.array([padded_BT.shape[1] - len(ids) for ids in sequences], np.int32)


def check_captured(mean_LBD: Float32, num_captured: int) -> None:
    """Guards against a missing, all-zero or wrongly hooked layer. Raises IntegrityError naming the layer's place."""
    if mean_LBD.shape[0] != num_captured:
        raise IntegrityError(f"capture returned {mean_LBD.shape[0]} layers, {num_captured} were asked for: a hook did not fire")
    for place, mean_BD in enumerate(mean_LBD):
        if not mean_BD.any():
            raise IntegrityError(f"captured layer number {place} is all zero: it was not computed on this shard")
    for place, (before_BD, after_BD) in enumerate(itertools.pairwise(mean_LBD)):
        if np.array_equal(before_BD, after_BD):
            raise IntegrityError(
                f"captured layers number {place} and {place + 1} are equal: a hook sits on a block that was passed through"
            )
