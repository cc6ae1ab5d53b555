"""Are two stores equal as sets of rows? By row key, whatever their units and order: texts, token ids, status, and every number.

Texts are compared by digests, so each is read once. Numbers go unit by unit of A; the units of B that hold the same rows
are kept for the next ones. So many layers are compared in one pass as let all units of B fit that one unit of A meets; of
stores in nearly the same order each object is read once, and of others once for every few layers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import numpy.typing as npt

from persona_ray.spec import Float32, Float64, ProgressCallback, Rollout, RowKey
from persona_ray.store.ahead import read_ahead
from persona_ray.store.identity import FieldDifference, differing_fields
from persona_ray.store.marker import Marker
from persona_ray.store.plans import Plans
from persona_ray.store.reader import StoreReader

CACHE_BYTES = 1_000_000_000
"""Decoded numbers of B that are kept."""
AHEAD = 2
"""Units of A under way at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """The numbers of one decoder block, over rows that both stores have.

    Relative difference of two rows: the L2 norm of a - b divided by the larger of the norms of a and b; 0 = equal, 2 = opposite.
    """

    layer: int
    rows: int
    """That were compared."""
    only_in_a: int
    """Rows with numbers in A alone, because B refused them or does not have them with this layer yet."""
    only_in_b: int
    bit_equal: int
    """Rows equal in every bit."""
    outside: int
    """Rows further apart than the tolerance; without one, rows that are not bit-equal."""
    max_relative: float
    mean_relative: float
    worst: RowKey | None
    """The row of `max_relative`; None if that is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDifference:
    """What two stores do not share. Rows are those of committed units, refused ones included."""

    a: str
    b: str
    tolerance: float | None
    identity: tuple[FieldDifference, ...]
    """For information: units of another size do not make other rows."""
    both: int
    """Rows that both have."""
    only_in_a: tuple[RowKey, ...]
    only_in_b: tuple[RowKey, ...]
    status: tuple[RowKey, ...]
    """Refused in one alone."""
    texts: tuple[RowKey, ...]
    """Prompt, question, answer, reasoning or the reason of its end differ."""
    token_ids: tuple[RowKey, ...]
    """Token ids or the pooled range differ."""
    layers: tuple[LayerDifference, ...]
    """Of the layers that both have, rising."""
    layers_only_in_a: tuple[int, ...]
    layers_only_in_b: tuple[int, ...]

    @property
    def is_equal(self) -> bool:
        """Whether both are the same set of rows, numbers within the tolerance."""
        lists = (self.only_in_a, self.only_in_b, self.status, self.texts, self.token_ids, self.layers_only_in_a, self.layers_only_in_b)
        return not any(lists) and not any(layer.outside or layer.only_in_a or layer.only_in_b for layer in self.layers)


def diff_stores(
    a: StoreReader, b: StoreReader, *, tolerance: float | None = None, progress: ProgressCallback = lambda _: None
) -> StoreDifference:
    """Compare all committed rows of `a` and `b`. `tolerance`: largest relative difference that counts as equal; None: bit-equal.

    Takes at most about 1 GB for numbers, and 32 bytes for each row's text. `progress` counts units read of A, once for text and
    once for each pass over the numbers. Raises IntegrityError for an object that is missing or damaged.
    """
    sides = _Side.of(a), _Side.of(b)
    one, other = sides
    both = [key for key in one.rows if key in other.rows]
    texts, token_ids = _text_differences(one, other, both, progress)
    shared = sorted(set(one.layers) & set(other.layers)) if a.hidden_size == b.hidden_size else []
    return StoreDifference(
        a=a.url,
        b=b.url,
        tolerance=tolerance,
        identity=tuple(differing_fields(a.identity, b.identity)),
        both=len(both),
        only_in_a=tuple(key for key in one.rows if key not in other.rows),
        only_in_b=tuple(key for key in other.rows if key not in one.rows),
        status=tuple(key for key in both if one.is_refused(key) != other.is_refused(key)),
        texts=texts,
        token_ids=token_ids,
        layers=tuple(_layer_differences(one, other, both, shared, tolerance, progress)),
        layers_only_in_a=tuple(layer for layer in one.layers if layer not in shared),
        layers_only_in_b=tuple(layer for layer in other.layers if layer not in shared),
    )


def relative_differences(a_ND: Float32, b_ND: Float32) -> Float64:
    """(N,): L2 norm of a - b by the larger of both norms; 0 where both are 0."""
    wide_a, wide_b = a_ND.astype(np.float64), b_ND.astype(np.float64)
    largest_N = np.maximum(np.linalg.norm(wide_a, axis=-1), np.linalg.norm(wide_b, axis=-1))
    apart_N = np.linalg.norm(wide_a - wide_b, axis=-1)
    relative_N: Float64 = np.divide(apart_N, largest_N, out=np.zeros_like(apart_N), where=largest_N > 0)
    return relative_N


# ---- one store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two stores, as its markers were at the beginning."""

    store: StoreReader
    plans: Plans
    markers: Sequence[Mapping[int, Marker]]
    """By set of layers."""
    rows: Mapping[RowKey, int]
    """Rows of committed units, rising."""

    @classmethod
    def of(cls, store: StoreReader) -> _Side:
        markers = store.markers()
        if any(unit not in store.plans for unit in markers[0]):
            store.refresh()
        plans = store.plans
        units = [unit for unit in markers[0] if unit in plans]
        rows = {key: row for unit in units for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True)}
        return cls(store, plans, markers, rows)

    @property
    def units(self) -> list[int]:
        return [unit for unit in self.markers[0] if unit in self.plans]

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all sets that were there at the beginning, rising."""
        return tuple(sorted(layer for layers in self.plans.layer_sets[: len(self.markers)] for layer in layers))

    def is_refused(self, key: RowKey) -> bool:
        """With the layers that the store began with."""
        row = self.rows[key]
        return row in self.markers[0][self.plans.unit_of(row)].refused

    def layer_set(self, layer: int) -> int:
        return next(number for number, layers in enumerate(self.plans.layer_sets) if layer in layers)

    def has_numbers(self, key: RowKey, layer_set: int) -> bool:
        """Whether its unit has a marker for the set too, and no marker refuses it."""
        row = self.rows[key]
        found = [self.markers[number].get(self.plans.unit_of(row)) for number in {0, layer_set}]
        return all(marker is not None and row not in marker.refused for marker in found)

    def digests(self, progress: ProgressCallback) -> Mapping[int, tuple[bytes, bytes]]:
        """Row -> digests of its text and of its token ids."""
        found: dict[int, tuple[bytes, bytes]] = {}
        for rollouts in self.store.rollouts(self.units):
            found |= {rollout.index: _digests(rollout) for rollout in rollouts}
            progress(1)
        return found


def _digests(rollout: Rollout) -> tuple[bytes, bytes]:
    said = (rollout.system_prompt, rollout.question, rollout.response, rollout.thinking, rollout.finish_reason.name)
    texts = "\x1e".join(f"{len(text)}\x1f{text}" for text in said)
    spans = np.array([rollout.response_start, rollout.response_end], dtype=np.int64).tobytes()
    token_ids = np.asarray(rollout.token_ids, dtype=np.int32).tobytes()
    return _digest(texts.encode("utf-8", "surrogatepass")), _digest(spans + token_ids)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _text_differences(
    a: _Side, b: _Side, both: Sequence[RowKey], progress: ProgressCallback
) -> tuple[tuple[RowKey, ...], tuple[RowKey, ...]]:
    """Rows whose texts differ, and rows whose token ids or spans do."""
    of_a, of_b = a.digests(progress), b.digests(lambda _: None)
    pairs = [(key, of_a[a.rows[key]], of_b[b.rows[key]]) for key in both]
    texts, token_ids = ([key for key, one, other in pairs if one[place] != other[place]] for place in range(2))
    return tuple(texts), tuple(token_ids)


# ---- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    """One layer so far. Two of them add up to that of both parts."""

    rows: int = 0
    bit_equal: int = 0
    outside: int = 0
    total: float = 0.0
    worst: float = 0.0
    worst_key: RowKey | None = None

    def add(self, other: _Sums) -> None:
        self.rows += other.rows
        self.bit_equal += other.bit_equal
        self.outside += other.outside
        self.total += other.total
        if other.worst > self.worst:
            self.worst, self.worst_key = other.worst, other.worst_key


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Rows with numbers in both stores, for layers that are in one set here and in one there."""

    layers: tuple[int, ...]
    by_unit: Mapping[int, Sequence[RowKey]]
    """Unit of A -> its rows, rising."""
    only_in_a: int
    only_in_b: int


