"""Some layers or archetypes of a store as a store of its own: other units, other markers, the rows in the source's order.

Its job says where the rows come from. Texts, numbers and reasons are those of the source; scores come along for units whose
rows were all judged; results and kept states do not, because they speak of all rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from persona_ray.errors import InputError
from persona_ray.spec import CapturedUnit, Float32, Identity, Judgement, Plan, ProgressCallback, Rollout, RowKey
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.ahead import read_ahead
from persona_ray.store.backend import METADATA_NAME, Backend
from persona_ray.store.copied import IN_SOURCE, Copied, Source, intact_object
from persona_ray.store.finish import finish_store
from persona_ray.store.layout import parquet_key
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker, marker_key
from persona_ray.store.plans import Plans, find_plans
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.scores import ScoreWriter, publish_scores, raw_key
from persona_ray.store.survey import Flaw, Kind
from persona_ray.store.text import decode_rollouts, decode_table
from persona_ray.store.unit_check import UNREADABLE, unreadable
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter

ORIGIN = "origin"
"""Key of the job that tells where a part comes from."""
OF_THE_WORK = frozenset({"seconds", "tokens", "notes"})
"""What a marker says of a unit's making that is not true of some of its rows."""


def copy_part(
    source: Source,
    target_url: str,
    *,
    layers: Sequence[int] | None,
    archetypes: Sequence[str] | None,
    workers: int,
    progress: ProgressCallback,
) -> Copied:
    """Rows of `archetypes` (None: all) that the source has with all of `layers` (None: all of its own), to `target_url`.

    If the source has grown since an earlier call, the target grows. All of the target is verified at the end. Raises InputError,
    before anything is written, for an unknown layer or archetype, and for a target that is no part of this source.
    """
    part = _Part.of(source, layers, archetypes)
    _check_target(open_backend(target_url), source.url)
    plans = prepare_store(target_url, identity=part.identity, plan=part.plan, job=part.job)
    place = absolute_url(target_url)
    before = Ledger(place).committed()
    waiting = [unit for unit in plans.units if unit not in before]
    copier = _Copier(part, plans, UnitWriter(place), open_store(source.url, source.at))
    flaws: list[Flaw] = []
    for found in read_ahead(copier.copy_unit, waiting, workers):
        flaws += found
        progress(1)
    flaws += copier.copy_scores()
    finish_store(place)
    markers = Ledger(place).markers()
    found_wrong = verify(place, workers=workers)
    flaws += [*found_wrong.flaws, *(flaw for report in found_wrong.units for flaw in report.flaws)]
    new = [marker for unit, marker in markers.items() if unit not in before]
    return Copied(
        source=source.url,
        target=place,
        units=len(new),
        rows=sum(marker.num_rows for marker in new),
        num_bytes=sum(marker.num_bytes for marker in new),
        already_there=len(before),
        left_out=part.left_out,
        flaws=tuple(flaws),
    )


def _check_target(target: Backend, source_url: str) -> None:
    """Rows of other origin may have the same keys and other numbers."""
    plans = find_plans(target)
    if plans is None:
        return  # whether it is empty is seen to by `prepare_store`
    strangers = [file for file in plans.files if file.job.get(ORIGIN, {}).get("url") != source_url]
    if strangers:
        origin = strangers[0].job.get(ORIGIN, {}).get("url")
        raise InputError(
            f"{target.url}: is {'a part of ' + origin if origin else 'no part of another store'}, not a part of {source_url}; "
            "give a new or empty place"
        )


