"""What the store needs of a place that keeps objects: create once, read, list.

But for Zarr metadata and the two `latest.json` there is no overwriting: whoever comes late changes nothing. Deleting is for
`repair` alone.
Knows keys and bytes; knows nothing of Zarr arrays, units or plans.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from zarr.abc.store import Store

from persona_ray.errors import InputError, IntegrityError, StateError
from persona_ray.metrics import STORE_BYTES, STORE_REQUESTS, STORE_SECONDS, record

P = ParamSpec("P")
T = TypeVar("T")

METADATA_NAME = "zarr.json"
LATEST_KEYS = frozenset({"scores/latest.json", "reduced/latest.json"})
PROBE_PREFIX = "_probe"
NUM_READERS = 16
"""Small objects read at once; each waits for the network, not for the processor."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the store holds under one key now, whoever wrote it."""

    num_bytes: int
    sha256: str
    is_ours: bool
    """Whether those bytes equal the ones we brought."""

    @classmethod
    def of(cls, stored: bytes, ours: bytes) -> StoredObject:
        """The record of `stored`, for a writer who brought `ours`."""
        return cls(len(stored), hashlib.sha256(stored).hexdigest(), is_ours=stored == ours)


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object as a listing shows it."""

    key: str
    num_bytes: int
    modified_s: float
    """Seconds since 1970, by the service's clock."""


def recorded(operation: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For the methods of a backend that make requests: how many succeed, and what they take, goes into the run's metrics."""

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @wraps(method)
        def call(*arguments: P.args, **named: P.kwargs) -> T:
            began = time.perf_counter()
            answer = method(*arguments, **named)
            record(STORE_SECONDS, time.perf_counter() - began, operation=operation)
            record(STORE_REQUESTS, 1, operation=operation)
            record(STORE_BYTES, sum(len(part) for part in (*arguments, answer) if isinstance(part, bytes)), operation=operation)
            return answer

        return call

    return decorate


class Backend(ABC):
    """A place that keeps objects under `/`-separated keys, relative to `url`.

    Raises InputError where access is refused or impossible, RetryableError for passing faults.
    """

    url: str

    @abstractmethod
    def create_once(self, key: str, data: bytes) -> StoredObject:
        """Create `key`. The first writer wins; the answer describes the winner's bytes. Durable on return."""

    @abstractmethod
    def get_or_none(self, key: str) -> bytes | None:
        """The object's bytes, or None if there is no such object."""

    @abstractmethod
    def part_or_none(self, key: str, start: int, stop: int | None = None) -> bytes | None:
        """`data[start:stop]` of the object's bytes, and no others are moved; None if there is no such object.

        `start` is less than `stop`; or it is negative, counts from the end, and goes without `stop`. What would lie behind the end
        of the object is left out, as in Python.
        """

    @abstractmethod
    def list_keys(self, folder: str) -> list[str]:
        """All keys below `folder` at any depth, sorted; "" lists everything."""

    @abstractmethod
    def list_objects(self, folder: str) -> list[ListedObject]:
        """`list_keys` with sizes and dates, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object for good; one that is not there is no fault."""

    @abstractmethod
    def list_folders(self, folder: str) -> list[str]:
        """Keys of the folders directly below `folder`, sorted."""

    @abstractmethod
    def first_foreign_key(self) -> str | None:
        """Some key that is not a leftover of a write probe or of an interrupted write; None = the place is empty."""

    @abstractmethod
    def zarr_store(self) -> Store:
        """The same place for Zarr, read-only."""

    @abstractmethod
    def _replace(self, key: str, data: bytes) -> None:
        """Create or overwrite `key`; readers see the old bytes or the new ones, never a mixture."""

    def list_temporary(self) -> list[ListedObject]:
        """What interrupted writes left behind, and writes at work have now; no listing of keys shows it."""
        return []

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises IntegrityError if there is no such object."""
        return self._there(key, self.get_or_none(key))

    def get_part(self, key: str, start: int, stop: int | None = None) -> bytes:
        """`part_or_none`. Raises IntegrityError if there is no such object."""
        return self._there(key, self.part_or_none(key, start, stop))

    def get_many(self, keys: Iterable[str]) -> list[bytes]:
        """`get` for many small objects at once, in order."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            return list(pool.map(self.get, keys))

    def replace(self, key: str, data: bytes) -> None:
        """Create or overwrite one of the few objects that may ever change."""
        if key.rpartition("/")[2] != METADATA_NAME and key not in LATEST_KEYS:
            raise StateError(f"{self.url}: {key} is write-once and must not be replaced")
        self._replace(key, data)

    def create_all(self, objects: Mapping[str, bytes]) -> None:
        """Metadata replaced, everything else created once, in the mapping's order."""
        for key, data in objects.items():
            if key.rpartition("/")[2] == METADATA_NAME:
                self.replace(key, data)
            else:
                self.create_once(key, data)

    def probe_write_once(self) -> None:
        """Create one key twice. Raises InputError if the second create is let through, or if nothing can be written at all.

        The key stays, and later probes find it.
        """
        key = f"{PROBE_PREFIX}/write-once"
        for _ in range(2):
            last = self.create_once(key, b"persona_ray write probe " + secrets.token_hex(8).encode())
        if last.is_ours:
            raise InputError(
                f"{self.url}: this service ignores conditional writes (If-None-Match), so two writers could overwrite each other; "
                "use a service that honours them (AWS S3, Google Cloud Storage, Azure, Ceph) or a folder"
            )

    def _there(self, key: str, data: bytes | None) -> bytes:
        if data is None:
            raise IntegrityError(f"{self.url}: object {key} is missing; was something deleted by hand?")
        return data