def _layer_differences(
    a: _Side, b: _Side, both: Sequence[RowKey], layers: Sequence[int], tolerance: float | None, progress: ProgressCallback
) -> list[LayerDifference]:
    groups: dict[tuple[int, int], list[int]] = {}
    for layer in layers:
        groups.setdefault((a.layer_set(layer), b.layer_set(layer)), []).append(layer)
    found: list[LayerDifference] = []
    for (of_a, of_b), members in groups.items():
        pairs = _pairs(a, b, both, of_a, of_b, members)
        for some in _passes(b, pairs):
            sums = _compare(a, b, pairs, some, tolerance, progress)
            found += [_layer_difference(layer, pairs, of_layer) for layer, of_layer in zip(some, sums, strict=True)]
    return sorted(found, key=lambda difference: difference.layer)


def _pairs(a: _Side, b: _Side, both: Sequence[RowKey], set_a: int, set_b: int, layers: Sequence[int]) -> _Pairs:
    by_unit: dict[int, list[RowKey]] = {}
    only = [0, 0]
    for key in both:
        in_a, in_b = a.has_numbers(key, set_a), b.has_numbers(key, set_b)
        if in_a and in_b:
            by_unit.setdefault(a.plans.unit_of(a.rows[key]), []).append(key)
        only[0] += in_a and not in_b
        only[1] += in_b and not in_a
    return _Pairs(tuple(layers), by_unit, *only)


