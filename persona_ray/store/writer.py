"""Writes units: text first, then numbers, then the marker. The only writer of rows; implements `UnitSink`.

Every object is created once. A second attempt at a unit, at the same time or later, finds what the first one left and
commits exactly that: which rows count as refused follows from the activations that are really stored, so the objects of a
unit fit each other whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from persona_ray.errors import IntegrityError, StateError
from persona_ray.spec import CapturedUnit, Float32, Plan, Rollout, Status
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import Backend, StoredObject
from persona_ray.store.encoding import decode_unit, encode_unit
from persona_ray.store.layout import BF16_EXACT, UNIT_COLUMNS, ArraySpec, parquet_key, unit_arrays, unit_chunk_key, unit_slice
from persona_ray.store.marker import Marker, ObjectRecord, marker_key
from persona_ray.store.plan_file import PlanFile, read_plan_file
from persona_ray.store.text import decode_rollouts, encode_rollouts

REFUSED_EARLIER = "refused by an earlier attempt at this unit"


@dataclass(frozen=True, slots=True)
class _Open:
    """What a writer has in hand once it is used."""

    backend: Backend
    header: PlanFile
    arrays: Mapping[str, ArraySpec]

    @property
    def plan(self) -> Plan:
        return self.header.plan


class UnitWriter:
    """`UnitSink` for the store at `url`, which `prepare_store` has made. Pickles as its URL and opens in the process that uses it."""

    def __init__(self, url: str) -> None:
        """Raises InputError if `url` cannot be one of a store."""
        self.url = absolute_url(url)

    def __reduce__(self) -> tuple[type[UnitWriter], tuple[str]]:
        """Travels as its URL; connections do not travel."""
        return UnitWriter, (self.url,)

    def read_rollouts(self, unit: int) -> tuple[Rollout, ...] | None:
        """The unit's text, if somebody has written it already."""
        self._check_unit(unit)
        data = self._open.backend.get_or_none(parquet_key(unit))
        return None if data is None else decode_rollouts(data, f"{self.url}: {parquet_key(unit)}")

    def write_rollouts(self, unit: int, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """Create the unit's text; answers what is really there, which may be another writer's.

        Raises IntegrityError if `rollouts` are not exactly the unit's rows in order.
        """
        self._check_unit(unit)
        _check_rows(self._open.plan, unit, rollouts)
        stored = self._open.backend.create_once(parquet_key(unit), encode_rollouts(rollouts))
        return tuple(rollouts) if stored.is_ours else self._stored_rollouts(unit)

    def commit(self, captured: CapturedUnit) -> None:
        """Write the numbers, then the marker: after this the unit exists for good. A unit that exists is left as it is.

        Raises IntegrityError for another shape, other rows, or NaN or Inf in a row that is not refused; StateError if the
        text is not the stored one.
        """
        unit = captured.index
        self._check_unit(unit)
        if self._open.backend.get_or_none(marker_key(unit)) is not None:
            return
        self._check_captured(captured)
        text = self._check_text(captured)
        reasons = _reasons(captured)
        activations_key, activations_RLD, stored = self._create_activations(unit, self._rounded(captured, reasons))
        is_refused_R = _holds_nan(activations_RLD[: len(captured.rollouts)])
        objects = {parquet_key(unit): text, activations_key: stored, **self._create_columns(captured, is_refused_R)}
        refused = {
            rollout.index: reasons.get(rollout.index, REFUSED_EARLIER)
            for rollout, is_refused in zip(captured.rollouts, is_refused_R, strict=True)
            if is_refused
        }
        self._create_marker(captured, objects, refused)
        self._create("committed", unit, np.ones(len(captured.rollouts), dtype=np.int8))

    @cached_property
    def _open(self) -> _Open:
        backend = open_backend(self.url)
        header = read_plan_file(backend)
        return _Open(backend, header, unit_arrays(header))

    def _check_unit(self, unit: int) -> None:
        if unit not in self._open.plan.units:
            raise IntegrityError(f"{self.url}: unit {unit:06d} is not in the plan, which has {self._open.plan.num_units} units")

    def _check_captured(self, captured: CapturedUnit) -> None:
        _check_rows(self._open.plan, captured.index, captured.rollouts)
        expected = (len(captured.rollouts), len(self._open.header.layers), self._open.header.hidden_size)
        found = captured.activations_RLD
        if found.shape != expected or found.dtype != np.float32:
            raise IntegrityError(
                f"unit {captured.index:06d}: activations are {found.dtype} {found.shape}, the store wants float32 {expected}. "
                "Did capture.layers or the model change since the store was created? Use a new store URL"
            )
        strangers = set(captured.refused).difference(rollout.index for rollout in captured.rollouts)
        if strangers:
            raise IntegrityError(f"unit {captured.index:06d}: refuses rows that are not its own: {sorted(strangers)}")

    def _check_text(self, captured: CapturedUnit) -> ObjectRecord:
        """The stored text's record; activations of any other text must not be stored beside it."""
        key = parquet_key(captured.index)
        data = self._open.backend.get_or_none(key)
        if data is None:
            raise StateError(f"unit {captured.index:06d}: {key} must be written before the numbers")
        stored = decode_rollouts(data, f"{self.url}: {key}")
        if [_pooled(rollout) for rollout in stored] != [_pooled(rollout) for rollout in captured.rollouts]:
            raise StateError(f"unit {captured.index:06d}: captured from other token ids than those in {key}")
        return ObjectRecord.of(StoredObject.of(data, data))

    def _rounded(self, captured: CapturedUnit, reasons: Mapping[int, str]) -> Float32:
        """(R, L, D) as it will be stored: bf16-exact if the store is so, refused rows NaN. Raises IntegrityError."""
        rounded_RLD = captured.activations_RLD
        if self._open.header.identity["store_dtype"] == BF16_EXACT:
            rounded_RLD = rounded_RLD.astype(ml_dtypes.bfloat16).astype(np.float32)
        is_refused_R = np.array([rollout.index in reasons for rollout in captured.rollouts])
        is_broken_R = ~np.isfinite(rounded_RLD).all(axis=(1, 2)) & ~is_refused_R
        if is_broken_R.any():
            broken = [captured.rollouts[i].index for i in np.flatnonzero(is_broken_R)]
            raise IntegrityError(f"unit {captured.index:06d}: NaN or Inf in rows {broken}; such a row must be refused with a reason")
        return np.where(is_refused_R[:, np.newaxis, np.newaxis], np.float32(np.nan), rounded_RLD)

    def _create_activations(self, unit: int, activations_RLD: Float32) -> tuple[str, Float32, ObjectRecord]:
        """Key, what is really stored (padded), and its record."""
        spec = self._open.arrays["activations"]
        key, data = unit_chunk_key(spec, unit), encode_unit(spec, _padded(spec, activations_RLD))
        stored = self._open.backend.create_once(key, data)
        if not stored.is_ours:
            data = self._open.backend.get(key)
        return key, decode_unit(spec, data, f"{self.url}: {key}"), ObjectRecord.of(stored)

    def _create_columns(self, captured: CapturedUnit, is_refused_R: npt.NDArray[np.bool_]) -> dict[str, ObjectRecord]:
        """The unit's small columns: key -> record."""
        num_pooled_R = np.array([rollout.response_end - rollout.response_start for rollout in captured.rollouts])
        values_R = {
            "response_tokens": np.where(is_refused_R, 0, num_pooled_R),
            "finish_reason": np.array([rollout.finish_reason for rollout in captured.rollouts]),
            "status": np.where(is_refused_R, Status.REFUSED, Status.STORED),
        }
        return dict(self._create(name, captured.index, values_R[name]) for name in UNIT_COLUMNS)

    def _create(self, name: str, unit: int, values_R: npt.NDArray[Any]) -> tuple[str, ObjectRecord]:
        spec = self._open.arrays[name]
        key = unit_chunk_key(spec, unit)
        return key, ObjectRecord.of(self._open.backend.create_once(key, encode_unit(spec, _padded(spec, values_R))))

    def _create_marker(self, captured: CapturedUnit, objects: Mapping[str, ObjectRecord], refused: Mapping[int, str]) -> None:
        unit, key = captured.index, marker_key(captured.index)
        marker = Marker(
            unit=unit,
            first_row=captured.rollouts[0].index,
            num_rows=len(captured.rollouts),
            objects=objects,
            refused=refused,
            made=captured.made,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if self._open.backend.create_once(key, marker.to_bytes()).is_ours:
            return
        winner = Marker.from_bytes(self._open.backend.get(key), f"{self.url}: {key}")
        if winner.objects != objects:
            raise IntegrityError(f"{self.url}: {key} names other bytes than the store holds; was an object overwritten by hand?")

    def _stored_rollouts(self, unit: int) -> tuple[Rollout, ...]:
        return decode_rollouts(self._open.backend.get(parquet_key(unit)), f"{self.url}: {parquet_key(unit)}")


def _check_rows(plan: Plan, unit: int, rollouts: Sequence[Rollout]) -> None:
    rows = unit_slice(plan, unit)
    wanted = list(zip(range(rows.start, rows.stop), plan.keys[rows], strict=True))
    if [(rollout.index, rollout.key) for rollout in rollouts] != wanted:
        raise IntegrityError(f"unit {unit:06d}: {len(rollouts)} rollouts, but not the plan's rows {rows.start} to {rows.stop - 1} in order")


def _pooled(rollout: Rollout) -> tuple[bytes, int, int]:
    """What activations are a function of."""
    return np.asarray(rollout.token_ids, dtype=np.int32).tobytes(), rollout.response_start, rollout.response_end


def _reasons(captured: CapturedUnit) -> dict[int, str]:
    """Row index -> why it is refused, by its text or by the capture."""
    by_text = {rollout.index: rollout.refusal for rollout in captured.rollouts if rollout.refusal is not None}
    return by_text | dict(captured.refused)


def _holds_nan(activations_RLD: Float32) -> npt.NDArray[np.bool_]:
    """(R,): rows that are not stored."""
    return np.asarray(np.isnan(activations_RLD).any(axis=(1, 2)))


def _padded(spec: ArraySpec, values_R: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`values_R` in the array's dtype, filled up to the unit's rows with the array's fill value."""
    unit_rows = spec.chunks[0]
    padded = np.full((unit_rows, *values_R.shape[1:]), spec.fill, dtype=spec.dtype)
    padded[: len(values_R)] = values_R
    return padded
