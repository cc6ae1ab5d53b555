"""A batch of sequences that are being generated: which go on, and what the next step is. Knows nothing of stages."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from persona_ray.shards.batching import pad_left
from persona_ray.shards.sampling import uniform_stream
from persona_ray.shards.stage import DecodeStep
from persona_ray.spec import FinishReason, Float64, Generated, GenerationRequest, Int32, Sampling


class Decoding:
    """The state of one batch between two forwards. Finished sequences leave it, and the others go on with less work."""

    def __init__(self, requests: Sequence[GenerationRequest], sampling: Sampling, stop_ids: npt.NDArray[np.int64]) -> None:
        self.name = uuid.uuid4().hex
        """Of its KV cache. A batch that is begun again is a new one, with a cache of its own."""
        self.began_s = time.perf_counter()
        """By the clock of `time.perf_counter`."""
        self._max_new_tokens, self._stop_ids = sampling.max_new_tokens, stop_ids
        prompt_BT, self._pad_B = pad_left([request.prompt_ids for request in requests])
        self._uniform_BS: Float64 = np.stack([uniform_stream(sampling.seed, r.stream, sampling.max_new_tokens) for r in requests])
        self._answers: list[list[int]] = [[] for _ in requests]
        self._reasons = [FinishReason.LENGTH] * len(requests)
        self._going = np.arange(len(requests))
        self._keep: tuple[int, ...] | None = None
        self._past_length = self._num_steps = 0
        self.x: Int32 | npt.NDArray[np.int64] = prompt_BT
        """Token ids (B, T) that the next forward takes."""

    @property
    def is_done(self) -> bool:
        """Every sequence has ended, or has all the tokens it may have."""
        return not len(self._going) or self._num_steps == self._max_new_tokens

    @property
    def step(self) -> DecodeStep:
        """What the stages are to do next."""
        return DecodeStep(self.name, self._past_length, self._pad_B[self._going], self._keep)

    @property
    def uniform_B(self) -> Float64:
        """The next step's random number of each sequence that goes on."""
        uniform_B: Float64 = self._uniform_BS[self._going, self._num_steps]
        return uniform_B

    def take(self, token_B: npt.NDArray[np.int64]) -> None:
        """The next token of each sequence that goes on."""
        stopped_B = np.isin(token_B, self._stop_ids)
        for sequence, token, stopped in zip(self._going, token_B, stopped_B, strict=True):
            if stopped:
                self._reasons[sequence] = FinishReason.STOP
            else:
                self._answers[sequence].append(int(token))
        self._past_length += self.x.shape[1]
        self._num_steps += 1
        self._keep = tuple(int(b) for b in np.flatnonzero(~stopped_B)) if stopped_B.any() else None
        self._going, self.x = self._going[~stopped_B], token_B[~stopped_B, None]

    def answers(self) -> list[Generated]:
        """One for each request, in order."""
        return [Generated(np.asarray(ids, np.int32), reason) for ids, reason in zip(self._answers, self._reasons, strict=True)]
