"""What a copy of a store is made from, and what came of it. Values, and the reading of one object as its marker has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from persona_ray.store.address import open_backend
from persona_ray.store.backend import Backend
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker, ObjectRecord, marker_key
from persona_ray.store.plan_check import believe_plan
from persona_ray.store.reader import open_store
from persona_ray.store.snapshot import Snapshot
from persona_ray.store.survey import Flaw, Kind, Survey
from persona_ray.store.unit_check import UNREADABLE, intact, unreadable

IN_SOURCE = "in the source"
AT_TARGET = "at the target"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did."""

    source: str
    target: str
    units: int
    """Written by this call."""
    rows: int
    """In those units, refused ones included."""
    num_bytes: int
    """Written by this call: objects of units, scores, results and kept states."""
    already_there: int
    """Units that an earlier call had copied."""
    left_out: int
    """Rows of the selection that the source does not have with all the layers asked for."""
    flaws: tuple[Flaw, ...]
    """What is wrong in the source and was not copied, and what is wrong at the target."""

    @property
    def is_right(self) -> bool:
        """Whether everything that was to be copied is there and right."""
        return not self.flaws


@dataclass(frozen=True, slots=True)
class Source:
    """A store as it is now, or was at a state; it may grow meanwhile."""

    survey: Survey
    at: str | None
    markers: tuple[Mapping[int, bytes], ...]
    """For each set of layers: unit -> its marker as it is stored, by rising unit."""

    @classmethod
    def of(cls, url: str, at: str | None = None) -> Source:
        """Raises InputError if there is no such store or state, IntegrityError if its plans are in doubt."""
        state = None if at is None else open_store(url, at).snapshot()
        survey = Survey.of(open_backend(url))
        believe_plan(survey)
        num_sets = len(survey.plans.layer_sets) if state is None else len(state.markers)
        ledgers = [Ledger(survey.backend.url, layer_set, state) for layer_set in range(num_sets)]
        markers = [{unit: data for unit, data in ledger.marker_bytes().items() if unit in survey.plans} for ledger in ledgers]
        return cls(survey, at, tuple(markers))

    @property
    def url(self) -> str:
        """Where it is."""
        return self.backend.url

    @property
    def backend(self) -> Backend:
        """The place."""
        return self.survey.backend

    @property
    def snapshot(self) -> Snapshot:
        """The state that is copied."""
        return Snapshot.of(self.markers)

    def marker(self, unit: int, layer_set: int) -> Marker | Flaw:
        """What is to be copied of a unit, or what is wrong with its marker."""
        key, data = marker_key(unit, layer_set), self.markers[layer_set][unit]
        try:
            marker = Marker.from_bytes(data, key)
            is_right = marker.unit == unit and tuple(marker.objects) == self.survey.own_keys(unit, layer_set) and marker.to_bytes() == data
        except UNREADABLE as error:
            return Flaw(key, Kind.CORRUPT, f"{IN_SOURCE}: {unreadable(error, key)}")
        return marker if is_right else Flaw(key, Kind.CORRUPT, f"{IN_SOURCE}: is not as it was written")


def intact_object(backend: Backend, key: str, record: ObjectRecord, where: str) -> bytes | Flaw:
    """The object, if it is the one that a marker names; else what is wrong, `where` in front."""
    found = intact(key, backend.get_or_none(key), record)
    return Flaw(key, found.kind, f"{where}: {found.problem}") if isinstance(found, Flaw) else found
