"""Numbers of units from their objects: from the whole one, or from those inner chunks of a shard that are asked for.

The shapes are those that the plans give, because the metadata that a service holds may be behind them. Knows no ledger: whoever
asks has seen to it that the unit is committed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from persona_ray.errors import IntegrityError
from persona_ray.spec import Float32
from persona_ray.store.backend import Backend
from persona_ray.store.bfloat16 import NATIVE
from persona_ray.store.blocks import Index, decode_index, decode_inner, index_bytes, inner_chunk, span_of
from persona_ray.store.cores import DECODING
from persona_ray.store.layout import ArraySpec, chunk_key

WHOLE_FROM = 0.5
"""Share of a unit's layers above which its object is read whole, by one request, instead of an index and parts."""
MAX_INDICES = 4096
"""Kept for the next layer; each takes 16 bytes a layer."""
DAMAGE = (ValueError, RuntimeError)
"""What `blocks` raises for bytes that it cannot decode."""

Chunks = Mapping[int, memoryview | None]
"""Place in the shard -> its inner chunk; None: it was never written."""


def is_whole(spec: ArraySpec, places: Iterable[int]) -> bool:
    """Whether so many different layers of an array of activations are read by whole objects."""
    return len(set(places)) > spec.shape[1] * WHOLE_FROM


class UnitNumbers:
    """Activations of units, layer by layer. Threads may share it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = Lock()
        self._indices: OrderedDict[str, Index] = OrderedDict()

    def read(self, spec: ArraySpec, unit: int, places: Sequence[tuple[int, int]], rows_R: npt.NDArray[np.int64], out_RLD: Float32) -> bool:
        """`out_RLD[:, place] = shard[rows_R, place in the shard]`, for each such pair of `places`; whether all of it is finite.

        By one request for the whole object or, for few layers, by one for the index, which is kept, and one for each run of
        neighbours. Raises IntegrityError for an object that is missing, and for damage in what is asked for.
        """
        key, wanted = chunk_key(spec, unit), sorted({there for _, there in places})
        if not is_whole(spec, wanted):
            try:
                return _decode(spec, self._parts(spec, key, wanted), places, rows_R, out_RLD)
            except DAMAGE:
                # Damaged, or made anew since its index was read: the whole object tells.
                self._forget(key)
        try:
            return _decode(spec, self._whole(spec, key, wanted), places, rows_R, out_RLD)
        except DAMAGE as error:
            raise IntegrityError(f"{self._backend.url}: {key}: {spec.name} cannot be decoded ({error})") from error

    def _whole(self, spec: ArraySpec, key: str, wanted: Sequence[int]) -> Chunks:
        shard = self._backend.get(key)
        if not shard:
            raise IntegrityError(f"{self._backend.url}: {key}: {spec.name} is an empty object")
        index_L2 = decode_index(shard, spec.shape[1])
        return {place: inner_chunk(shard, index_L2, place) for place in wanted}

    def _parts(self, spec: ArraySpec, key: str, wanted: Sequence[int]) -> Chunks:
        index_L2 = self._index(spec, key)
        spans = {place: span_of(index_L2, place) for place in wanted}
        found: dict[int, memoryview | None] = dict.fromkeys(spans)
        for run in _runs({place: span for place, span in spans.items() if span is not None}):
            first = run[0][1]
            part = memoryview(self._backend.get_part(key, first, run[-1][2]))
            found |= {place: part[start - first : stop - first] for place, start, stop in run}
        return found

    def _index(self, spec: ArraySpec, key: str) -> Index:
        with self._lock:
            if key in self._indices:
                self._indices.move_to_end(key)
                return self._indices[key]
        index_L2 = decode_index(self._backend.get_part(key, -index_bytes(spec.shape[1])), spec.shape[1])
        with self._lock:
            self._indices[key] = index_L2
            while len(self._indices) > MAX_INDICES:
                self._indices.popitem(last=False)
        return index_L2

    def _forget(self, key: str) -> None:
        with self._lock:
            self._indices.pop(key, None)


def _runs(spans: Mapping[int, tuple[int, int]]) -> list[list[tuple[int, int, int]]]:
    """(place, first byte, byte behind the last) as they lie, those together that follow each other without a gap."""
    runs: list[list[tuple[int, int, int]]] = []
    for place, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if runs and runs[-1][-1][2] == start:
            runs[-1].append((place, start, stop))
        else:
            runs.append([(place, start, stop)])
    return runs


def _decode(spec: ArraySpec, chunks: Chunks, places: Sequence[tuple[int, int]], rows_R: npt.NDArray[np.int64], out_RLD: Float32) -> bool:
    unit_rows, _, width = spec.shards or spec.chunks
    dtype = NATIVE if spec.dtype == NATIVE.name else np.dtype(spec.dtype)
    spare_RD = np.empty((0, width), dtype=dtype)
    is_unit = np.array_equal(rows_R, np.arange(unit_rows))
    is_finite = True
    with DECODING:
        for place, there in places:
            target_RD = out_RLD[:, place]
            if is_unit and dtype == target_RD.dtype and target_RD.flags.c_contiguous:
                decode_inner(target_RD, chunks[there], spec.fill)
            else:
                if not len(spare_RD):
                    spare_RD = np.empty((unit_rows, width), dtype=dtype)
                decode_inner(spare_RD, chunks[there], spec.fill)
                target_RD[...] = spare_RD[rows_R]
            # Here, while it is at hand in the processor's cache.
            is_finite = is_finite and bool(np.isfinite(target_RD).all())
    return is_finite
