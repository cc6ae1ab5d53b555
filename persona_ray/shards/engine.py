"""One replica of the model, seen from outside: capture and generate over a chain of stages.

Knows batches and the order of calls, not how a stage is reached: a `StageLink` hides that. Several batches are under way at
once, so that every stage has work; how many is bounded for the whole replica, whoever asks, and asking for more waits.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from persona_ray.errors import IntegrityError, OutOfMemoryError
from persona_ray.metrics import BATCH_SECONDS, PADDING_TOKENS, TOKENS, record
from persona_ray.shards.batching import Positions, batches_by_length, pad_right, padded_tokens
from persona_ray.shards.decoding import Decoding
from persona_ray.shards.limits import Limit, Window
from persona_ray.shards.link import StageLink
from persona_ray.shards.plan import ReplicaSpec
from persona_ray.spec import Captured, Edit, Float32, Generated, GenerationRequest, Sampling, Spans

_Step = tuple[Positions, Decoding, object]
"""A batch that is being generated, and the future of its next tokens."""


class ShardEngine:
    """A replica over its stages, in layer order. Implements `spec.Engine`. Safe to use from several threads at once."""

    def __init__(self, links: Sequence[StageLink], spec: ReplicaSpec, made: Mapping[str, Any]) -> None:
        self._links = tuple(links)
        last = next(place for place, stage in enumerate(spec.stages) if stage.ends_capture)
        self._capture_links = self._links[: last + 1]
        self._spec = spec
        self._stop_ids = np.asarray(sorted(spec.stop_ids), np.int64)
        self.made = made
        self._capturing, self._decoding = Window(spec.in_flight), Window(spec.in_flight)
        # A forward over whole conversations and a key-value cache fit or do not fit for reasons of their own.
        self._capture_limit, self._decode_limit = Limit(), Limit()

    def runs_on(self, links: Sequence[StageLink]) -> bool:
        """Whether these are the stages that it feeds."""
        return len(links) == len(self._links) and all(one is other for one, other in zip(links, self._links, strict=True))

    def usage(self) -> list[list[Mapping[str, float]]]:
        """What the processes of each stage took so far."""
        return [link.usage() for link in self._links]

    # ---- capture ----

    def capture(self, rollouts: Sequence[Spans]) -> Captured:
        """Means over the spans of all rollouts, in order.

        Raises IntegrityError if a layer is missing, all zero or was not really computed: wrong numbers are never handed on.
        """
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        planned = batches_by_length(lengths, self._spec.batch_tokens)
        waiting = deque(self._capture_limit.applied(planned, lengths))
        in_flight: deque[tuple[Positions, list[tuple[StageLink, object]], float]] = deque()
        done: list[Positions] = []
        means_LD: dict[int, Float32] = {}
        with self._capturing.claims() as claim:
            while waiting or in_flight:
                if waiting and claim(len(in_flight)):
                    batch = waiting.popleft()
                    began = time.perf_counter()
                    in_flight.append((batch, self._submit_capture([rollouts[i] for i in batch]), began))
                    continue
                batch, futures, began = in_flight.popleft()
                try:
                    means_LD.update(self._collect(batch, futures))
                    done.append(batch)
                    _record("capture", "captured", [lengths[i] for i in batch], began)
                except OutOfMemoryError as error:
                    waiting.extendleft(reversed(self._capture_limit.halved(batch, lengths, error)))
        notes = () if set(done) == set(planned) else (f"out of memory: {len(planned)} batches were done as {len(done)}",)
        means_RLD = np.stack([means_LD[i] for i in range(len(rollouts))])
        return Captured(means_RLD, sum(padded_tokens(b, lengths) for b in done), notes, self._peak_device_bytes())

    def _peak_device_bytes(self) -> int | None:
        """Of the shard that took most. On CPUs nobody is asked: it costs a turn in the queue of every stage."""
        if self._spec.stages[0].device == "cpu":
            return None
        return max(int(process["peak_device_bytes"]) for stage in self.usage() for process in stage)

    def _submit_capture(self, rollouts: Sequence[Spans]) -> list[tuple[StageLink, object]]:
        start_B = np.array([r.start for r in rollouts], np.int32)
        end_B = np.array([r.end for r in rollouts], np.int32)
        x: object = pad_right([r.token_ids for r in rollouts])
        means = []
        for link in self._capture_links:
            x, mean_LBD = link.capture(x, start_B, end_B)
            means.append((link, mean_LBD))
        return means

    def _collect(self, positions: Positions, futures: list[tuple[StageLink, object]]) -> dict[int, Float32]:
        means_LBD = np.concatenate([link.result(future) for link, future in futures])
        check_captured(means_LBD, self._spec.captured)
        return {position: means_LBD[:, b] for b, position in enumerate(positions)}

    # ---- generation ----

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, edits: Sequence[Edit] = ()) -> list[Generated]:
        """One answer for every request, in order."""
        lengths = [len(request.prompt_ids) + sampling.max_new_tokens for request in requests]
        planned = batches_by_length(lengths, self._spec.decode_tokens, self._spec.step_cost_tokens * sampling.max_new_tokens)
        waiting = deque(self._decode_limit.applied(planned, lengths))
        in_flight: deque[_Step] = deque()
        answers: dict[int, Generated] = {}
        with self._decoding.claims() as claim, self._forgetting(in_flight):
            while waiting or in_flight:
                if waiting and claim(len(in_flight)):
                    batch = waiting.popleft()
                    decoding = Decoding([requests[i] for i in batch], sampling, self._stop_ids)
                    in_flight.append((batch, decoding, self._submit_step(decoding, sampling, edits)))
                    continue
                batch, decoding, future = in_flight[0]
                try:
                    decoding.take(np.asarray(self._links[-1].result(future)))
                except OutOfMemoryError as error:  # both halves begin again: their random numbers make the same answers
                    self._drop(decoding)
                    in_flight.popleft()
                    waiting.extendleft(reversed(self._decode_limit.halved(batch, lengths, error)))
                    continue
                in_flight.popleft()
                if decoding.is_done:
                    self._drop(decoding)
                    given = decoding.answers()
                    answers.update(zip(batch, given, strict=True))
                    record(TOKENS, sum(len(answer.answer_ids) for answer in given), phase="generated")
                    _record("generate", "prompt", [len(requests[i].prompt_ids) for i in batch], decoding.began_s)
                else:
                    in_flight.append((batch, decoding, self._submit_step(decoding, sampling, edits)))
        return [answers[i] for i in range(len(requests))]

    def _submit_step(self, decoding: Decoding, sampling: Sampling, edits: Sequence[Edit]) -> object:
        x: object = decoding.x
        for link in self._links:
            x = link.decode(decoding.step, x, decoding.uniform_B, sampling, edits)
        return x

    def _drop(self, decoding: Decoding) -> None:
        for link in self._links:
            link.drop(decoding.name)

    @contextmanager
    def _forgetting(self, in_flight: deque[_Step]) -> Iterator[None]:
        """No cache outlives the call, however it ends."""
        try:
            yield
        finally:
            for _, decoding, _ in in_flight:
                self._drop(decoding)


def _record(phase: str, kind: str, lengths: Sequence[int], began_s: float) -> None:
    """A batch is done; `lengths` of the sequences that were padded to the longest."""
    record(BATCH_SECONDS, time.perf_counter() - began_s, phase=phase)
    record(TOKENS, sum(lengths), phase=kind)
    record(PADDING_TOKENS, len(lengths) * max(lengths) - sum(lengths), phase=kind)


def check_captured(means_LBD: Float32, captured: Sequence[int]) -> None:
    """Guards against a missing, all-zero or wrongly hooked layer. Raises IntegrityError naming the layer."""
    if means_LBD.shape[0] != len(captured):
        raise IntegrityError(f"capture returned {means_LBD.shape[0]} layers, {len(captured)} were asked for: a hook did not fire")
    for layer, mean_BD in zip(captured, means_LBD, strict=True):
        if not mean_BD.any():
            raise IntegrityError(f"captured layer {layer} is all zero: it was not computed on its shard")
    for (layer, before_BD), (after, after_BD) in itertools.pairwise(zip(captured, means_LBD, strict=True)):
        if np.array_equal(before_BD, after_BD):
            raise IntegrityError(f"captured layers {layer} and {after} are equal: a hook sits on a block that was passed through")
