"""Is one unit what its marker, the plan and its own text say? Reads every object of the unit, one after the other.

Sizes and digests are the marker's. What the objects say must fit, too: numbers follow from the text, columns from both. So
objects without a marker are checked as well, but for what their text says and no other object repeats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from persona_ray.errors import IntegrityError
from persona_ray.spec import NOT_SCORED, Float32, Rollout, Status
from persona_ray.store.encoding import decode_unit
from persona_ray.store.layout import (
    BF16_EXACT,
    PUBLISHED_SPANS,
    ArraySpec,
    activations_name,
    chunk_key,
    committed_name,
    parquet_key,
    score_array,
)
from persona_ray.store.marker import Marker, ObjectRecord, marker_key
from persona_ray.store.scores import MAX_SCORE
from persona_ray.store.survey import Flaw, Kind, State, Survey, UnitReport
from persona_ray.store.text import decode_rollouts, decode_table

Bools = npt.NDArray[np.bool_]

UNREADABLE = (IntegrityError, ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, MemoryError, pa.ArrowException)
"""What decoders raise for bytes that are not as they were written."""
MAX_SHOWN_ROWS = 5


def check_unit(survey: Survey, unit: int) -> UnitReport:
    """Read the unit's markers and objects, its `committed` chunks and its scores, and say what is wrong with them."""
    data = survey.backend.get_or_none(marker_key(unit))
    check = _UnitCheck(survey, unit, 0, data)
    check.run()
    flaws = {flaw.key: flaw for flaw in check.flaws}
    notes = _notes(survey, unit, data)
    for layer_set in survey.layer_sets[1:]:
        further = _UnitCheck(survey, unit, layer_set, survey.backend.get_or_none(marker_key(unit, layer_set)))
        further.run()
        flaws = {flaw.key: flaw for flaw in further.flaws} | flaws  # text that is wrong is said once
        notes += _notes_of_further(survey, unit, layer_set, further.is_committed)
    refused = {} if check.marker is None else check.marker.refused
    return UnitReport(unit, _state([*flaws.values()], is_committed=data is not None), tuple(flaws.values()), refused, notes)


def unreadable(error: BaseException, where: str) -> str:
    """A decoder's complaint without the object's name, which the flaw has."""
    text = " ".join(str(error).removeprefix(f"{where}: ").split())
    return f"cannot be read ({text or type(error).__name__})"[:300]


