"""The numbers of two stores, layer by layer, over the rows that both have.

Unit by unit of A; the units of B that hold the same rows are kept for the next ones. So many layers are compared in one pass as
let all units of B fit that one unit of A meets; of stores in nearly the same order each object is read once, and of others once
for every few layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from persona_ray.spec import Float32, Float64, ProgressCallback, RowKey
from persona_ray.store.ahead import read_ahead
from persona_ray.store.diff_side import Side
from persona_ray.store.read_once import ReadOnce

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


def layer_differences(
    a: Side, b: Side, both: Sequence[RowKey], layers: Sequence[int], tolerance: float | None, progress: ProgressCallback
) -> list[LayerDifference]:
    """The numbers of `layers`, which both stores have, over the rows `both`; by rising layer. See `diff_stores`."""
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


def relative_differences(a_ND: Float32, b_ND: Float32) -> Float64:
    """(N,): L2 norm of a - b by the larger of both norms; 0 where both are 0."""
    wide_a, wide_b = a_ND.astype(np.float64), b_ND.astype(np.float64)
    largest_N = np.maximum(np.linalg.norm(wide_a, axis=-1), np.linalg.norm(wide_b, axis=-1))
    apart_N = np.linalg.norm(wide_a - wide_b, axis=-1)
    relative_N: Float64 = np.divide(apart_N, largest_N, out=np.zeros_like(apart_N), where=largest_N > 0)
    return relative_N


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


def _pairs(a: Side, b: Side, both: Sequence[RowKey], set_a: int, set_b: int, layers: Sequence[int]) -> _Pairs:
    by_unit: dict[int, list[RowKey]] = {}
    only = [0, 0]
    for key in both:
        in_a, in_b = a.has_numbers(key, set_a), b.has_numbers(key, set_b)
        if in_a and in_b:
            by_unit.setdefault(a.plans.unit_of(a.rows[key]), []).append(key)
        only[0] += in_a and not in_b
        only[1] += in_b and not in_a
    return _Pairs(tuple(layers), by_unit, *only)


def _passes(b: Side, pairs: _Pairs) -> Iterator[tuple[int, ...]]:
    """As many layers at once as let all of B's units stay that one unit of A needs."""
    needed = max((len({b.plans.unit_of(b.rows[key]) for key in keys}) for keys in pairs.by_unit.values()), default=1)
    step = max(1, CACHE_BYTES // (needed * _unit_bytes(b, 1)))
    for start in range(0, len(pairs.layers), step):
        yield pairs.layers[start : start + step]


def _unit_bytes(side: Side, num_layers: int) -> int:
    return 4 * side.plans.unit_rows * side.plans.hidden_size * num_layers


def _compare(a: Side, b: Side, pairs: _Pairs, layers: Sequence[int], tolerance: float | None, progress: ProgressCallback) -> list[_Sums]:
    """One pass, (L,)."""
    capacity = max(1, CACHE_BYTES // _unit_bytes(b, len(layers)))
    units_of_b = ReadOnce(partial(_numbers_of_unit, b, layers, _wanted(b, pairs)), capacity)
    sums = [_Sums() for _ in layers]
    for found in read_ahead(lambda unit: _compare_unit(a, b, pairs.by_unit[unit], layers, units_of_b, tolerance), pairs.by_unit, AHEAD):
        for total, part in zip(sums, found, strict=True):
            total.add(part)
        progress(1)
    return sums


def _wanted(b: Side, pairs: _Pairs) -> Mapping[int, npt.NDArray[np.int64]]:
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


def _numbers_of_unit(side: Side, layers: Sequence[int], wanted: Mapping[int, npt.NDArray[np.int64]], unit: int) -> _Numbers:
    return _Numbers(wanted[unit], side.store.activations(wanted[unit], layers))


def _compare_unit(
    a: Side, b: Side, keys: Sequence[RowKey], layers: Sequence[int], units_of_b: ReadOnce[_Numbers], tolerance: float | None
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
