"""The axis while a run goes on: follows the store as it fills, shows how far it has come and, where that is asked for, when it is enough.

Looks only at the longest complete prefix of the work order, which is a valid smaller experiment whatever else is committed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import takewhile
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from persona_ray.config import StopConfig
from persona_ray.following import Companion, Follower
from persona_ray.reduce.convergence import BatchMeans, Look, LookRule, StopRule
from persona_ray.reduce.vectors import Filter
from persona_ray.reduce.weightings import DEFAULT
from persona_ray.spec import ScoredRows
from persona_ray.store.looks import write_look
from persona_ray.store.reader import StoreReader

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""Where the run ends by what is seen: what is begun meanwhile is begun for nothing."""
ONLOOK_EVERY_S = 20.0
"""Where it is only shown."""
UNITS_AT_ONCE = 32
"""That are judged and read before it is asked whether that is still wanted: a run that is resumed finds thousands of them."""


@dataclass(slots=True)
class PrefixAxis:
    """The axis of a growing prefix, at some layers. Every unit is read once; at 276 archetypes and 8,192 dims a layer takes 0.3 GB."""

    store: StoreReader
    order: Sequence[int]
    """The job's units in work order."""
    archetypes: Sequence[str]
    """The job's."""
    keep: Filter
    judge_name: str | None
    judge: Callable[[Sequence[int]], None]
    """Gives committed units their scores, if they lack them."""
    layers: tuple[int, ...]
    rule: LookRule
    num_units: int = field(default=0, init=False)
    """Of the prefix, so far."""
    _group_of: dict[int, int] = field(default_factory=dict, init=False)
    _num_stored: Counter[int] = field(default_factory=Counter, init=False)
    """Rows of each archetype code in the prefix, counted or not."""
    _batches: BatchMeans = field(init=False)

    def __post_init__(self) -> None:
        codes = {name: code for code, name in enumerate(self.store.archetypes) if name in self.archetypes}
        defaults = [code for name, code in codes.items() if name in self.store.default_archetypes]
        roles = [code for code in codes.values() if code not in defaults]
        self._group_of = dict.fromkeys(defaults, DEFAULT) | {code: group for group, code in enumerate(roles, start=1)}
        self._batches = BatchMeans(1 + len(roles), (len(self.layers), self.store.hidden_size))

    @property
    def rows_per_archetype(self) -> int:
        """Of the archetype that has the fewest in the prefix; one whose every row was refused does not count."""
        return min((self._num_stored[code] for code in self._group_of if self._num_stored[code]), default=0)

    def advance(self, is_over: Callable[[], bool] = lambda: False) -> str | None:
        """Take in what the prefix has gained, until `is_over`; why the run can end, once it can."""
        committed = frozenset(self.store.units(self.layers))
        new = list(takewhile(committed.__contains__, self.order[self.num_units :]))
        for first in range(0, len(new), UNITS_AT_ONCE):
            if is_over():
                return None
            reason = self._take(new[first : first + UNITS_AT_ONCE])
            if reason is not None:
                return reason
        return None

    def _take(self, units: Sequence[int]) -> str | None:
        self.judge(units)
        for rows in self.store.scored_rows(units, self.judge_name, self.layers):
            self._add(rows)
            number = self.rows_per_archetype
            if self.rule.is_due(number):
                look = self._batches.look(self.keep.min_count)
                has_held = self.rule.take(look, number)
                level = logging.INFO if isinstance(self.rule, StopRule) else logging.DEBUG
                log.log(level, "axis after %d rows per archetype: %s", number, _in_words(look))
                if look is not None:
                    write_look(self.store.url, number, self.layers, look.cosine_L.tolist())
                if has_held and look is not None:
                    return self._reason(look, number)
        self.num_units += len(units)
        return None

    def _add(self, rows: ScoredRows) -> None:
        group_R = np.array([self._group_of.get(code, -1) for code in rows.archetype_R.tolist()], dtype=np.int64)
        ordinal_R = np.empty(len(group_R), dtype=np.int64)
        for place, code in enumerate(rows.archetype_R.tolist()):
            ordinal_R[place] = self._num_stored[code]
            self._num_stored[code] += 1
        passes_R = np.array([self.keep.passes(score) for score in rows.score_R.tolist()], dtype=bool)
        counts_R = (group_R == DEFAULT) | ((group_R > DEFAULT) & passes_R)
        self._batches.add(group_R[counts_R], ordinal_R[counts_R], rows.activations_RLD[counts_R])

    def _reason(self, look: Look, number: int) -> str:
        assert isinstance(self.rule, StopRule), "nothing else holds"
        at = ", ".join(map(str, self.layers))
        return (
            f"reduce.stop: the axis at layer {at} has held still for {self.rule.num_held} looks, and is expected to have a cosine of "
            f"{look.cosine_L.min():.5f} with that of endlessly many rows, after {number} rows per archetype "
            "(--set reduce.stop=null goes on)"
        )


class AxisWatch(Protocol):
    """Whoever follows the axis of a run."""

    @property
    def reason(self) -> str | None:
        """Why nothing new is to be begun."""
        ...


class NeverStops:
    """Nobody: nothing is looked at."""

    reason: str | None = None


class Onlooker(Companion):
    """Advances a `PrefixAxis` in a thread of its own while the block lasts, for whoever watches the run. What fails here ends nothing."""

    reason: str | None = None

    def __init__(self, prefix: PrefixAxis, every_s: float = ONLOOK_EVERY_S) -> None:
        super().__init__("axis so far", every_s, "the axis so far could not be looked at to the end (%s); nothing else follows from it")
        self._prefix = prefix

    def _look(self) -> bool:
        self._prefix.advance(self._follower.is_over)
        return False


class StopWatch(AbstractContextManager["StopWatch"]):
    """Advances a `PrefixAxis` in a thread of its own while the block lasts."""

    def __init__(self, prefix: PrefixAxis) -> None:
        self._prefix = prefix
        self._reason: str | None = None
        self._follower = Follower("reduce.stop", self._advance, LOOK_EVERY_S)

    @property
    def reason(self) -> str | None:
        """Why nothing new is to be begun; raises what went wrong with looking."""
        if self._follower.error is not None:
            raise self._follower.error
        return self._reason

    def _advance(self) -> bool:
        self._reason = self._reason or self._prefix.advance()
        return self._reason is not None

    def __enter__(self) -> Self:
        self._advance()  # what is there already may be enough
        self._follower.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._follower.__exit__(kind, error, trace)


def stop_rule(config: StopConfig) -> StopRule:
    """The rule of a job."""
    return StopRule(cosine=config.cosine, patience=config.patience, min_per_archetype=config.min_per_archetype)


def _in_words(look: Look | None) -> str:
    return "too little to tell" if look is None else f"expected cosine {look.cosine_L.min():.5f} with that of endlessly many rows"
