"""What is known of a store's rows, taken once: kept in the store on the way, so that whoever goes on reads only what is new.

One function serves a reduce that was killed, a store that has grown, another judge, and a run that reduces while it extracts.
Layer block by layer block, so that memory does not depend on the number of layers; leg by leg of consecutive units, so that what
comes out does not depend on when they were committed. Moments grow from leg to leg. The state of components loses a little
whenever it is cut, so that of each leg is taken and kept for itself, and all are put together in the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Self

from persona_ray.config import ReduceConfig
from persona_ray.errors import NothingUsableError
from persona_ray.following import Companion
from persona_ray.reduce.blocks import layer_blocks
from persona_ray.reduce.incremental import IncrementalPCA
from persona_ray.reduce.merging import fold_all, merge_all
from persona_ray.reduce.one_pass import Measured
from persona_ray.reduce.persona_space import Block
from persona_ray.reduce.tally import Moved, Tally
from persona_ray.reduce.tasks import on_cluster
from persona_ray.spec import ProgressCallback
from persona_ray.store.checkpoint import Checkpoint, checkpoint_arrays, checkpoints, keep_checkpoint
from persona_ray.store.reader import StoredRows, StoreReader
from persona_ray.store.snapshot import Snapshot

log = logging.getLogger(__name__)

REDUCE_TASKS = 16
"""Each holds the statistics of its slice until they are merged: more tasks are more memory, and these keep any reader busy."""
AUTO_ROWS_PER_ARCHETYPE = 200
"""Between checkpoints: what is kept then takes about a tenth of the space of the rows, and little is read twice."""
LOOK_EVERY_S = 10.0
"""During a run. Every look lists the ledger."""

Leg = tuple[int, ...]
"""Units that are read together: those of one stretch of unit numbers that are there, rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulation:
    """What is wanted of whose rows, and how often it is kept."""

    store: StoreReader
    judge_name: str | None
    """Whose scores make the groups; None: no scores."""
    layers: tuple[int, ...]
    checkpoint_rows: int | None
    """Rows between checkpoints; None: nothing is kept."""
    rank: int | None
    """Components of single rollouts; None: none."""
    num_gpus: float = 0
    """That every task is given."""

    @classmethod
    def of(cls, store: StoreReader, config: ReduceConfig, judge_name: str | None, layers: tuple[int, ...], num_gpus: float = 0) -> Self:
        """As the job says."""
        # Of the first plan: legs of another length would have to be read again when archetypes are added.
        num_archetypes = len(store.plans.first.plan.archetypes)
        rows = AUTO_ROWS_PER_ARCHETYPE * num_archetypes if config.checkpoint_rows == "auto" else config.checkpoint_rows
        rank = config.rank if config.rollout_pca == "incremental" else None
        return cls(store=store, judge_name=judge_name, layers=layers, checkpoint_rows=rows, rank=rank, num_gpus=num_gpus)

    @property
    def layer_blocks(self) -> tuple[tuple[int, ...], ...]:
        """What is held in memory at once, one after the other."""
        return layer_blocks(self.layers, self.store.hidden_size)

    def blocks(self, units: Sequence[int], at: Snapshot, advance: ProgressCallback) -> Iterator[Block]:
        """What is known of all rows of `units`, which exist in the state `at`. `advance` is told of units, block by block.

        Raises NothingUsableError if there are none.
        """
        if not units:
            raise NothingUsableError("there is nothing to reduce: not one unit is committed")
        for layers in self.layer_blocks:
            yield _Growing(self, layers, at).taken_in(units, advance).block()

    def keep_up(self, units: Sequence[int], at: Snapshot, is_over: Callable[[], bool] = lambda: False) -> None:
        """Take in of `units` those that make whole legs, and keep what is known of them; nothing if there is no such leg.

        `is_over` is asked before each leg: whether to leave the others.
        """
        whole = [unit for leg in self.legs(units) if self.is_whole(leg) for unit in leg]
        for layers in self.layer_blocks if whole else ():
            _Growing(self, layers, at).taken_in(whole, lambda _: None, is_over)

    @property
    def units_per_leg(self) -> int | None:
        """Units between checkpoints."""
        return None if self.checkpoint_rows is None else -(-self.checkpoint_rows // self.store.plans.unit_rows)

    def legs(self, units: Sequence[int]) -> list[Leg]:
        """By unit numbers alone, so that everybody makes the same ones."""
        size = self.units_per_leg
        if size is None:
            return [tuple(sorted(units))]
        return [tuple(leg) for _, leg in groupby(sorted(units), key=lambda unit: unit // size)]

    def is_whole(self, leg: Leg) -> bool:
        """Whether nothing can come into it any more, so that what is known of it is worth keeping."""
        return len(leg) == self.units_per_leg

    @property
    def pca_kind(self) -> str:
        """Under which states of components are kept: each is of its rank."""
        return f"rollout-pca-{self.rank}"


@dataclass(slots=True)
class _Growing:
    """What is known of one block of layers, so far."""

    whole: Accumulation
    layers: tuple[int, ...]
    at: Snapshot
    tally: Tally = field(default_factory=Tally.nothing)
    units: set[int] = field(default_factory=set)
    """Whose rows are in the tally."""
    kept: dict[Leg, Checkpoint] = field(default_factory=dict)
    """Where the states of components are that are kept."""
    states: dict[Leg, IncrementalPCA] = field(default_factory=dict)
    """Those that are not."""
    legs: Sequence[Leg] = ()

    def taken_in(self, units: Sequence[int], advance: ProgressCallback, is_over: Callable[[], bool] = lambda: False) -> Self:
        """Itself, with `units`: those of checkpoints without reading them, the others leg by leg, until `is_over`."""
        self._resume(units)
        advance(len(self.units))
        self._rescore()
        self.legs = self.whole.legs(units)
        for leg in self.legs:
            if is_over():
                break
            self._take(leg, advance)
        return self

    def block(self) -> Block:
        """What is known."""
        return Block(self.layers, self.tally.moments, merge_all(map(self._state, self.legs)) if self.whole.rank is not None else None)

    def _take(self, leg: Leg, advance: ProgressCallback) -> None:
        """What is not known of it yet."""
        new = tuple(unit for unit in leg if unit not in self.units)
        lacks_pca = self.whole.rank is not None and leg not in self.kept
        if lacks_pca and new != leg:  # rare: another rank, or legs of another length
            self._take_pca(leg, self._read(leg, with_tally=False, rank=self.whole.rank).pca)
            lacks_pca = False
        if new:
            found = self._read(new, with_tally=True, rank=self.whole.rank if lacks_pca else None, advance=advance)
            # Components first: whoever finds the moments of a leg kept finds those as well.
            self._take_pca(leg, found.pca)
            self.tally = self.tally.merge(found.tally)
            self.units.update(new)
            if self.whole.is_whole(leg) and self.tally.moments.groups:  # not if every row so far was refused
                self._keep_tally()

    def _read(self, units: Leg, *, with_tally: bool, rank: int | None, advance: ProgressCallback = lambda _: None) -> Measured:
        measure = partial(Measured.of, with_tally=with_tally, rank=rank)
        return on_cluster(self._source(), units, measure, REDUCE_TASKS, advance, fold_all, num_gpus=self.whole.num_gpus if rank else 0)

    def _source(self) -> StoredRows:
        return StoredRows(self.whole.store.url, self.whole.judge_name, self.layers, among=self.whole.layers)

    def _state(self, leg: Leg) -> IncrementalPCA:
        assert self.whole.rank is not None
        if leg in self.states:
            return self.states[leg]
        return IncrementalPCA.from_arrays(checkpoint_arrays(self.whole.store.url, self.kept[leg]), self.whole.rank)

    # ---- what is kept

    def _resume(self, units: Sequence[int]) -> None:
        """From the checkpoint of most rows whose units are all wanted and still the same, and the states of components of such legs."""
        if self.whole.checkpoint_rows is None:
            return
        url, wanted = self.whole.store.url, frozenset(units)
        for found in checkpoints(url, self.layers):
            if wanted.issuperset(found.units) and self._is_as_it_was(found):
                self.tally, self.units = Tally.from_arrays(checkpoint_arrays(url, found)), set(found.units)
                log.info("layers %d to %d: going on from the moments of %d rows", self.layers[0], self.layers[-1], found.num_rows)
                break
        if self.whole.rank is not None:
            states = checkpoints(url, self.layers, self.whole.pca_kind)
            self.kept = {found.units: found for found in states if wanted.issuperset(found.units) and self._is_as_it_was(found)}

    def _is_as_it_was(self, found: Checkpoint) -> bool:
        return self._state_of(found.units) == found.state

    def _state_of(self, units: Iterable[int]) -> str:
        """Of all layers that are wanted: a row that is refused in one of them counts in none."""
        return self.whole.store.state_of(units, self.whole.layers, self.at)

    def _take_pca(self, leg: Leg, state: IncrementalPCA | None) -> None:
        if state is None:
            return
        short = state.short()  # kept or not, so that it is the same
        if not self.whole.is_whole(leg):
            self.states[leg] = short
            return
        self.kept[leg] = keep_checkpoint(
            self.whole.store.url,
            short.arrays(),
            kind=self.whole.pca_kind,
            layers=self.layers,
            units=leg,
            state=self._state_of(leg),
            num_rows=short.count,
        )

    def _keep_tally(self) -> None:
        store, tally = self.whole.store, self.tally.in_order()
        keep_checkpoint(
            store.url,
            tally.arrays(),
            layers=self.layers,
            units=self.units,
            state=self._state_of(self.units),
            num_rows=len(tally.rollout_N),
        )

    # ---- another judge

    def _rescore(self) -> None:
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
            self._keep_tally()


class KeepingUp(Companion):
    """Takes in what a run commits while it runs, in a thread of its own. What fails here is only not saved: it is done after the run."""

    def __init__(self, accumulation: Accumulation, judge: Callable[[Sequence[int]], None]) -> None:
        """`judge` gives committed units their scores, if they lack them."""
        super().__init__("moments", LOOK_EVERY_S, "moments were not taken during the run (%s); they are taken now")
        self._accumulation = accumulation
        self._judge = judge
        self._num_legs = 0

    def _look(self) -> bool:
        """True if there is nothing to be kept, ever."""
        wanted = self._accumulation
        if wanted.units_per_leg is None:
            return True
        at = wanted.store.snapshot()
        units = wanted.store.units(wanted.layers, at)
        num_whole = sum(map(wanted.is_whole, wanted.legs(units)))
        if num_whole > self._num_legs:
            wanted.store.refresh()  # another run may have added archetypes, and units of theirs
            self._judge(units)
            wanted.keep_up(units, at, self._follower.is_over)
            self._num_legs = num_whole
        return False