def intact(key: str, data: bytes | None, record: ObjectRecord) -> bytes | Flaw:
    """`data`, if it is the object that a marker's `record` speaks of; else what is wrong with it. None: it is not there."""
    if data is None:
        return Flaw(key, Kind.MISSING, f"{record.num_bytes:,} bytes that the marker names are gone")
    if len(data) != record.num_bytes:
        return Flaw(key, Kind.CORRUPT, f"size: {len(data):,} bytes, the marker says {record.num_bytes:,}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != record.sha256:
        return Flaw(key, Kind.CORRUPT, f"SHA-256: {sha256[:12]}..., the marker says {record.sha256[:12]}...")
    return data


def _state(flaws: Sequence[Flaw], *, is_committed: bool) -> State:
    if any(flaw.kind is Kind.CORRUPT for flaw in flaws):
        return State.CORRUPT
    if flaws:
        return State.MISSING
    return State.OK if is_committed else State.NOT_WRITTEN


def _notes(survey: Survey, unit: int, marker: bytes | None) -> tuple[str, ...]:
    own = survey.own_keys(unit)
    if marker is not None:
        is_behind = survey.committed_key(unit) not in survey.keys
        return ("mask behind: the next run adds its committed chunk",) if is_behind else ()
    if survey.keys.issuperset(own):
        return ("no marker, so the unit does not exist, although all its objects are there; the next run commits it",)
    if own[0] in survey.keys:
        return ("its text is there, and the next run captures from it",)
    return ()


def _notes_of_further(survey: Survey, unit: int, layer_set: int, is_committed: bool) -> tuple[str, ...]:
    is_behind = is_committed and survey.committed_key(unit, layer_set) not in survey.keys
    return (f"mask of layer set {layer_set} behind: the next run adds its committed chunk",) if is_behind else ()


class _UnitCheck:
    """The checks of one unit for one set of layers. Holds its text, and the bytes of one object at a time."""

    def __init__(self, survey: Survey, unit: int, layer_set: int, marker: bytes | None) -> None:
        self.flaws: list[Flaw] = []
        self.marker: Marker | None = None
        self._survey, self._unit, self._layer_set, self._marker_bytes = survey, unit, layer_set, marker
        self._rows = survey.plans.rows(unit)
        self._num_rows = len(self._rows)
        self._own = survey.own_keys(unit, layer_set)

    @property
    def is_committed(self) -> bool:
        """Whether there is a marker, right or wrong."""
        return self._marker_bytes is not None

    def run(self) -> None:
        """In the order of writing."""
        if self._marker_bytes is not None:
            self.marker = self._read_marker(self._marker_bytes)
        text = self._text()
        is_refused_R = self._activations(text)
        if self._layer_set == 0:
            self._columns(text, is_refused_R)
        if self.marker is None:
            self._orphans()
        self._committed()
        for judge in self._judges:
            self._scores(judge)

    @property
    def _judges(self) -> tuple[str, ...]:
        """Scores are looked at once."""
        return self._survey.judges if self._layer_set == 0 else ()

    # ---- marker and text

    def _read_marker(self, data: bytes) -> Marker | None:
        """None if nothing that it says can be believed."""
        key = marker_key(self._unit, self._layer_set)
        try:
            marker = Marker.from_bytes(data, key)
            problem = self._marker_problem(marker, data)
        except UNREADABLE as error:
            problem = unreadable(error, key)
        if problem is None:
            return marker
        self._corrupt(key, problem)
        return None

    def _marker_problem(self, marker: Marker, data: bytes) -> str | None:
        if (marker.unit, marker.first_row, marker.num_rows) != (self._unit, self._rows.start, self._num_rows):
            found = f"unit {marker.unit}, {marker.num_rows} rows from {marker.first_row}"
            return f"speaks of {found}; the plan has {self._num_rows} rows from {self._rows.start}"
        if tuple(marker.objects) != self._own:
            return f"names other objects than {', '.join(self._own)}"
        strangers = [row for row in marker.refused if row not in self._rows]
        if strangers:
            return f"refuses rows that are not the unit's: {_shown(strangers)}"
        return None if marker.to_bytes() == data else "is not as it was written"

    def _text(self) -> tuple[Rollout, ...] | None:
        key = parquet_key(self._unit)
        data = self._intact(key)
        if data is None:
            return None
        try:
            text = decode_rollouts(data, key)
        except UNREADABLE as error:
            self._corrupt(key, unreadable(error, key))
            return None
        problem = self._text_problem(text)
        if problem is None:
            return text
        self._corrupt(key, problem)
        return None

    def _text_problem(self, text: Sequence[Rollout]) -> str | None:
        wanted = list(zip(self._rows, self._survey.plans.keys(self._unit), strict=True))
        if [(rollout.index, rollout.key) for rollout in text] != wanted:
            return f"holds {len(text)} rows that are not the plan's rows {self._rows.start} to {self._rows.stop - 1} in order"
        outside = [line.index for line in text if not 0 <= line.response_start <= line.response_end <= len(line.token_ids)]
        if outside:
            return f"the pooled range lies outside of the token ids in rows {_shown(outside)}"
        empty = [line.index for line in text if line.refusal is None and line.response_start == line.response_end]
        if empty and self._survey.plans.identity["span_rule"] != PUBLISHED_SPANS:
            return f"no token is pooled in rows {_shown(empty)}, which are not refused"
        if self.marker is not None:
            reasons = self.marker.refused
            other = [line.index for line in text if line.refusal is not None and reasons.get(line.index) != line.refusal]
            if other:
                return f"refuses rows {_shown(other)}, and the marker does not, or for another reason"
        return None

    # ---- numbers

    def _activations(self, text: Sequence[Rollout] | None) -> Bools | None:
        """(R,): rows without numbers; None if neither marker nor numbers tell."""
        spec = self._survey.arrays[activations_name(self._layer_set)]
        values_RLD = self._decoded(spec)
        by_marker_R = None if self.marker is None else np.isin(np.array(self._rows), list(self.marker.refused))
        if values_RLD is None:
            return by_marker_R
        is_nan_R = np.isnan(values_RLD).all(axis=(1, 2))
        problem = self._number_problem(values_RLD, is_nan_R, by_marker_R, text)
        if problem is None:
            return np.asarray(is_nan_R[: self._num_rows])
        self._corrupt(chunk_key(spec, self._unit), problem)
        return by_marker_R

    def _number_problem(
        self, values_RLD: Float32, is_nan_R: Bools, is_refused_R: Bools | None, text: Sequence[Rollout] | None
    ) -> str | None:
        is_broken_R = ~np.isfinite(values_RLD).all(axis=(1, 2)) & ~is_nan_R
        if is_broken_R.any():
            return f"holds NaN or Inf among the numbers of rows {self._named(is_broken_R)}"
        if not is_nan_R[self._num_rows :].all():
            return "holds numbers in padding"
        is_nan_R = is_nan_R[: self._num_rows]
        if is_refused_R is not None and (is_nan_R & ~is_refused_R).any():
            return f"holds NaN in stored rows {self._named(is_nan_R & ~is_refused_R)}"
        if is_refused_R is None and text is not None:
            is_refused_R = is_nan_R | np.array([line.refusal is not None for line in text])
        if is_refused_R is not None and (~is_nan_R & is_refused_R).any():
            return f"holds numbers in refused rows {self._named(~is_nan_R & is_refused_R)}"
        if (
            self._survey.plans.identity["store_dtype"] == BF16_EXACT
            and (values_RLD.view(np.uint32) & 0xFFFF)[np.isfinite(values_RLD)].any()
        ):
            return "holds numbers that are not bfloat16-exact"
        return None

    def _columns(self, text: Sequence[Rollout] | None, is_refused_R: Bools | None) -> None:
        """Each column is what text and refusals make of it, as far as these are known."""
        expected: dict[str, Any] = dict.fromkeys(("response_tokens", "finish_reason", "status"))
        if is_refused_R is not None:
            expected["status"] = np.where(is_refused_R, Status.REFUSED, Status.STORED)
        if text is not None:
            expected["finish_reason"] = np.array([line.finish_reason for line in text])
        if text is not None and is_refused_R is not None:
            num_pooled_R = np.array([line.response_end - line.response_start for line in text])
            expected["response_tokens"] = np.where(is_refused_R, 0, num_pooled_R)
        sources = {"response_tokens": "the text's spans", "finish_reason": "the text", "status": "the refused rows"}
        for name, values_R in expected.items():
            self._compare(self._survey.arrays[name], values_R, sources[name])

    def _orphans(self) -> None:
        """Without a usable marker: what is there without what it was made from. The next run would take it for its own."""
        text, activations, *columns = self._own
        scores = [key for judge in self._judges for key in self._survey.score_keys(judge, self._unit)]
        for source, made in ((text, [activations, *columns, *scores]), (activations, columns)):
            known = {flaw.key for flaw in self.flaws}
            strays = [key for key in made if key in self._survey.keys and key not in known]
            if strays and not self._survey.has(source):
                for key in strays:
                    self._corrupt(key, f"was made from {source}, which is gone")

    def _committed(self) -> None:
        spec = self._survey.arrays[committed_name(self._layer_set)]
        key = self._survey.committed_key(self._unit, self._layer_set)
        if key not in self._survey.keys:
            return
        if self._marker_bytes is None:
            self._corrupt(key, "says that the unit is committed, and it has no marker")
            return
        self._compare(spec, np.ones(self._num_rows, dtype=np.int8), "a committed unit")

    # ---- scores

    def _scores(self, judge: str) -> None:
        """Scores must be those of the raw answers beside them. Of an interrupted judge only the answers are there: no fault."""
        raw_at, scores_at = self._survey.score_keys(judge, self._unit)
        raw_R = self._raw_scores(raw_at) if raw_at in self._survey.keys else None
        if scores_at not in self._survey.keys:
            return
        if not self._survey.has(raw_at):
            self._missing(raw_at, f"the answers behind {scores_at} are gone")
        self._compare(score_array(self._survey.plans, judge), raw_R, "the judge's answers")

    def _raw_scores(self, key: str) -> npt.NDArray[Any] | None:
        data = self._intact(key)
        if data is None:
            return None
        try:
            table = decode_table(data, key)
            rows, scores_R = table.column("rollout").to_pylist(), table.column("score").to_numpy()
            [str(answer) for answer in table.column("raw").to_pylist()]
        except UNREADABLE as error:
            self._corrupt(key, unreadable(error, key))
            return None
        if rows != list(self._rows):
            self._corrupt(key, f"holds {len(rows)} answers that are not those of rows {self._rows.start} to {self._rows.stop - 1}")
            return None
        if ((scores_R < NOT_SCORED) | (scores_R > MAX_SCORE)).any():
            self._corrupt(key, f"holds scores that are not {NOT_SCORED} to {MAX_SCORE}")
            return None
        return np.asarray(scores_R)

    # ---- any object

    def _compare(self, spec: ArraySpec, expected_R: npt.NDArray[Any] | None, source: str) -> None:
        """`expected_R`: of the real rows, or None if it is not known; padding holds the fill."""
        found_R = self._decoded(spec)
        if found_R is None:
            return
        is_other_R = found_R != spec.fill
        is_other_R[: self._num_rows] = False if expected_R is None else found_R[: self._num_rows] != expected_R
        if is_other_R.any():
            problem = f"differs from what {source} make{'s' if source.startswith('a ') else ''} of rows {self._named(is_other_R)}"
            self._corrupt(chunk_key(spec, self._unit), problem)

    def _decoded(self, spec: ArraySpec) -> npt.NDArray[Any] | None:
        """(unit_rows, ...), padding included; check sums are compared on the way."""
        key = chunk_key(spec, self._unit)
        data = self._intact(key)
        if data is None:
            return None
        try:
            return decode_unit(spec, data, key)
        except UNREADABLE as error:
            self._corrupt(key, unreadable(error, key))
            return None

    def _intact(self, key: str) -> bytes | None:
        """The object, if it is the one that the marker names; where no marker speaks of it, if it is there."""
        record = None if self.marker is None else self.marker.objects.get(key)
        if record is None and key not in self._survey.keys:
            return None
        data = self._survey.backend.get_or_none(key)
        found = data if record is None else intact(key, data, record)
        if isinstance(found, Flaw):
            self.flaws.append(found)
            return None
        condemned = self._survey.condemned.get(key, ())
        if found is not None and condemned and hashlib.sha256(found).hexdigest() in condemned:
            self._corrupt(key, "is the damaged object that an earlier requeue found; it was interrupted: requeue again")
            return None
        return found

    def _corrupt(self, key: str, problem: str) -> None:
        self.flaws.append(Flaw(key, Kind.CORRUPT, problem))

    def _missing(self, key: str, problem: str) -> None:
        self.flaws.append(Flaw(key, Kind.MISSING, problem))

    def _named(self, is_meant_R: Bools) -> str:
        return _shown([self._rows.start + int(place) for place in np.flatnonzero(is_meant_R)])


def _shown(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - MAX_SHOWN_ROWS} more" if len(rows) > MAX_SHOWN_ROWS else ""
    return f"{', '.join(map(str, rows[:MAX_SHOWN_ROWS]))}{more}"
