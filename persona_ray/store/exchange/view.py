"""The rows that an export takes: those that were committed when it began, unit by unit, text beside numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from persona_ray.errors import InputError
from persona_ray.spec import Float32, ProgressCallback, Rollout
from persona_ray.store.marker import Marker
from persona_ray.store.reader import StoreReader

INCOMPLETE = "not every layer is stored"
"""Why a row is left out that its unit's first marker does not refuse."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The rows of one unit that are there. The first dim of all three is the same."""

    rollouts: tuple[Rollout, ...]
    score_R: npt.NDArray[np.int8]
    """0..3, or -1 where the judge in force has not spoken."""
    activations_RLD: Float32
    """In the order of the view's layers."""


@dataclass(frozen=True, slots=True)
class View:
    """A state of a store. One pass over it counts what it leaves out."""

    store: StoreReader
    layers: tuple[int, ...]
    """Decoder blocks; none = text and scores alone, and no number is read."""
    judge: str | None
    """Whose scores come along."""
    ledger_digest: str
    units: tuple[int, ...]
    """Committed with all of `layers`, rising."""
    markers: Mapping[int, Marker]
    """Of all committed units."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why -> rows; complete after a pass."""

    def rows(self, progress: ProgressCallback = lambda _: None) -> Iterator[StoredRows]:
        """Unit by unit; `progress` is told of units. Raises IntegrityError for damage."""
        self.left_out.clear()
        incomplete = sum(marker.num_stored for unit, marker in self.markers.items() if unit not in self.units)
        self.left_out.update({INCOMPLETE: incomplete} if incomplete else {})
        for unit in set(self.markers).difference(self.units):
            self.left_out.update(self.markers[unit].refused.values())
        units = self._with_numbers() if self.layers else self._text_alone()
        for unit, text, found in units:
            kept = {rollout.index for rollout in found.rollouts}
            self.left_out.update(self.markers[unit].refused.get(line.index, INCOMPLETE) for line in text if line.index not in kept)
            yield found
            progress(1)

    def _with_numbers(self) -> Iterator[tuple[int, tuple[Rollout, ...], StoredRows]]:
        texts = self.store.rollouts(self.units)
        numbers = self.store.scored_rows(self.units, self.judge, self.layers)
        for unit, text, rows in zip(self.units, texts, numbers, strict=True):
            by_index = {rollout.index: rollout for rollout in text}
            rollouts = tuple(by_index[row] for row in rows.rollout_R.tolist())
            yield unit, text, StoredRows(rollouts, rows.score_R, rows.activations_RLD)

    def _text_alone(self) -> Iterator[tuple[int, tuple[Rollout, ...], StoredRows]]:
        for unit, text in zip(self.units, self.store.rollouts(self.units), strict=True):
            kept = tuple(rollout for rollout in text if rollout.index not in self.markers[unit].refused)
            score_R = self.store.scores(self.judge, np.array([rollout.index for rollout in kept], dtype=np.int64))
            yield unit, text, StoredRows(kept, score_R, np.empty((len(kept), 0, self.store.hidden_size), dtype=np.float32))


def view_of(store: StoreReader, layers: Sequence[int] | None = None) -> View:
    """The store as it is now, with `layers` (None: all).

    Raises InputError for a layer that was not captured, and if no row is committed.
    """
    wanted = store.layers if layers is None else tuple(layers)
    strangers = [layer for layer in wanted if layer not in store.layers]
    if strangers or len(set(wanted)) != len(wanted):
        problem = f"layer {strangers[0]} was not captured" if strangers else "a layer is asked for twice"
        raise InputError(f"{store.url}: {problem}; there are {', '.join(map(str, store.layers))}")
    state = _state(store, wanted)
    if not any(state.markers[unit].num_stored for unit in state.units):
        raise InputError(f"{store.url}: no row is committed with the layers asked for, so there is nothing to export")
    return state


def _state(store: StoreReader, layers: tuple[int, ...]) -> View:
    while True:
        digest = store.snapshot().digest
        markers = store.ledger.markers()
        units = store.units(layers or None)
        # A store may grow while it is looked at: then look again, so that the digest names exactly these units.
        if store.snapshot().digest == digest:
            return View(store, layers, store.latest_scores(), digest, tuple(units), markers)
