"""Which units exist: those with a marker, and no others. Resume is one listing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from persona_ray.errors import IntegrityError
from persona_ray.spec import RunCounts
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.marker import Marker, commits_folder, marker_key, place_of_marker_key
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.snapshot import Snapshot


class Ledger:
    """The commit markers of the store at `url`, for one set of layers (0: those it began with).

    Every call looks again; markers, once read, never change and are kept.
    """

    def __init__(self, url: str, layer_set: int = 0, at: Snapshot | None = None) -> None:
        """`at`: as it was then, and no later. Raises InputError if `url` cannot be one of a store."""
        self.url = absolute_url(url)
        self.layer_set = layer_set
        self._at = at
        self._backend = open_backend(self.url)
        self._known: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[type[Ledger], tuple[str, int, Snapshot | None]]:
        """Travels as its URL; connections do not travel."""
        return Ledger, (self.url, self.layer_set, self._at)

    def committed(self) -> frozenset[int]:
        """Units that exist; one listing."""
        return frozenset(self._listed())

    def marker(self, unit: int) -> Marker | None:
        """The unit's marker, or None if the unit does not exist (yet, or then).

        Raises IntegrityError for a damaged one, and for one of the state that was asked for which is not there any more.
        """
        if self._at is not None and unit not in self._at.markers[self.layer_set]:
            return None
        data = self._known.get(unit) or self._backend.get_or_none(marker_key(unit, self.layer_set))
        if data is None and self._at is not None:
            raise self._lost(unit, "requeued", self._at)
        if data is None:
            return None
        self._keep({unit: data})
        return self._parsed(unit, data)

    def markers(self) -> dict[int, Marker]:
        """Unit -> its marker, by rising unit. Raises IntegrityError for a damaged one."""
        return {unit: self._parsed(unit, data) for unit, data in self.marker_bytes().items()}

    def marker_bytes(self) -> Mapping[int, bytes]:
        """Unit -> its marker as it is stored, by rising unit; a GET for each that was not seen before."""
        committed = sorted(self._listed())
        unread = [unit for unit in committed if unit not in self._known]
        self._keep(dict(zip(unread, self._read(unread), strict=True)))
        return {unit: self._known[unit] for unit in committed}

    def has(self, unit: int) -> bool:
        """Whether the unit is committed now. One request."""
        return self._backend.get_or_none(marker_key(unit, self.layer_set)) is not None

    def counts(self) -> RunCounts:
        """Rows asked for by all plans, stored, and refused with their reasons. Raises InputError if there is no store."""
        plans = read_plans(self._backend)
        return count_rows(plans, self.markers(), (row for unit in plans.units for row in plans.rows(unit)))

    def _listed(self) -> Iterable[int]:
        return self._listed_now() if self._at is None else self._at.markers[self.layer_set]

    def _read(self, units: Sequence[int]) -> list[bytes]:
        try:
            return self._backend.get_many(marker_key(unit, self.layer_set) for unit in units)
        except IntegrityError as error:
            gone = sorted(set(units).difference(self._listed_now()))
            if self._at is None or not gone:
                raise
            raise self._lost(gone[0], "requeued", self._at) from error

    def _listed_now(self) -> Iterable[int]:
        places = map(place_of_marker_key, self._backend.list_keys(commits_folder(self.layer_set)))
        return [place[1] for place in places if place is not None and place[0] == self.layer_set]

    def _keep(self, found: Mapping[int, bytes]) -> None:
        """Raises IntegrityError if a marker is not the one of the state that was asked for."""
        for unit, data in found.items():
            if self._at is not None and hashlib.sha256(data).hexdigest() != self._at.markers[self.layer_set][unit]:
                raise self._lost(unit, "made again", self._at)
            self._known[unit] = data

    def _lost(self, unit: int, what: str, at: Snapshot) -> IntegrityError:
        return IntegrityError(f"{self.url}: unit {unit:06d} was {what} since the state {at.digest[:12]}..., which is lost with it")

    def _parsed(self, unit: int, data: bytes) -> Marker:
        return Marker.from_bytes(data, f"{self.url}: {marker_key(unit, self.layer_set)}")


def count_rows(plans: Plans, markers: Mapping[int, Marker], rows: Iterable[int]) -> RunCounts:
    """What became of `rows`: asked, stored, refused with the reasons. The rest is not yet written."""
    counts, reasons = RunCounts(asked=0), Counter[str]()
    for row in rows:
        counts.asked += 1
        marker = markers.get(plans.unit_of(row))
        if marker is None:
            continue
        if row in marker.refused:
            reasons[marker.refused[row]] += 1
        else:
            counts.stored += 1
    counts.refused, counts.reasons = reasons.total(), dict(reasons.most_common())
    return counts