def _passes(b: _Side, pairs: _Pairs) -> Iterator[tuple[int, ...]]:
    """As many layers at once as let all of B's units stay that one unit of A needs."""
    needed = max((len({b.plans.unit_of(b.rows[key]) for key in keys}) for keys in pairs.by_unit.values()), default=1)
    step = max(1, CACHE_BYTES // (needed * _unit_bytes(b, 1)))
    for start in range(0, len(pairs.layers), step):
        yield pairs.layers[start : start + step]


def _unit_bytes(side: _Side, num_layers: int) -> int:
    return 4 * side.plans.unit_rows * side.plans.hidden_size * num_layers


def _compare(a: _Side, b: _Side, pairs: _Pairs, layers: Sequence[int], tolerance: float | None, progress: ProgressCallback) -> list[_Sums]:
    """One pass, (L,)."""
    capacity = max(1, CACHE_BYTES // _unit_bytes(b, len(layers)))
    units_of_b = _Kept(partial(_numbers_of_unit, b, layers, _wanted(b, pairs)), capacity)
    sums = [_Sums() for _ in layers]
    for found in read_ahead(lambda unit: _compare_unit(a, b, pairs.by_unit[unit], layers, units_of_b, tolerance), pairs.by_unit, AHEAD):
        for total, part in zip(sums, found, strict=True):
            total.add(part)
        progress(1)
    return sums


def _wanted(b: _Side, pairs: _Pairs) -> Mapping[int, npt.NDArray[np.int64]]:
    """Unit of B -> its rows that are compared, rising."""
    rows: dict[int, list[int]] = {}
    for keys in pairs.by_unit.values():
        for key in keys:
            row = b.rows[key]
            rows.setdefault(b.plans.unit_of(row), []).append(row)
    return {unit: np.array(sorted(members), dtype=np.int64) for unit, members in rows.items()}


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Rows of one unit."""

    rollout_N: npt.NDArray[np.int64]
    """Rising."""
    values_NLD: Float32

    def of(self, row: int) -> Float32:
        """(L, D)."""
        values_LD: Float32 = self.values_NLD[np.searchsorted(self.rollout_N, row)]
        return values_LD


def _numbers_of_unit(side: _Side, layers: Sequence[int], wanted: Mapping[int, npt.NDArray[np.int64]], unit: int) -> _Numbers:
    return _Numbers(wanted[unit], side.store.activations(wanted[unit], layers))


def _compare_unit(
    a: _Side, b: _Side, keys: Sequence[RowKey], layers: Sequence[int], units_of_b: _Kept, tolerance: float | None
) -> list[_Sums]:
    """The rows of one unit of A, (L,)."""
    a_NLD = a.store.activations(np.array([a.rows[key] for key in keys], dtype=np.int64), layers)
    b_NLD = np.empty_like(a_NLD)
    for place in sorted(range(len(keys)), key=lambda place: b.rows[keys[place]]):
        row = b.rows[keys[place]]
        b_NLD[place] = units_of_b.get(b.plans.unit_of(row)).of(row)
    return [_compare_layer(keys, a_NLD[:, place], b_NLD[:, place], tolerance) for place in range(len(layers))]


def _compare_layer(keys: Sequence[RowKey], a_ND: Float32, b_ND: Float32, tolerance: float | None) -> _Sums:
    is_same_N = (np.ascontiguousarray(a_ND).view(np.uint32) == np.ascontiguousarray(b_ND).view(np.uint32)).all(axis=1)
    apart_N = relative_differences(a_ND, b_ND)
    outside_N = ~is_same_N if tolerance is None else apart_N > tolerance
    worst = int(np.argmax(apart_N))
    return _Sums(
        rows=len(keys),
        bit_equal=int(is_same_N.sum()),
        outside=int(outside_N.sum()),
        total=float(apart_N.sum()),
        worst=float(apart_N[worst]),
        worst_key=keys[worst] if apart_N[worst] > 0 else None,
    )


def _layer_difference(layer: int, pairs: _Pairs, sums: _Sums) -> LayerDifference:
    return LayerDifference(
        layer=layer,
        rows=sums.rows,
        only_in_a=pairs.only_in_a,
        only_in_b=pairs.only_in_b,
        bit_equal=sums.bit_equal,
        outside=sums.outside,
        max_relative=sums.worst,
        mean_relative=sums.total / sums.rows if sums.rows else 0.0,
        worst=sums.worst_key,
    )


class _Kept:
    """The units that were used last, each read once by whoever needs it first. For several threads."""

    def __init__(self, read: Callable[[int], _Numbers], capacity: int) -> None:
        self._read, self._capacity, self._lock = read, capacity, Lock()
        self._found: OrderedDict[int, Future[_Numbers]] = OrderedDict()

    def get(self, unit: int) -> _Numbers:
        """Reads, waits for the one who is reading it, or answers what is there."""
        with self._lock:
            found = self._found.get(unit)
            is_first = found is None
            if found is None:
                found = self._found[unit] = Future()
            self._found.move_to_end(unit)
            while len(self._found) > self._capacity:
                self._found.popitem(last=False)
        if is_first:
            try:
                found.set_result(self._read(unit))
            except BaseException as error:  # whoever waits for it gets it as well
                found.set_exception(error)
                raise
        return found.result()