@dataclass(frozen=True)
class _Part:
    """What was picked."""

    source: Source
    layers: tuple[int, ...]
    archetypes: tuple[str, ...]
    """In the source's order."""
    markers: Mapping[int, tuple[Marker | Flaw, ...]]
    """Unit -> its markers, set 0 first; units that the source has with all of the layers."""
    left_out: int

    @classmethod
    def of(cls, source: Source, layers: Sequence[int] | None, archetypes: Sequence[str] | None) -> _Part:
        """Raises InputError for a layer or an archetype that the source does not have."""
        plans = source.survey.plans
        sets = plans.layer_sets[: len(source.markers)]
        known = sorted(layer for of_set in sets for layer in of_set)
        wanted = tuple(known if layers is None else sorted(set(layers)))
        missing = sorted(set(wanted).difference(known))
        if missing or not wanted:
            raise InputError(f"{source.url}: layers {missing or 'none'} were not captured; there are {known}")
        names = plans.archetypes if archetypes is None else tuple(name for name in plans.archetypes if name in set(archetypes))
        strange = sorted(set(archetypes or ()).difference(plans.archetypes))
        if strange or not names:
            raise InputError(
                f"{source.url}: no archetype {strange[0] if strange else 'was named'}; there are {', '.join(plans.archetypes[:8])}"
            )
        used = sorted({0, *(number for number, of_set in enumerate(sets) if not set(wanted).isdisjoint(of_set))})
        whole = [unit for unit in source.markers[0] if all(unit in source.markers[number] for number in used)]
        markers = {unit: tuple(source.marker(unit, number) for number in used) for unit in whole}
        num_asked = sum(key.archetype in names for file in plans.files for key in file.plan.keys)
        part = cls(source, wanted, names, markers, 0)
        return replace(part, left_out=num_asked - len(part.keys))

    @cached_property
    def rows(self) -> dict[RowKey, int]:
        """Row key -> row of the source, rising; all archetypes."""
        plans = self.source.survey.plans
        return {key: row for unit in self.markers for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True)}

    @cached_property
    def keys(self) -> tuple[RowKey, ...]:
        """Those that were picked."""
        names = frozenset(self.archetypes)
        return tuple(key for key in self.rows if key.archetype in names)

    @property
    def identity(self) -> Identity:
        """The source's, with these layers."""
        stored = self.source.survey.plans.identity
        return Identity(**{**stored, "layers": self.layers})

    @property
    def plan(self) -> Plan:
        """Raises InputError if nothing of the selection is there."""
        plans, names = self.source.survey.plans, frozenset(self.archetypes)
        if not self.keys:
            raise InputError(f"{self.source.url}: no committed row is of these archetypes and has these layers; nothing to copy")
        digests = self._text_digests()
        return Plan(
            archetypes=self.archetypes,
            default_archetypes=tuple(name for name in plans.default_archetypes if name in names),
            keys=self.keys,
            unit_rows=plans.unit_rows,
            text_digests=tuple(digests[key] for key in self.keys) if digests.keys() >= set(self.keys) else (),
        )

    def _text_digests(self) -> dict[RowKey, str]:
        """Of the rows whose plan recorded them."""
        plans = self.source.survey.plans
        units = [unit for unit in self.markers if plans.text_digests(unit)]
        return {key: digest for unit in units for key, digest in zip(plans.keys(unit), plans.text_digests(unit), strict=True)}

    @property
    def job(self) -> dict[str, Any]:
        """The source's, and what was picked from which state."""
        origin = {
            "url": self.source.url,
            "ledger_digest": self.source.snapshot.digest,
            "layers": list(self.layers),
            "archetypes": list(self.archetypes),
        }
        return {**self.source.survey.plans.first.job, ORIGIN: origin}


