"""A state of a growing store, named by a digest: which units existed, and exactly which markers they had.

`_views/{digest}.json` keeps a state for ever: whoever opens the store at that digest sees the same rows, however it has grown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from persona_ray.errors import InputError, IntegrityError
from persona_ray.store.backend import Backend
from persona_ray.store.marker import digest_of_lines

VIEWS_FOLDER = "_views"
MAX_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The ledger at one moment."""

    markers: tuple[Mapping[int, str], ...]
    """For each set of layers: unit -> SHA-256 (hex) of its marker, by rising unit."""

    @classmethod
    def of(cls, markers: Sequence[Mapping[int, bytes]]) -> Snapshot:
        """Of the markers as they are stored, by set of layers."""
        return cls(tuple({unit: hashlib.sha256(data).hexdigest() for unit, data in sorted(found.items())} for found in markers))

    @property
    def units(self) -> tuple[int, ...]:
        """Units that exist, rising: those with a marker for the layers that the store began with."""
        return tuple(self.markers[0])

    @property
    def digest(self) -> str:
        """SHA-256 (hex): equal digests, equal committed bytes."""
        return digest_of_lines(
            f"{unit} {sha256}" if layer_set == 0 else f"{layer_set}/{unit} {sha256}"
            for layer_set, found in enumerate(self.markers)
            for unit, sha256 in found.items()
        )

    def part(self, units: Iterable[int], layer_sets: Iterable[int]) -> Snapshot:
        """Of `units` and `layer_sets` alone. Raises KeyError for a unit that does not exist with them."""
        wanted, kept = sorted(units), frozenset(layer_sets)
        return Snapshot(
            tuple({unit: found[unit] for unit in wanted} if number in kept else {} for number, found in enumerate(self.markers))
        )

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps({"markers": [{str(unit): sha256 for unit, sha256 in found.items()} for found in self.markers]}).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Snapshot:
        """The reverse. Raises IntegrityError for anything unreadable."""
        try:
            return cls(tuple({int(unit): str(sha256) for unit, sha256 in found.items()} for found in json.loads(data)["markers"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{where}: damaged view ({error!r})") from error


def view_key(digest: str) -> str:
    """Where a state is kept."""
    return f"{VIEWS_FOLDER}/{digest}.json"


def keep_view(backend: Backend, snapshot: Snapshot) -> str:
    """Make the state citable; answers its digest."""
    backend.create_once(view_key(snapshot.digest), snapshot.to_bytes())
    return snapshot.digest


def read_view(backend: Backend, digest: str) -> Snapshot:
    """The state that was kept under `digest`. Raises InputError if there is none, IntegrityError if it is damaged."""
    data = backend.get_or_none(view_key(digest)) if digest.isalnum() else None
    if data is None:
        known = sorted(key.rpartition("/")[2].removesuffix(".json") for key in backend.list_keys(VIEWS_FOLDER))
        shown = ", ".join(f"{name[:12]}..." for name in known[:MAX_SHOWN]) + (" and more" if len(known) > MAX_SHOWN else "")
        raise InputError(f"{backend.url}: no state {digest} is kept here ({shown or 'none is'}); `store info --cite` keeps one")
    snapshot = Snapshot.from_bytes(data, f"{backend.url}: {view_key(digest)}")
    if snapshot.digest != digest:
        raise IntegrityError(f"{backend.url}: {view_key(digest)} is damaged: it is the state {snapshot.digest}")
    return snapshot
