"""Which units exist: those with a marker, and no others. Resume is one listing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from persona_ray.spec import RunCounts
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.marker import COMMITS_FOLDER, Marker, digest_of_markers, marker_key, unit_of_marker_key
from persona_ray.store.plan_file import read_plan_file


class Ledger:
    """The commit markers of the store at `url`. Every call looks again; markers, once read, never change and are kept."""

    def __init__(self, url: str) -> None:
        """Raises InputError if `url` cannot be one of a store."""
        self.url = absolute_url(url)
        self._backend = open_backend(self.url)
        self._known: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[type[Ledger], tuple[str]]:
        """Travels as its URL; connections do not travel."""
        return Ledger, (self.url,)

    def committed(self) -> frozenset[int]:
        """Units that exist; one listing."""
        units = (unit_of_marker_key(key) for key in self._backend.list_keys(COMMITS_FOLDER))
        return frozenset(unit for unit in units if unit is not None)

    def marker(self, unit: int) -> Marker | None:
        """The unit's marker, or None if the unit does not exist (yet). Raises IntegrityError for a damaged one."""
        data = self._known.get(unit) or self._backend.get_or_none(marker_key(unit))
        if data is None:
            return None
        self._known[unit] = data
        return self._parsed(unit, data)

    def markers(self) -> dict[int, Marker]:
        """Unit -> its marker, by rising unit. Raises IntegrityError for a damaged one."""
        return {unit: self._parsed(unit, data) for unit, data in self._marker_bytes().items()}

    def digest(self) -> str:
        """SHA-256 (hex) over all markers: equal digests, equal committed bytes."""
        return digest_of_markers(self._marker_bytes())

    def counts(self) -> RunCounts:
        """Rows asked for by the plan, stored, and refused with their reasons. Raises InputError if there is no store."""
        markers = self.markers().values()
        reasons = Counter(reason for marker in markers for reason in marker.refused.values())
        return RunCounts(
            asked=len(read_plan_file(self._backend).plan.keys),
            stored=sum(marker.num_stored for marker in markers),
            refused=reasons.total(),
            reasons=dict(reasons.most_common()),
        )

    def _parsed(self, unit: int, data: bytes) -> Marker:
        return Marker.from_bytes(data, f"{self.url}: {marker_key(unit)}")

    def _marker_bytes(self) -> Mapping[int, bytes]:
        committed = sorted(self.committed())
        unread = [unit for unit in committed if unit not in self._known]
        self._known.update(zip(unread, self._backend.get_many(marker_key(unit) for unit in unread), strict=True))
        return {unit: self._known[unit] for unit in committed}
