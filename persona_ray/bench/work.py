"""What a replica does in a benchmark. It is given units as in any run; a unit's number says which task of a list it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from persona_ray.bench.conversations import Conversations, prompts, spans
from persona_ray.bench.device import Used, used
from persona_ray.spec import (
    Captured,
    CapturedUnit,
    Engine,
    FinishReason,
    Float32,
    GenerationRequest,
    Identity,
    Plan,
    Receipt,
    Rollout,
    RowKey,
    Sampling,
    Spans,
    Unit,
)
from persona_ray.store.prepare import prepare_store
from persona_ray.store.writer import UnitWriter

ARCHETYPE = "benchmark"


@dataclass(frozen=True, slots=True)
class LookAround:
    """Nothing; the receipt says what the process took so far."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Capture the first conversations, and hand their rows back. The first batches of a process, too."""

    number: int


@dataclass(frozen=True, slots=True)
class Capture:
    """Capture the conversations [first, end), and throw the rows away."""

    first: int
    end: int
    unit: int
    store_url: str | None
    """Commit the unit there before."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the prompts [first, end)."""

    first: int
    end: int


Task = LookAround | Sample | Capture | Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Receipt):
    """The receipt of a task."""

    padded_tokens: int = 0
    capture_s: float = 0.0
    commit_s: float = 0.0
    rows_RLD: Float32 | None = None
    answers: tuple[tuple[int, ...], ...] = ()
    used: Used | None = None
    """By the replica's own process, at the end of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchWork:
    """Implements `shards.actors.replica.UnitWork`. Picklable."""

    tasks: tuple[Task, ...]
    recipe: Conversations
    sampling: Sampling
    num_prompts: int = field(default=0)

    def indices(self, *kinds: type[Task]) -> list[int]:
        """Units that are such tasks."""
        return [index for index, task in enumerate(self.tasks) if isinstance(task, kinds)]

    def captures(self, turn: int, turns: int) -> list[int]:
        """Units of one of `turns` passes of capture."""
        found = self.indices(Capture)
        size = len(found) // turns
        return found[turn * size : (turn + 1) * size]

    def __call__(self, unit: Unit, engine: Engine) -> Done:
        """The task of that number."""
        began = time.perf_counter()
        match self.tasks[unit.index]:
            case LookAround():
                return Done(unit.index, 0, 0, 0, 0.0, used=used())
            case Sample(number):
                captured = engine.capture(spans(self.recipe)[:number])
                return Done(unit.index, number, 0, 0, time.perf_counter() - began, rows_RLD=captured.means_RLD)
            case Answer(first, end):
                answers = self._answers(first, end, engine)
                num_tokens = sum(map(len, answers))
                return Done(unit.index, len(answers), 0, num_tokens, time.perf_counter() - began, answers=answers)
            case Capture() as task:
                return self._capture(unit.index, task, engine)

    def _capture(self, index: int, task: Capture, engine: Engine) -> Done:
        rollouts = spans(self.recipe)[task.first : task.end]
        began = time.perf_counter()
        captured = engine.capture(rollouts)
        captured_at = time.perf_counter()
        if task.store_url is not None:
            _commit(task, rollouts, captured)
        ended = time.perf_counter()
        return Done(
            index,
            len(rollouts),
            0,
            sum(len(span.token_ids) for span in rollouts),
            ended - began,
            padded_tokens=captured.padded_tokens,
            capture_s=captured_at - began,
            commit_s=ended - captured_at,
        )

    def _answers(self, first: int, end: int, engine: Engine) -> tuple[tuple[int, ...], ...]:
        asked = prompts(self.recipe, self.num_prompts)[first:end]
        requests = [GenerationRequest(f"prompt {first + i}", ids) for i, ids in enumerate(asked)]
        return tuple(tuple(answer.answer_ids.tolist()) for answer in engine.generate(requests, self.sampling))


def tasks_of(num_rows: int, *, unit_rows: int, store_urls: Sequence[str | None], num_prompts: int, num_sampled: int) -> tuple[Task, ...]:
    """One look around, one sample, the capture of all rows once for each of `store_urls` (None: no store), and the answers once."""
    captures = [
        Capture(first, min(first + unit_rows, num_rows), unit, url)
        for url in store_urls
        for unit, first in enumerate(range(0, num_rows, unit_rows))
    ]
    answers = [Answer(first, min(first + unit_rows, num_prompts)) for first in range(0, num_prompts, unit_rows)]
    return (LookAround(), Sample(num_sampled), *captures, *answers)


# ---- the store -------------------------------------------------------------------------------------------------------


def make_store(url: str, *, num_rows: int, unit_rows: int, layers: tuple[int, ...], hidden_size: int) -> None:
    """An empty store for one pass."""
    identity = Identity(
        model_id=ARCHETYPE,
        model_revision=None,
        model_config_digest="",
        tokenizer_digest="",
        template_digest="",
        dtype="",
        attention="",
        span_rule="",
        layers=layers,
        hidden_size=hidden_size,
        rollouts={},
        max_length=0,
        unit_rows=unit_rows,
        store_dtype="bf16-exact",
    )
    keys = tuple(_key(row) for row in range(num_rows))
    prepare_store(url, identity=identity, plan=Plan((ARCHETYPE,), (), keys, unit_rows), job={})


def _key(row: int) -> RowKey:
    return RowKey(ARCHETYPE, 0, row)


def _commit(task: Capture, rollouts: Sequence[Spans], captured: Captured) -> None:
    """As an ordinary run does it: text, numbers, marker."""
    assert task.store_url is not None
    sink = UnitWriter(task.store_url)
    lines = tuple(_rollout(task.first + i, span) for i, span in enumerate(rollouts))
    sink.commit(CapturedUnit(task.unit, sink.write_rollouts(task.unit, lines), captured.means_RLD, {}, {}))


def _rollout(row: int, span: Spans) -> Rollout:
    text = " ".join(map(str, span.token_ids))  # about as long as the text that such a row has
    return Rollout(row, _key(row), "", "", text, np.asarray(span.token_ids), span.start, span.end, FinishReason.IMPORTED)
