"""A store copied byte by byte: the same plans, units, markers, scores, results and kept states, so the same digests.

What follows from the plans (metadata, planned columns, masks) is not copied but written anew, and comes out the same. Left
behind: whatever has no marker, the quarantine, and objects that no store of ours holds.

Order, for each unit: every object of the source is read and compared with its marker; then written; then read back; then
the marker. So a unit that the target has is right, and whoever is interrupted goes on after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import ProgressCallback
from persona_ray.store.address import open_backend
from persona_ray.store.ahead import read_ahead
from persona_ray.store.backend import LATEST_KEYS, METADATA_NAME, Backend
from persona_ray.store.copied import AT_TARGET, IN_SOURCE, Copied, Source, intact_object
from persona_ray.store.empty_place import require_empty
from persona_ray.store.encoding import decode_unit
from persona_ray.store.finish import finish_store
from persona_ray.store.layout import score_array
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker, marker_key
from persona_ray.store.metadata import settle
from persona_ray.store.plan_file import PLANS_FOLDER
from persona_ray.store.plans import claimed_keys, keys_of
from persona_ray.store.reduced import read_reduced
from persona_ray.store.snapshot import VIEWS_FOLDER, read_view, view_key
from persona_ray.store.survey import Flaw, Kind
from persona_ray.store.text import decode_table
from persona_ray.store.unit_check import UNREADABLE, unreadable
from persona_ray.store.verify import verify

OBJECTS_AHEAD = 8
"""Of a result, a layer each: small, so most of the time is waiting."""


@dataclass(slots=True)
class _Tally:
    """What was done so far; one for each piece of work, then added up."""

    units: int = 0
    rows: int = 0
    num_bytes: int = 0
    already_there: int = 0
    flaws: list[Flaw] = field(default_factory=list)

    def add(self, other: _Tally) -> None:
        self.units += other.units
        self.rows += other.rows
        self.num_bytes += other.num_bytes
        self.already_there += other.already_there
        self.flaws += other.flaws


def copy_whole(source: Source, target_url: str, *, workers: int, progress: ProgressCallback) -> Copied:
    """Every committed unit of `source` to `target_url`, with scores, results and kept states; then the target is verified.

    Of a state that was asked for: its units, their scores, the results drawn from it, and the state itself, so that it can be
    cited at the target. A target that holds anything but the beginning of this copy is refused, before anything is written.
    """
    target = open_backend(target_url)
    there = _checked_target(source, target)
    target.probe_write_once()
    copier = _Copier(source, target, there, frozenset(target.list_keys("scores") + target.list_keys("reduced")))
    copier.copy_plans()
    tally = _Tally()
    for done in read_ahead(copier.copy_unit, source.markers[0], workers):
        tally.add(done)
        progress(1)
    tally.add(copier.copy_conclusions())
    finish_store(target.url)
    found = verify(target.url, sample=1 / source.survey.plans.num_units)  # units were read back; this is for all the rest
    flaws = [*tally.flaws, *found.flaws, *(flaw for report in found.units for flaw in report.flaws)]
    return Copied(
        source=source.url,
        target=target.url,
        units=tally.units,
        rows=tally.rows,
        num_bytes=tally.num_bytes,
        already_there=tally.already_there,
        left_out=0,
        flaws=tuple(flaws),
    )


def _checked_target(source: Source, target: Backend) -> tuple[frozenset[int], ...]:
    """Units that the target has, for each set of layers. Raises InputError if it is not the beginning of this copy."""
    claimed = claimed_keys(target)
    if not claimed:
        require_empty(target)
        return tuple(frozenset() for _ in source.markers)
    strangers = sorted(claimed - keys_of(source.survey.plans))
    shared = sorted(claimed & keys_of(source.survey.plans))
    pairs = zip(shared, source.backend.get_many(shared), target.get_many(shared), strict=True)
    strangers += [key for key, ours, theirs in pairs if ours != theirs]
    if strangers:
        raise InputError(f"{target.url}: is another store than {source.url} ({strangers[0]} is not the same); give a new or empty place")
    found = [Ledger(target.url, layer_set).marker_bytes() for layer_set in range(len(source.survey.plans.layer_sets))]
    ours = [*source.markers, *({} for _ in found[len(source.markers) :])]
    for layer_set, (here, there) in enumerate(zip(ours, found, strict=True)):
        other = next((unit for unit, data in there.items() if here.get(unit) != data), None)
        if other is not None:
            raise InputError(
                f"{target.url}: has gone on by itself: its {marker_key(other, layer_set)} is not the source's; give a new or empty place"
            )
    return tuple(frozenset(there) for there in found)


@dataclass(frozen=True, slots=True)
class _Copier:
    source: Source
    target: Backend
    there: tuple[frozenset[int], ...]
    """Units that the target had, for each set of layers."""
    keys: frozenset[str]
    """Scores and results that the target had."""

    # ---- plans and units

    def copy_plans(self) -> None:
        """In the order in which they are claimed: plans, then sets of layers."""
        keys = keys_of(self.source.survey.plans)
        for key in sorted(keys, key=lambda key: (not key.startswith(f"{PLANS_FOLDER}/"), key)):
            self._write(key, self.source.backend.get(key))
        settle(self.target)

    def copy_unit(self, unit: int) -> _Tally:
        """All sets of layers of one unit, and its scores; what is damaged is left out, with all that follows it."""
        tally = _Tally()
        for layer_set, markers in enumerate(self.source.markers):
            if unit in markers:
                self._copy_set(unit, layer_set, tally)
            if tally.flaws:
                return tally
        for judge in self.source.survey.judges:
            self._copy_scores(judge, unit, tally)
        return tally

    def _copy_set(self, unit: int, layer_set: int, tally: _Tally) -> None:
        if unit in self.there[layer_set]:
            tally.already_there += layer_set == 0
            return
        marker = self.source.marker(unit, layer_set)
        if isinstance(marker, Flaw):
            tally.flaws.append(marker)
            return
        # All of them are read before the first is written: a damaged unit leaves nothing at the target.
        objects = self._intact(self.source.backend, marker, IN_SOURCE, tally)
        tally.num_bytes += sum(self._write(key, data) for key, data in objects.items())
        if objects:
            self._intact(self.target, marker, AT_TARGET, tally)
        if tally.flaws:
            return
        tally.num_bytes += self._write(marker_key(unit, layer_set), self.source.markers[layer_set][unit])
        if layer_set == 0:
            tally.units += 1
            tally.rows += marker.num_rows

    def _intact(self, backend: Backend, marker: Marker, where: str, tally: _Tally) -> dict[str, bytes]:
        """All objects of the marker; none if one of them is wrong."""
        found = {key: intact_object(backend, key, record, where) for key, record in marker.objects.items()}
        flaws = [data for data in found.values() if isinstance(data, Flaw)]
        tally.flaws += flaws
        return {} if flaws else {key: data for key, data in found.items() if isinstance(data, bytes)}

    def _copy_scores(self, judge: str, unit: int, tally: _Tally) -> None:
        """Answers and scores, if they fit each other: no marker speaks of them."""
        raw, scores = self.source.survey.score_keys(judge, unit)
        if not {raw, scores} <= self.source.survey.keys or scores in self.keys:
            return
        raw_data, scores_data = self.source.backend.get(raw), self.source.backend.get(scores)
        try:
            said_R = decode_table(raw_data, raw).column("score").to_numpy()
            found_R = decode_unit(score_array(self.source.survey.plans, judge), scores_data, scores)
        except UNREADABLE as error:
            key = scores if str(error).startswith(scores) else raw
            tally.flaws.append(Flaw(key, Kind.CORRUPT, f"{IN_SOURCE}: {unreadable(error, key)}"))
            return
        if not np.array_equal(found_R[: len(said_R)], said_R):
            tally.flaws.append(Flaw(scores, Kind.CORRUPT, f"{IN_SOURCE}: differs from the judge's answers"))
            return
        tally.num_bytes += self._write(raw, raw_data) + self._write(scores, scores_data)

    # ---- what was concluded

    def copy_conclusions(self) -> _Tally:
        """Metadata of judges, results, kept states, and which of them are in force."""
        tally = _Tally()
        for key in sorted(key for key in self.source.survey.keys if key.startswith("scores/") and key.endswith(f"/{METADATA_NAME}")):
            if key not in self.keys:
                self.target.replace(key, self.source.backend.get(key))
        for name in sorted({parts[1] for parts in self._split("reduced") if len(parts) > 2}):
            self._copy_result(name, tally)
        for name in (parts[1] for parts in self._split(VIEWS_FOLDER)):
            self._copy_state(name.removesuffix(".json"), tally)
        if self.source.at is not None:
            tally.num_bytes += self._write(view_key(self.source.at), self.source.snapshot.to_bytes())
        for key in sorted(LATEST_KEYS):
            self._copy_latest(key)
        return tally

    def _split(self, folder: str) -> list[list[str]]:
        """The source's keys below `folder`, in parts."""
        return [key.split("/") for key in sorted(self.source.survey.keys) if key.startswith(f"{folder}/")]

    def _copy_result(self, name: str, tally: _Tally) -> None:
        """Its group comes last, as it was written; a result without one was never finished."""
        folder, keys = f"reduced/{name}", self.source.survey.keys
        group = f"{folder}/{METADATA_NAME}"
        if group not in keys:
            return
        try:
            result = read_reduced(self.source.backend, name)
        except (*UNREADABLE, RuntimeError, FileNotFoundError) as error:
            tally.flaws.append(Flaw(folder, Kind.CORRUPT, f"{IN_SOURCE}: {unreadable(error, folder)}"))
            return
        if self.source.at not in {None, result.attributes.get("ledger_digest")}:
            return
        own = sorted(key for key in keys if key.startswith(f"{folder}/") and key != group)
        for objects in (own, (f"reduced/{METADATA_NAME}", group)):
            missing = [key for key in objects if key not in self.keys]
            tally.num_bytes += sum(read_ahead(self._copy_object, missing, OBJECTS_AHEAD))

    def _copy_object(self, key: str) -> int:
        data = self.source.backend.get(key)
        self.target.create_all({key: data})
        return len(data)

    def _copy_state(self, digest: str, tally: _Tally) -> None:
        if self.source.at is not None:
            return
        try:
            read_view(self.source.backend, digest)
        except (*UNREADABLE, InputError) as error:
            key = view_key(digest)
            tally.flaws.append(Flaw(key, Kind.CORRUPT, f"{IN_SOURCE}: {unreadable(error, key)}"))
            return
        tally.num_bytes += self._write(view_key(digest), self.source.backend.get(view_key(digest)))

    def _copy_latest(self, key: str) -> None:
        """What is in force, if it was copied."""
        data = self.source.backend.get_or_none(key)
        if data is None or self.target.get_or_none(key) == data:
            return
        group = f"{key.partition('/')[0]}/{json.loads(data)['name']}/{METADATA_NAME}"
        if self.target.get_or_none(group) is not None:
            self.target.replace(key, data)

    def _write(self, key: str, data: bytes) -> int:
        """Bytes that were written or found there. Raises IntegrityError if the target holds others under this name."""
        if not self.target.create_once(key, data).is_ours:
            raise IntegrityError(f"{self.target.url}: {key} is there already, with other bytes than the source's; give another place")
        return len(data)
