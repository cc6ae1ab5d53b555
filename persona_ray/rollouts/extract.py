"""What a replica does with a unit: text first, then activations from the text that is really there, then the marker.

Knows an engine and a sink by their protocols; neither where the model runs nor where the rows go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from persona_ray.rollouts.produce import generate_rollouts, import_rollouts, left_out_rollout
from persona_ray.rollouts.transcript import Transcriber
from persona_ray.spec import Captured, CapturedUnit, Engine, Float32, Receipt, Rollout, Sampling, Spans, Unit, UnitSink

T = TypeVar("T")


class _Opened(threading.local):
    """What a thread opens once and uses for all its units: a tokenizer must not be used by two threads at once."""

    def __init__(self) -> None:
        self._things: dict[tuple[object, ...], Any] = {}

    def get(self, open_: Callable[..., T], *arguments: object) -> T:
        """`open_(*arguments)`, or what that gave this thread before."""
        key = (open_, *arguments)
        if key not in self._things:
            self._things[key] = open_(*arguments)
        found: T = self._things[key]
        return found


_opened = _Opened()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractUnit:
    """The work, with all that it needs besides the engine. Picklable; implements `shards.actors.replica.UnitWork`."""

    open_sink: Callable[[], UnitSink]
    find_tokenizer: Callable[[], Path]
    """A folder with the model's tokenizer, on the node that asks."""
    kind: Literal["instruct", "base"]
    thinking: bool
    sampling: Sampling | None
    """None: conversations are imported."""
    max_length: int
    batch_tokens: int
    row_shape: tuple[int, int]
    """(L, D) of a row of activations."""

    def __call__(self, unit: Unit, engine: Engine) -> Receipt:
        """Rollouts, activations, commit. The first writer of the text wins, and it is his text that is measured."""
        return self._commit(unit, engine, partial(self._rollouts, unit, engine))

    def text(self, unit: Unit, engine: Engine) -> tuple[Rollout, ...]:
        """Rollouts of a part of a unit, for `finish`. Those of its text, if that is there already."""
        stored = _opened.get(self.open_sink).read_rollouts(unit.index)
        if stored is None:
            return self._rollouts(unit, engine)
        wanted = {row.index for row in unit.rows}
        return tuple(rollout for rollout in stored if rollout.index in wanted)

    def finish(self, unit: Unit, engine: Engine, rollouts: Sequence[Rollout]) -> Receipt:
        """Activations and commit of a unit whose rollouts were made in parts."""
        return self._commit(unit, engine, lambda: tuple(rollouts))

    def trial(self, unit: Unit, engine: Engine) -> None:
        """All that is done with these rows, but nothing is kept."""
        capture(self.text(unit, engine), engine, self.row_shape)

    def _commit(self, unit: Unit, engine: Engine, make: Callable[[], tuple[Rollout, ...]]) -> Receipt:
        began = time.perf_counter()
        sink = _opened.get(self.open_sink)
        rollouts = sink.read_rollouts(unit.index)
        if rollouts is None:
            rollouts = sink.write_rollouts(unit.index, make())
        told = time.perf_counter()
        captured, activations_RLD, refused = capture(rollouts, engine, self.row_shape, unit.excluded)
        num_tokens = sum(len(rollout.token_ids) for rollout in rollouts if rollout.refusal is None)
        made = {
            **engine.made,
            "batch_tokens": self.batch_tokens,
            "tokens": num_tokens,
            "padded_tokens": captured.padded_tokens,
            **({} if captured.peak_device_bytes is None else {"peak_device_bytes": captured.peak_device_bytes}),
            "notes": list(captured.notes),
            "seconds": {"rollouts": round(told - began, 3), "capture": round(time.perf_counter() - told, 3)},
        }
        is_ours = sink.commit(CapturedUnit(unit.index, rollouts, activations_RLD, refused, made))
        seconds = time.perf_counter() - began
        return Receipt(unit.index, len(rollouts) - len(refused), len(refused), num_tokens, seconds, is_ours)

    def _rollouts(self, unit: Unit, engine: Engine) -> tuple[Rollout, ...]:
        """In the order of the unit's rows."""
        rows = tuple(row for row in unit.rows if row.index not in unit.excluded)
        left_out = [left_out_rollout(row, unit.excluded[row.index]) for row in unit.rows if row.index in unit.excluded]
        if self.sampling is None:
            made = import_rollouts(rows, transcriber=self.transcriber(), max_length=self.max_length)
        else:
            made = generate_rollouts(
                rows, engine=engine, transcriber=self.transcriber(), sampling=self.sampling, max_length=self.max_length
            )
        return tuple(sorted((*made, *left_out), key=lambda rollout: rollout.index))

    def transcriber(self) -> Transcriber:
        """Of this thread."""
        return _opened.get(_open_transcriber, self.find_tokenizer, self.kind, self.thinking)


def _open_transcriber(find_tokenizer: Callable[[], Path], kind: Literal["instruct", "base"], thinking: bool) -> Transcriber:
    return Transcriber(str(find_tokenizer()), kind=kind, thinking=thinking)


def capture(
    rollouts: Sequence[Rollout], engine: Engine, row_shape: tuple[int, int], excluded: Mapping[int, str] | None = None
) -> tuple[Captured, Float32, dict[int, str]]:
    """What the engine gave for the usable rows; activations (R, L, D) with NaN in refused rows; and the reasons of those by row index.

    `excluded` rows are refused for the reason that is given there, and never reach the engine.
    """
    refused = dict(excluded or {}) | {rollout.index: rollout.refusal for rollout in rollouts if rollout.refusal is not None}
    usable = [i for i, rollout in enumerate(rollouts) if rollout.index not in refused]
    spans = [Spans(rollouts[i].token_ids, rollouts[i].response_start, rollouts[i].response_end) for i in usable]
    activations_RLD = np.full((len(rollouts), *row_shape), np.nan, np.float32)
    captured = engine.capture(spans) if spans else Captured(activations_RLD[:0], padded_tokens=0)
    for i, means_LD in zip(usable, captured.means_RLD, strict=True):
        if np.isfinite(means_LD).all():
            activations_RLD[i] = means_LD
        else:
            refused[rollouts[i].index] = "activations are not finite"
    return captured, activations_RLD, refused
