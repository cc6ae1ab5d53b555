"""Moments of a store's rows, taken once: kept in the store on the way, so that whoever goes on reads only what is new.

One function serves a reduce that was killed, a store that has grown, another judge, and a run that reduces while it extracts.
Layer block by layer block, so that memory does not depend on the number of layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

from persona_ray.config import ReduceConfig
from persona_ray.following import Follower
from persona_ray.reduce.blocks import layer_blocks
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.tally import Moved, Tally
from persona_ray.reduce.tasks import on_cluster
from persona_ray.spec import ProgressCallback
from persona_ray.store.checkpoint import checkpoint_arrays, checkpoints, keep_checkpoint
from persona_ray.store.reader import StoredRows, StoreReader
from persona_ray.store.snapshot import Snapshot

log = logging.getLogger(__name__)

REDUCE_TASKS = 16
"""Each holds the statistics of its slice until they are merged: more tasks are more memory, and these keep any reader busy."""
AUTO_ROWS_PER_ARCHETYPE = 200
"""Between checkpoints: what is kept then takes about a tenth of the space of the rows, and little is read twice."""
LOOK_EVERY_S = 10.0
"""During a run. Every look lists the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulation:
    """Whose moments, and how often they are kept."""

    store: StoreReader
    judge_name: str | None
    """Whose scores make the groups; None: no scores."""
    layers: tuple[int, ...]
    checkpoint_rows: int | None
    """Rows between checkpoints; None: nothing is kept."""

    @classmethod
    def of(cls, store: StoreReader, config: ReduceConfig, judge_name: str | None, layers: tuple[int, ...]) -> Self:
        """As the job says."""
        rows = AUTO_ROWS_PER_ARCHETYPE * len(store.archetypes) if config.checkpoint_rows == "auto" else config.checkpoint_rows
        return cls(store=store, judge_name=judge_name, layers=layers, checkpoint_rows=rows)

    @property
    def layer_blocks(self) -> tuple[tuple[int, ...], ...]:
        """What is held in memory at once, one after the other."""
        return layer_blocks(self.layers, self.store.hidden_size)

    def blocks(self, units: Sequence[int], at: Snapshot, advance: ProgressCallback) -> Iterator[tuple[tuple[int, ...], Moments]]:
        """Layers and their moments over all rows of `units`, which exist in the state `at`. `advance` is told of units, block by block."""
        for layers in self.layer_blocks:
            yield layers, self._block(layers).taken_in(units, at, advance).tally.moments

    def keep_up(self, units: Sequence[int], at: Snapshot) -> None:
        """Take in of `units` as many as make whole checkpoints, and keep them; nothing if those are fewer than one."""
        for layers in self.layer_blocks:
            self._block(layers).taken_in(units, at, lambda _: None, only_whole_legs=True)

    @property
    def units_per_leg(self) -> int | None:
        """Units between checkpoints."""
        return None if self.checkpoint_rows is None else -(-self.checkpoint_rows // self.store.plans.unit_rows)

    def _block(self, layers: tuple[int, ...]) -> _Block:
        return _Block(self, layers)


@dataclass(slots=True)
class _Block:
    """The growing tally of one block of layers."""

    whole: Accumulation
    layers: tuple[int, ...]
    tally: Tally = field(default_factory=Tally.nothing)
    units: set[int] = field(default_factory=set)
    """Whose rows are in the tally."""

    def taken_in(self, units: Sequence[int], at: Snapshot, advance: ProgressCallback, *, only_whole_legs: bool = False) -> Self:
        """Itself, with `units`: those of a checkpoint without reading them, the others leg by leg."""
        self._resume(units, at)
        advance(len(self.units))
        self._rescore(at)
        size = self.whole.units_per_leg or max(1, len(units))
        todo = sorted(set(units) - self.units)
        for leg in (todo[start : start + size] for start in range(0, len(todo), size)):
            is_whole = len(leg) == self.whole.units_per_leg
            if is_whole or not only_whole_legs:
                self.tally = self.tally.merge(on_cluster(self._source(), leg, Tally.of, REDUCE_TASKS, advance))
                self.units.update(leg)
            if is_whole:
                self._keep(at)
        return self

    def _source(self) -> StoredRows:
        return StoredRows(self.whole.store.url, self.whole.judge_name, self.layers)

    def _resume(self, units: Sequence[int], at: Snapshot) -> None:
        """From the checkpoint of most rows whose units are all wanted and still the same."""
        if self.whole.checkpoint_rows is None:
            return
        store, wanted = self.whole.store, frozenset(units)
        for found in checkpoints(store.url, self.layers):
            if wanted.issuperset(found.units) and store.state_of(found.units, self.layers, at) == found.state:
                self.tally, self.units = Tally.from_arrays(checkpoint_arrays(store.url, found)), set(found.units)
                log.info("layers %d to %d: going on from the moments of %d rows", self.layers[0], self.layers[-1], found.num_rows)
                return

    def _rescore(self, at: Snapshot) -> None:
        """Rows whose score is another one now change groups; those that leave the others of theirs are read again."""
        if not self.units:
            return
        store = self.whole.store
        score_N = store.scores(self.whole.judge_name, self.tally.rollout_N)
        rescoring = self.tally.rescoring(score_N)
        units = sorted({store.plans.unit_of(row) for row in rescoring.rollout_M.tolist()})
        moved = Moved.nothing()
        if units:
            log.info("%d rows have another score now and are read again", len(rescoring.rollout_M))
            moved = on_cluster(self._source(), units, partial(Moved.of, rescoring=rescoring), REDUCE_TASKS)
        self.tally = self.tally.rescored(score_N, rescoring, moved)
        if len(rescoring.rollout_M) >= (self.whole.checkpoint_rows or len(score_N) + 1):
            self._keep(at)

    def _keep(self, at: Snapshot) -> None:
        store, tally = self.whole.store, self.tally.in_order()
        state = store.state_of(self.units, self.layers, at)
        keep_checkpoint(store.url, tally.arrays(), layers=self.layers, units=self.units, state=state, num_rows=len(tally.rollout_N))


class KeepingUp(AbstractContextManager["KeepingUp"]):
    """Takes in what a run commits while it runs, in a thread of its own. What fails here is only not saved: it is done after the run."""

    def __init__(self, accumulation: Accumulation, judge: Callable[[Sequence[int]], None]) -> None:
        """`judge` gives committed units their scores, if they lack them."""
        self._accumulation = accumulation
        self._judge = judge
        self._num_seen = 0
        self._follower = Follower("moments", self._look, LOOK_EVERY_S)

    def _look(self) -> bool:
        """True if there is nothing to be kept, ever."""
        least, store = self._accumulation.units_per_leg, self._accumulation.store
        if least is None:
            return True
        at = store.snapshot()
        units = store.units(self._accumulation.layers, at)
        if len(units) - self._num_seen >= least:
            store.refresh()  # another run may have added archetypes, and units of theirs
            self._judge(units)
            self._accumulation.keep_up(units, at)
            self._num_seen = len(units) // least * least
        return False

    def __enter__(self) -> Self:
        self._follower.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._follower.__exit__(kind, error, trace)
        if self._follower.error is not None:
            log.warning("moments were not taken during the run (%s); they are taken now", self._follower.error)