@dataclass(frozen=True, slots=True)
class _Copier:
    part: _Part
    plans: Plans
    """The target's."""
    writer: UnitWriter
    reader: StoreReader
    """Of the source."""

    def copy_unit(self, unit: int) -> list[Flaw]:
        """One unit of the target; what is wrong with those of the source that it is made from, and then nothing is written."""
        rows = self._source_rows(unit)
        if rows is None:
            return [Flaw(marker_key(unit), Kind.MISSING, "rows that an earlier call planned are not in the source any more")]
        units = sorted({self._source_plans.unit_of(row) for row in rows})
        texts: dict[int, Rollout] = {}
        for source_unit in units:
            found = self._text(source_unit)
            if isinstance(found, Flaw):
                return [found]
            texts |= {rollout.index: rollout for rollout in found}
        reasons = self._reasons(units)
        try:
            values_RLD = self._numbers(rows, reasons)
        except UNREADABLE as error:
            where = ", ".join(f"{source_unit:06d}" for source_unit in units)
            return [
                Flaw(marker_key(unit), Kind.MISSING, f"{IN_SOURCE}: the numbers of units {where}: {unreadable(error, self.reader.url)}")
            ]
        rollouts = tuple(replace(texts[row], index=index) for index, row in zip(self.plans.rows(unit), rows, strict=True))
        refused = {index: reasons[row] for index, row in zip(self.plans.rows(unit), rows, strict=True) if row in reasons}
        self.writer.write_rollouts(unit, rollouts)
        self.writer.commit(CapturedUnit(unit, rollouts, values_RLD, refused, self._made(units)))
        return []

    def copy_scores(self) -> list[Flaw]:
        """Of every judge: units of the target whose rows have all been judged. Then the judge in force."""
        flaws: list[Flaw] = []
        target = open_store(self.writer.url)
        committed = target.ledger.committed()
        for judge in self.part.source.survey.judges:
            writer = self._score_writer(judge)
            for unit in sorted(committed - target.scored_units(judge)):
                judgements = self._judgements(judge, unit)
                if isinstance(judgements, Flaw):
                    flaws.append(judgements)
                elif judgements is not None:
                    (rollouts,) = target.rollouts([unit])
                    writer.write(unit, rollouts, judgements)
        latest = self.reader.latest_scores()
        if latest is not None and latest != target.latest_scores() and target.scored_units(latest):
            publish_scores(target.url, latest)
        return flaws

    @property
    def _source_plans(self) -> Plans:
        return self.part.source.survey.plans

    def _source_rows(self, unit: int) -> list[int] | None:
        """Rising; None if one of them has gone."""
        rows = [self.part.rows.get(key) for key in self.plans.keys(unit)]
        found = [row for row in rows if row is not None]
        return found if len(found) == len(rows) else None

    def _markers(self, units: Sequence[int]) -> Iterator[Marker]:
        for unit in units:
            yield from (marker for marker in self.part.markers[unit] if isinstance(marker, Marker))

    def _reasons(self, units: Sequence[int]) -> dict[int, str]:
        """Row of the source -> why it is refused with these layers."""
        return {row: reason for marker in self._markers(units) for row, reason in marker.refused.items()}

    def _text(self, unit: int) -> tuple[Rollout, ...] | Flaw:
        flaw = next((marker for marker in self.part.markers[unit] if isinstance(marker, Flaw)), None)
        if flaw is not None:
            return flaw
        key = parquet_key(unit)
        record = next(self._markers([unit])).objects[key]
        data = intact_object(self.part.source.backend, key, record, IN_SOURCE)
        return data if isinstance(data, Flaw) else decode_rollouts(data, f"{self.reader.url}: {key}")

    def _numbers(self, rows: Sequence[int], reasons: Mapping[int, str]) -> Float32:
        """(R, L, D), NaN in refused rows. The check sums of the chunks are compared, not the digest of the whole object."""
        is_stored_R = np.array([row not in reasons for row in rows])
        values_RLD = np.full((len(rows), len(self.part.layers), self._source_plans.hidden_size), np.nan, dtype=np.float32)
        values_RLD[is_stored_R] = self.reader.activations(np.array(rows, dtype=np.int64)[is_stored_R], self.part.layers)
        return values_RLD

    def _made(self, units: Sequence[int]) -> dict[str, Any]:
        """What all of those units say of how they were made, and all of their notes."""
        made = [marker.made for marker in self._markers(units)]
        same = {key: value for key, value in made[0].items() if key not in OF_THE_WORK and all(other.get(key) == value for other in made)}
        notes = list(dict.fromkeys(note for one in made for note in one.get("notes", ())))
        return {**same, **({"notes": notes} if notes else {}), "copied_from": list(units)}

    def _judgements(self, judge: str, unit: int) -> list[Judgement] | Flaw | None:
        """None if not all rows have been judged."""
        rows = self._source_rows(unit)
        units = sorted({self._source_plans.unit_of(row) for row in rows or ()})
        keys = [raw_key(judge, source_unit) for source_unit in units]
        if rows is None or not self.part.source.survey.keys.issuperset(keys):
            return None
        found: dict[int, Judgement] = {}
        for key in keys:
            try:
                table = decode_table(self.part.source.backend.get(key), key)
                found |= {line["rollout"]: Judgement(line["score"], line["raw"]) for line in table.to_pylist()}
            except UNREADABLE as error:
                return Flaw(key, Kind.CORRUPT, f"{IN_SOURCE}: {unreadable(error, key)}")
        return [found[row] for row in rows]

    def _score_writer(self, judge: str) -> ScoreWriter:
        document = json.loads(self.part.source.backend.get(f"scores/{judge}/{METADATA_NAME}"))
        return ScoreWriter(self.writer.url, judge, document["attributes"]["settings"])
