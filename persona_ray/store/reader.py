"""Reads a store, also while it grows. Only committed rows are ever handed out; the ledger alone says which those are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.errors import InputError, IntegrityError, RetryableError
from persona_ray.spec import NOT_SCORED, Float32, Reduced, Rollout, RunCounts, ScoredRows
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.ahead import read_ahead
from persona_ray.store.arrays import UnitNumbers, is_whole
from persona_ray.store.backend import METADATA_NAME
from persona_ray.store.encoding import decode_unit
from persona_ray.store.info import store_info
from persona_ray.store.layout import activations_name, chunk_key, parquet_key, planned_columns, score_array, unit_arrays
from persona_ray.store.ledger import Ledger, count_rows
from persona_ray.store.looks import AxisLook, latest_look
from persona_ray.store.marker import Marker
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.reduced import LATEST_REDUCED_KEY, has_reduced, read_reduced
from persona_ray.store.rows import Rows
from persona_ray.store.scores import LATEST_SCORES_KEY
from persona_ray.store.snapshot import Snapshot, keep_view, read_view
from persona_ray.store.text import decode_rollouts

AHEAD_BYTES = 512_000_000
"""What is read and decoded before it is asked for, at most; but always one unit."""
MAX_AHEAD = 8
MAX_PARTS_AHEAD = 32
"""Units of which only parts are read, by small requests: most of the time is waiting."""


def open_store(url: str, at: str | None = None) -> StoreReader:
    """The store at `url`, read-only; `at`: as it was when its ledger had that digest. Raises InputError if there is none."""
    return StoreReader(url, at)


class StoreReader:
    """A store that is there. Pickles as its URL and state."""

    def __init__(self, url: str, at: str | None = None) -> None:
        """Reads the plans, and the state `at` if one is asked for; nothing else. Raises InputError if there is no store."""
        self.url = absolute_url(url)
        self.at = at
        self._backend = open_backend(self.url)
        self._view = None if at is None else self._state(at)
        self._ledgers: list[Ledger] = []
        self._numbers = UnitNumbers(self._backend)
        self._refreshing = Lock()
        self._set_plans(read_plans(self._backend))

    def __reduce__(self) -> tuple[type[StoreReader], tuple[str, str | None]]:
        """Travels as its URL and state; connections do not travel."""
        return StoreReader, (self.url, self.at)

    # ---- what it is

    @property
    def plans(self) -> Plans:
        """What was asked for, as of the last look: `refresh` looks again."""
        return self._plans

    @property
    def identity(self) -> dict[str, Any]:
        """`Identity.as_dict()` of the store."""
        return self._plans.identity

    @property
    def job(self) -> dict[str, Any]:
        """The job that began the store, as plain JSON values."""
        return self._plans.first.job

    @property
    def archetypes(self) -> tuple[str, ...]:
        """Names; the position is the code."""
        return self._plans.archetypes

    @property
    def default_archetypes(self) -> tuple[str, ...]:
        """Those that are the default Assistant."""
        return self._plans.default_archetypes

    @property
    def layers(self) -> tuple[int, ...]:
        """Captured decoder blocks, rising, from all sets of layers; of a store opened at a state, those that it had."""
        return tuple(sorted(layer for layers in self._layer_sets for layer in layers))

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return self._plans.hidden_size

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root group."""
        return dict(json.loads(self._backend.get(METADATA_NAME))["attributes"])

    @property
    def ledger(self) -> Ledger:
        """Which units exist."""
        return self._ledgers[0]

    def refresh(self) -> None:
        """Take in plans and sets of layers that were added since."""
        with self._refreshing:
            self._set_plans(read_plans(self._backend))

    # ---- which rows there are

    def units(self, layers: Sequence[int] | None = None, at: Snapshot | None = None) -> tuple[int, ...]:
        """Units that are committed with all of `layers` (None: those that the store began with), rising.

        As the ledger was in the state `at`; None: now, by one listing for each set of layers.
        """
        wanted = self._plans.layer_sets[0] if layers is None else layers
        sets = sorted({0, *self._places(wanted)})
        committed = [self._ledgers[number].committed() if at is None else frozenset(at.markers[number]) for number in sets]
        return tuple(sorted(frozenset.intersection(*committed)))

    def snapshot(self) -> Snapshot:
        """The state of the ledger now; of a store opened at a state, that one."""
        return self._view or Snapshot.of([ledger.marker_bytes() for ledger in self._ledgers])

    def state_of(self, units: Iterable[int], layers: Sequence[int], at: Snapshot) -> str:
        """Digest of the markers of `units` with `layers` in the state `at`: as long as it is the same, so are their numbers."""
        return at.part(units, {0, *self._places(layers)}).digest

    def cite(self) -> str:
        """Keep the state of now, so that `open_store(url, at=...)` finds it for ever; answers its digest. Writes one object."""
        return self.keep(self.snapshot())

    def keep(self, snapshot: Snapshot) -> str:
        """`cite` for a state that was taken before."""
        return keep_view(self._backend, snapshot)

    def counts(self, rows: Iterable[int] | None = None) -> RunCounts:
        """Rows asked for (of all plans, or `rows` alone), stored, and refused with their reasons."""
        markers = self.ledger.markers()
        if any(unit not in self._plans for unit in markers):
            self.refresh()
        wanted = (row for unit in self._plans.units for row in self._plans.rows(unit)) if rows is None else rows
        return count_rows(self._plans, markers, wanted)

    def markers(self) -> list[dict[int, Marker]]:
        """For each set of layers: unit -> its marker, by rising unit."""
        return [ledger.markers() for ledger in self._ledgers]

    def rows(self, layers: Sequence[int] | None = None) -> Rows:
        """All committed, stored rows (with all of `layers`), to pick from; reads markers, no numbers.

        Raises InputError for a layer that was not captured.
        """
        wanted = tuple(self._plans.layer_sets[0] if layers is None else layers)
        rows_N = self._stored_rows(wanted)
        # Second: a unit that is there may have brought in a plan that came later.
        picked = {name: values[rows_N] for name, values in self._columns.items() if name != "rollout"}
        return Rows(self, wanted, rows_N, picked)

    def select(self, *, layers: Sequence[int] | None = None, **wanted: Any) -> Rows:
        """`rows(layers).where(**wanted)`."""
        return self.rows(layers).where(**wanted)

    # ---- text and numbers

    def rollouts(self, units: Sequence[int]) -> Iterator[tuple[Rollout, ...]]:
        """The units' text, refused rows included. Raises IntegrityError for a unit without text."""
        yield from read_ahead(self._text, units, MAX_AHEAD)

    def scored_rows(
        self, units: Sequence[int], scores: str | None, layers: Sequence[int] | None = None, among: Sequence[int] | None = None
    ) -> Iterator[ScoredRows]:
        """The units' committed, stored rows with the scores of judge `scores` (None: -1 everywhere), for one pass over a store.

        `layers`: which, in which order (None: those that the store began with). `among`: rows count that are stored with all of these
        layers, too, so that passes over some of them see the same rows. A unit that is not committed gives nothing. Each
        unit is one read of a whole object for each set of layers, or reads of its parts where few layers are asked for, and the next
        ones are read meanwhile. Raises IntegrityError for damage.
        """
        wanted = tuple(self._plans.layer_sets[0] if layers is None else layers)
        having = (*wanted, *(among or ()))
        units_rows = read_ahead(partial(self._scored_unit, scores=scores, layers=wanted, having=having), units, self._depth(wanted))
        yield from (rows for rows in units_rows if rows is not None)

    def layer(self, layer: int) -> tuple[npt.NDArray[np.int64], Float32]:
        """All committed, stored rows of decoder block `layer`: row indices (N,), activations (N, D) float32.

        Raises InputError if the layer was not captured.
        """
        rows = self.rows([layer])
        return rows.rollout_N, rows.layer(layer)

    def activations(self, rows_N: npt.NDArray[np.int64], layers: Sequence[int]) -> Float32:
        """(N, L, D) of committed, stored rows (rising), layers in the order asked for.

        Raises IntegrityError for a row that is NaN or whose unit is not committed with all of `layers`, and for damage.
        """
        self._places(layers)
        values_NLD = np.empty((len(rows_N), len(layers), self.hidden_size), dtype=np.float32)
        if not values_NLD.size:
            return values_NLD

        def fill(part: slice) -> None:
            self._committed_into(values_NLD[part], rows_N[part], layers)

        for _ in read_ahead(fill, self._parts_by_unit(rows_N), self._depth(layers)):
            pass  # each has filled its part
        return values_NLD

    def scores(self, name: str | None, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """(N,) scores of rows (rising) by judge `name`; -1 where there is none. Raises InputError if that judge has never been here."""
        if name is None or not len(rows_N):
            return np.full(len(rows_N), NOT_SCORED, dtype=np.int8)
        if self._backend.get_or_none(f"scores/{name}/{METADATA_NAME}") is None:
            raise InputError(f"{self.url}: no judge {name} has scored here; the one in force is {self.latest_scores() or 'none'}")
        parts = list(self._parts_by_unit(rows_N))
        units = [self._plans.unit_of(int(rows_N[part.start])) for part in parts]
        score_N = np.empty(len(rows_N), dtype=np.int8)
        scores_of_units = read_ahead(partial(self._unit_scores, name=name), units, MAX_PARTS_AHEAD)
        for part, unit, score_R in zip(parts, units, scores_of_units, strict=True):
            score_N[part] = score_R[rows_N[part] - unit * self._plans.unit_rows]
        return score_N

    # ---- what was concluded

    def latest_scores(self) -> str | None:
        """Name of the judge in force."""
        return self._latest(LATEST_SCORES_KEY)

    def latest_reduced(self) -> str | None:
        """Name of the result in force."""
        return self._latest(LATEST_REDUCED_KEY)

    def latest_look(self) -> AxisLook | None:
        """What a run has seen of its axis last, before there was a result; None where none has looked."""
        return latest_look(self._backend)

    def scored_units(self, name: str) -> frozenset[int]:
        """Units that judge `name` has scored; one listing."""
        chunk = re.compile(rf"{re.escape(score_array(self._plans, name).name)}/c/(\d+)")
        matches = (chunk.fullmatch(key) for key in self._backend.list_keys(f"scores/{name}/score"))
        return frozenset(int(match.group(1)) for match in matches if match)

    def reduced(self, name: str) -> Reduced:
        """The result `name`. Raises InputError if there is none."""
        return read_reduced(self._backend, name)

    def reduced_or_none(self, name: str) -> Reduced | None:
        """The result `name`, or None if there is none."""
        return self.reduced(name) if has_reduced(self._backend, name) else None

    def info(self) -> dict[str, Any]:
        """What the store holds right now, as plain JSON values: see `store.info`."""
        return store_info(self)

    # ---- how

    def _set_plans(self, plans: Plans) -> None:
        self._arrays = unit_arrays(plans)
        self._columns = planned_columns(plans)
        num_sets = len(plans.layer_sets) if self._view is None else min(len(plans.layer_sets), len(self._view.markers))
        self._ledgers += [Ledger(self.url, layer_set, self._view) for layer_set in range(len(self._ledgers), num_sets)]
        # Last: who sees a unit in the plans, in whatever thread, finds everything else.
        self._plans = plans

    def _state(self, digest: str) -> Snapshot:
        """Also the state of now, which nobody needs to have kept."""
        try:
            return read_view(self._backend, digest)
        except InputError:
            plans = read_plans(self._backend)
            now = Snapshot.of([Ledger(self.url, layer_set).marker_bytes() for layer_set in range(len(plans.layer_sets))])
            if now.digest != digest:
                raise
            return now

    @property
    def _layer_sets(self) -> tuple[tuple[int, ...], ...]:
        return self._plans.layer_sets[: len(self._ledgers)]

    def _places(self, layers: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
        """Set of layers -> (place in `layers`, place in the set's array) of each that it has. Raises InputError."""
        found: dict[int, list[tuple[int, int]]] = {}
        sets = self._layer_sets
        for place, layer in enumerate(layers):
            layer_set = next((number for number, has in enumerate(sets) if layer in has), None)
            if layer_set is None:
                raise InputError(f"{self.url}: layer {layer} was not captured; there are {list(self.layers)}")
            found.setdefault(layer_set, []).append((place, sets[layer_set].index(layer)))
        return found

    def _depth(self, layers: Sequence[int]) -> int:
        """How many units are read ahead for `layers`: for parts of objects more than for whole ones."""
        by_set = self._places(layers).items()
        wholes = (is_whole(self._arrays[activations_name(number)], [there for _, there in places]) for number, places in by_set)
        unit_bytes = 4 * self._plans.unit_rows * len(layers) * self.hidden_size
        return int(np.clip(AHEAD_BYTES // max(1, unit_bytes), 1, MAX_AHEAD if any(wholes) else MAX_PARTS_AHEAD))

    def _parts_by_unit(self, rows_N: npt.NDArray[np.int64]) -> Iterator[slice]:
        """Of rising rows, those of each unit."""
        units_N = rows_N // self._plans.unit_rows
        bounds = [0, *(np.flatnonzero(np.diff(units_N)) + 1).tolist(), len(rows_N)]
        return (slice(first, end) for first, end in pairwise(bounds) if first < end)

    def _committed_into(self, out_RLD: Float32, rows_R: npt.NDArray[np.int64], layers: Sequence[int]) -> None:
        """Rows of one unit."""
        unit = self._plans.unit_of(int(rows_R[0]))
        if self._markers(unit, layers) is None:
            lack = f"unit {unit:06d} (row {rows_R[0]}) is not committed with layers {list(layers)}"
            raise IntegrityError(f"{self.url}: {lack}; pick rows that have them: rows({list(layers)})")
        self._read_into(out_RLD, unit, rows_R, layers)

    def _read_into(self, out_RLD: Float32, unit: int, rows_R: npt.NDArray[np.int64], layers: Sequence[int]) -> None:
        places_R = rows_R - unit * self._plans.unit_rows
        is_finite = True
        for layer_set, places in self._places(layers).items():
            is_finite &= self._numbers.read(self._arrays[activations_name(layer_set)], unit, places, places_R, out_RLD)
        if not is_finite:
            raise self._broken(out_RLD, rows_R)

    def _text(self, unit: int) -> tuple[Rollout, ...]:
        key = parquet_key(unit)
        return decode_rollouts(self._backend.get(key), f"{self.url}: {key}")

    def _markers(self, unit: int, layers: Sequence[int]) -> list[Marker] | None:
        """The unit's markers for all of `layers`; None if one is not there (yet)."""
        markers = [self._ledgers[layer_set].marker(unit) for layer_set in sorted({0, *self._places(layers)})]
        found = [marker for marker in markers if marker is not None]
        return found if len(found) == len(markers) else None

    def _scored_unit(self, unit: int, scores: str | None, layers: Sequence[int], having: Sequence[int]) -> ScoredRows | None:
        markers = self._markers(unit, having)
        if markers is None:
            return None
        if unit not in self._plans:
            self.refresh()
        rows_R = _stored(self._plans.rows(unit), markers)
        # As they are decoded, layer by layer; handed out with the dims in order.
        values_LRD = np.empty((len(layers), len(rows_R), self.hidden_size), dtype=np.float32)
        activations_RLD = np.moveaxis(values_LRD, 0, 1)
        self._read_into(activations_RLD, unit, rows_R, layers)
        return ScoredRows(
            rollout_R=rows_R,
            archetype_R=self._columns["archetype"][rows_R].astype(np.int32),
            score_R=self._unit_scores(unit, scores)[rows_R - unit * self._plans.unit_rows],
            activations_RLD=activations_RLD,
        )

    def _unit_scores(self, unit: int, name: str | None) -> npt.NDArray[np.int8]:
        """Of the whole unit; -1 where the judge has not spoken."""
        spec = None if name is None else score_array(self._plans, name)
        data = None if spec is None else self._backend.get_or_none(chunk_key(spec, unit))
        if spec is None or data is None:
            return np.full(self._plans.unit_rows, NOT_SCORED, dtype=np.int8)
        return decode_unit(spec, data, f"{self.url}: {chunk_key(spec, unit)}")

    def _stored_rows(self, layers: Sequence[int]) -> npt.NDArray[np.int64]:
        """Rising."""
        by_set = [self._ledgers[layer_set].markers() for layer_set in sorted({0, *self._places(layers)})]
        units = sorted(frozenset.intersection(*(frozenset(markers) for markers in by_set)))
        if any(unit not in self._plans for unit in units):
            self.refresh()
        rows = [_stored(self._plans.rows(unit), [markers[unit] for markers in by_set]) for unit in units]
        return np.concatenate([np.empty(0, dtype=np.int64), *rows])

    def _broken(self, values_RLD: Float32, rows_R: npt.NDArray[np.int64]) -> IntegrityError:
        """Committed rows of a unit that are not finite, as they always are."""
        is_broken_R = ~np.isfinite(values_RLD).all(axis=(1, 2))
        first = int(rows_R[np.argmax(is_broken_R)])
        return IntegrityError(
            f"{self.url}: {int(is_broken_R.sum())} committed rows hold NaN or Inf (first: row {first}, "
            f"unit {self._plans.unit_of(first):06d}); `persona-ray verify` says what is wrong there"
        )

    def _latest(self, key: str) -> str | None:
        data = self._backend.get_or_none(key)
        return None if data is None else str(json.loads(data)["name"])


def _stored(rows: range, markers: Sequence[Marker]) -> npt.NDArray[np.int64]:
    """Those of `rows` that no marker refuses."""
    refused = {row for marker in markers for row in marker.refused}
    return np.array([row for row in rows if row not in refused], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A `spec.RowSource` that travels: it opens the store in the process that reads."""

    url: str
    scores: str | None
    """Name of the judge whose scores come along."""
    layers: tuple[int, ...] | None = None
    """Which, in which order; None: those that the store began with."""
    among: tuple[int, ...] | None = None
    """Rows count that are stored with all of these, too."""

    def __call__(self, units: Sequence[int]) -> Iterator[ScoredRows]:
        """The units' stored rows, in the order asked for. Raises RetryableError if one of them is not committed (any more)."""
        num_found = 0
        for rows in open_store(self.url).scored_rows(units, self.scores, self.layers, self.among):
            num_found += 1
            yield rows
        if num_found < len(units):
            gone = f"{len(units) - num_found} of {len(units)} units are not committed any more"
            raise RetryableError(f"{self.url}: {gone}; were they requeued while they were read? Run the same command again")
