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

import numpy as np
import numpy.typing as npt

from persona_ray.errors import IntegrityError, StateError
from persona_ray.spec import CapturedUnit, Float32, Rollout, Status
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import Backend, StoredObject
from persona_ray.store.bfloat16 import LARGEST_ROUNDED
from persona_ray.store.cores import ENCODING
from persona_ray.store.encoding import decode_unit, encode_unit
from persona_ray.store.layout import (
    ROUNDED,
    UNIT_COLUMNS,
    ArraySpec,
    activations_name,
    chunk_key,
    committed_name,
    parquet_key,
    unit_arrays,
)
from persona_ray.store.marker import Marker, ObjectRecord, marker_key
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.text import decode_rollouts, encode_rollouts

REFUSED_EARLIER = "refused by an earlier attempt at this unit"


@dataclass(frozen=True, slots=True)
class _Known:
    """The plans as they were last read, and what follows from them."""

    plans: Plans
    arrays: Mapping[str, ArraySpec]


@dataclass(frozen=True, slots=True)
class _Text:
    """A unit's text as it is stored."""

    rollouts: tuple[Rollout, ...]
    record: ObjectRecord
    is_ours: bool
    """Whether this writer created it."""


class UnitWriter:
    """`UnitSink` for the store at `url`, which `prepare_store` has made. Pickles as its URL and opens in the process that uses it."""

    def __init__(self, url: str, layers: Sequence[int] | None = None) -> None:
        """`layers`: a further set of layers, all of it; None: those that the store began with. Raises InputError for no store's URL."""
        self.url = absolute_url(url)
        self._layers = None if layers is None else tuple(layers)
        self._known: _Known | None = None
        self._texts: dict[int, _Text] = {}
        """Of units that were written and are not committed yet."""

    def __reduce__(self) -> tuple[type[UnitWriter], tuple[str, tuple[int, ...] | None]]:
        """Travels as its URL; connections do not travel."""
        return UnitWriter, (self.url, self._layers)

    def read_rollouts(self, unit: int) -> tuple[Rollout, ...] | None:
        """The unit's text, if somebody has written it already."""
        self._plans(unit)
        text = self._stored_text(unit)
        if text is None:
            return None
        self._texts[unit] = text
        return text.rollouts

    def write_rollouts(self, unit: int, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """Create the unit's text; answers what is really there, which may be another writer's.

        Raises IntegrityError if `rollouts` are not exactly the unit's rows in order.
        """
        _check_rows(self._plans(unit), unit, rollouts)
        stored = self._backend.create_once(parquet_key(unit), encode_rollouts(rollouts))
        text = _Text(tuple(rollouts), ObjectRecord.of(stored), is_ours=True) if stored.is_ours else self._stored_text(unit)
        if text is None:
            raise IntegrityError(f"{self.url}: {parquet_key(unit)} is gone again; was something deleted by hand?")
        self._texts[unit] = text
        return text.rollouts

    def commit(self, captured: CapturedUnit) -> bool:
        """Write the numbers, then the marker: after this the unit exists for good. A unit that exists is left as it is: False.

        Raises IntegrityError for another shape, other rows, or NaN or Inf in a row that is not refused; StateError if the
        text is not the stored one.
        """
        unit = captured.index
        self._check_captured(captured)
        known = self._texts.pop(unit, None)
        # Who has just created the text is the first at this unit, or all but the first: whatever is there then, is found object by object.
        is_first = known is not None and known.is_ours
        if not is_first and self._backend.get_or_none(marker_key(unit, self.layer_set)) is not None:
            return False
        text = self._check_text(captured, known or self._stored_text(unit))
        reasons = _reasons(captured)
        activations_key, stored, is_refused_R = self._create_activations(captured, reasons)
        objects = {parquet_key(unit): text, activations_key: stored}
        if self.layer_set == 0:
            objects |= self._create_columns(captured, is_refused_R)
        refused = {
            rollout.index: reasons.get(rollout.index, REFUSED_EARLIER)
            for rollout, is_refused in zip(captured.rollouts, is_refused_R, strict=True)
            if is_refused
        }
        is_ours = self._create_marker(captured, objects, refused)
        self._create(committed_name(self.layer_set), unit, np.ones(len(captured.rollouts), dtype=np.int8))
        return is_ours

    @cached_property
    def layer_set(self) -> int:
        """Number of the set of layers that is written."""
        return 0 if self._layers is None else read_plans(self._backend).set_of(self._layers)

    @cached_property
    def _backend(self) -> Backend:
        return open_backend(self.url)

    def _plans(self, unit: int) -> Plans:
        """Plans that have the unit. Another run may have added one since they were read."""
        if self._known is None or unit not in self._known.plans:
            plans = read_plans(self._backend)
            self._known = _Known(plans, unit_arrays(plans))
        if unit not in self._known.plans:
            raise IntegrityError(f"{self.url}: unit {unit:06d} is in no plan; there are {self._known.plans.num_units} units")
        return self._known.plans

    def _array(self, name: str, unit: int) -> ArraySpec:
        """The array as a plan that has `unit` makes it, never as an open handle remembers it."""
        self._plans(unit)
        assert self._known is not None
        return self._known.arrays[name]

    def _check_captured(self, captured: CapturedUnit) -> None:
        plans = self._plans(captured.index)
        _check_rows(plans, captured.index, captured.rollouts)
        expected = (len(captured.rollouts), len(plans.layer_sets[self.layer_set]), plans.hidden_size)
        found = captured.activations_RLD
        if found.shape != expected or found.dtype != np.float32:
            raise IntegrityError(
                f"unit {captured.index:06d}: activations are {found.dtype} {found.shape}, the store wants float32 {expected}. "
                "Did capture.layers or the model change since the store was created? Use a new store URL"
            )
        strangers = set(captured.refused).difference(rollout.index for rollout in captured.rollouts)
        if strangers:
            raise IntegrityError(f"unit {captured.index:06d}: refuses rows that are not its own: {sorted(strangers)}")

    def _stored_text(self, unit: int) -> _Text | None:
        """What is there; None if nothing is."""
        data = self._backend.get_or_none(parquet_key(unit))
        if data is None:
            return None
        rollouts = decode_rollouts(data, f"{self.url}: {parquet_key(unit)}")
        return _Text(rollouts, ObjectRecord.of(StoredObject.of(data, data)), is_ours=False)

    def _check_text(self, captured: CapturedUnit, text: _Text | None) -> ObjectRecord:
        """The stored text's record; activations of any other text must not be stored beside it."""
        key = parquet_key(captured.index)
        if text is None:
            raise StateError(f"unit {captured.index:06d}: {key} must be written before the numbers")
        if [_pooled(rollout) for rollout in text.rollouts] != [_pooled(rollout) for rollout in captured.rollouts]:
            raise StateError(f"unit {captured.index:06d}: captured from other token ids than those in {key}")
        return text.record

    def _numbers(self, captured: CapturedUnit, is_refused_R: npt.NDArray[np.bool_]) -> Float32:
        """(R, L, D), refused rows NaN. Raises IntegrityError if any other holds NaN or Inf, or would when it is stored."""
        activations_RLD = captured.activations_RLD
        largest = LARGEST_ROUNDED if self._is_rounded(captured.index) else np.finfo(np.float32).max
        # NaN is neither.
        is_finite_R = (activations_RLD.max(axis=(1, 2)) <= largest) & (activations_RLD.min(axis=(1, 2)) >= -largest)
        is_broken_R = ~(is_finite_R | is_refused_R)
        if is_broken_R.any():
            broken = [captured.rollouts[i].index for i in np.flatnonzero(is_broken_R)]
            raise IntegrityError(f"unit {captured.index:06d}: NaN or Inf in rows {broken}; such a row must be refused with a reason")
        if is_refused_R.any():
            activations_RLD = np.where(is_refused_R[:, np.newaxis, np.newaxis], np.float32(np.nan), activations_RLD)
        return activations_RLD

    def _is_rounded(self, unit: int) -> bool:
        """To bfloat16."""
        return self._plans(unit).identity["store_dtype"] in ROUNDED

    def _create_activations(self, captured: CapturedUnit, reasons: Mapping[int, str]) -> tuple[str, ObjectRecord, npt.NDArray[np.bool_]]:
        """Key and record of what is really stored, and which of the real rows it refuses, (R,)."""
        unit = captured.index
        spec = self._array(activations_name(self.layer_set), unit)
        is_refused_R = np.array([rollout.index in reasons for rollout in captured.rollouts])
        key = chunk_key(spec, unit)
        with ENCODING:
            values_RLD = padded(spec, self._numbers(captured, is_refused_R))
            data = encode_unit(spec, values_RLD, is_rounded=self._is_rounded(unit))
        stored = self._backend.create_once(key, data)
        if not stored.is_ours:
            activations_RLD = decode_unit(spec, self._backend.get(key), f"{self.url}: {key}")
            is_refused_R = _holds_nan(activations_RLD[: len(captured.rollouts)])
        return key, ObjectRecord.of(stored), is_refused_R

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
        spec = self._array(name, unit)
        key = chunk_key(spec, unit)
        return key, ObjectRecord.of(self._backend.create_once(key, encode_unit(spec, padded(spec, values_R))))

    def _create_marker(self, captured: CapturedUnit, objects: Mapping[str, ObjectRecord], refused: Mapping[int, str]) -> bool:
        unit, key = captured.index, marker_key(captured.index, self.layer_set)
        marker = Marker(
            unit=unit,
            first_row=captured.rollouts[0].index,
            num_rows=len(captured.rollouts),
            objects=objects,
            refused=refused,
            made=captured.made,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if self._backend.create_once(key, marker.to_bytes()).is_ours:
            return True
        winner = Marker.from_bytes(self._backend.get(key), f"{self.url}: {key}")
        if winner.objects != objects:
            raise IntegrityError(f"{self.url}: {key} names other bytes than the store holds; was an object overwritten by hand?")
        return False


def _check_rows(plans: Plans, unit: int, rollouts: Sequence[Rollout]) -> None:
    rows = plans.rows(unit)
    wanted = list(zip(rows, plans.keys(unit), strict=True))
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


def padded(spec: ArraySpec, values_R: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`values_R` filled up to the unit's rows with the array's fill value."""
    unit_rows = spec.chunks[0]
    if len(values_R) == unit_rows:
        return values_R
    whole = np.full((unit_rows, *values_R.shape[1:]), spec.fill, dtype=values_R.dtype)
    whole[: len(values_R)] = values_R
    return whole
