"""What every object-store client shares: how long a fault is borne, create once, errors in words without credentials.

A client brings five plain requests and an account of its exceptions. All patience is here, and the clients' own retries are
kept short: so both give up after the same stated time, and a conditional put is followed by a look at what is really there.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from persona_ray.errors import InputError, RetryableError
from persona_ray.metrics import STORE_RETRIES, record
from persona_ray.store.backend import PROBE_PREFIX, Backend, ListedObject, StoredObject, recorded

T = TypeVar("T")

LASTING_CODES = frozenset({"NoSuchBucket", "PermanentRedirect", "AuthorizationHeaderMalformed", "ExpiredToken"})
PASSING_CODES = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})
"""S3 answers these with 400, although the same request may succeed."""
PASSING_STATUSES = frozenset({408, 409, 412, 425, 429})
REMEDIES = {
    "NoSuchBucket": "there is no such bucket; create it first, or correct the URL",
    "ExpiredToken": "the credentials have expired; renew them, and run the same command again",
    "AccessDenied": "these credentials may not do that here; give them the right to list, read and write, or use another bucket",
    "InvalidAccessKeyId": "the service does not know these credentials; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the service does not accept these credentials; check AWS_SECRET_ACCESS_KEY and the region",
}
REMEDY = "check bucket, region, endpoint and credentials"
NO_CREDENTIALS = "no credentials were found"
GIVE_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run on a machine with a role; AWS_SKIP_SIGNATURE=true for a public bucket"
)
MAX_WORDS = 200


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a fault that may pass is borne, for each object and each listing."""

    total_s: float
    """No attempt begins later than this after the first; one that hangs ends after `request_s` more."""
    request_s: float
    first_wait_s: float = 0.2
    longest_wait_s: float = 20.0

    def waits_s(self) -> Iterator[float]:
        """Before the second attempt, the third, ...: doubling, and each shortened at random so that writers do not march in step."""
        wait_s = self.first_wait_s
        while True:
            yield wait_s * random.uniform(0.5, 1.0)  # noqa: S311
            wait_s = min(2 * wait_s, self.longest_wait_s)


PATIENT = Patience(total_s=300, request_s=120)
"""Minutes of throttling are ordinary when many replicas write; the scheduler attempts the unit again after that."""
HASTY = Patience(total_s=15, request_s=10)
"""For the checks before a run begins: a wrong endpoint must not take minutes to be called wrong."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong with one request, in words that can be shown: the service's code and message, nothing of the request."""

    words: str
    is_lasting: bool
    """Whether another attempt is pointless."""
    remedy: str = REMEDY

    @classmethod
    def of_reply(cls, status: int, code: str, message: str) -> Fault:
        """For an HTTP reply. 4xx lasts, but for conflicts, throttling and slow or damaged uploads; everything else passes."""
        is_refusal = 400 <= status < 500 and status not in PASSING_STATUSES and code not in PASSING_CODES
        named = f"{code} {status}" if code and code != str(status) else f"HTTP {status}"
        return cls(one_line(f"{named}: {message}" if message else named), is_refusal or code in LASTING_CODES, REMEDIES.get(code, REMEDY))


@dataclass(frozen=True, slots=True)
class S3Access:
    """How to reach S3, from the environment. Credentials are not here: each client finds them by its provider's default chain."""

    endpoint: str | None
    region: str | None
    is_anonymous: bool
    """`AWS_SKIP_SIGNATURE=true`: a public bucket, without any credentials."""
    pays_for_requests: bool
    """`AWS_REQUEST_PAYER=requester`: the reader's account is charged, and such a bucket refuses whoever does not say so."""

    @classmethod
    def from_environment(cls) -> S3Access:
        """As it is now."""
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        return cls(
            endpoint=next((os.environ[name] for name in names if os.environ.get(name)), None),
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            is_anonymous=os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in {"1", "true", "yes"},
            pays_for_requests=os.environ.get("AWS_REQUEST_PAYER", "").lower() in {"1", "true", "yes", "requester"},
        )


class RemoteBackend(Backend):
    """`Backend` over a network. Passing faults are borne for `patience`, then RetryableError; lasting ones are InputError at once."""

    faults: ClassVar[tuple[type[Exception], ...]]
    """Whatever the client raises for a request that failed; anything else is a defect and goes through."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url = url
        self.patience = patience

    @abstractmethod
    def _put(self, key: str, data: bytes, *, is_new: bool) -> None:
        """One put, never multipart. `is_new`: on the condition that there is no such object."""

    @abstractmethod
    def _read(self, key: str) -> bytes | None:
        """The whole object, or None if the service says that there is no such object (not: no such bucket)."""

    @abstractmethod
    def _read_part(self, key: str, start: int, stop: int | None) -> bytes | None:
        """See `Backend.part_or_none`: one request, where object and service allow it."""

    @abstractmethod
    def _keys(self, folder: str) -> list[str]:
        """Keys below `folder` ("" = everything), relative, in any order, every page."""

    @abstractmethod
    def _objects(self, folder: str) -> list[ListedObject]:
        """`_keys` with sizes and dates."""

    @abstractmethod
    def _delete(self, key: str) -> None:
        """Remove one object; a client that complains of its absence is not heeded."""

    @abstractmethod
    def _folders(self, folder: str) -> list[str]:
        """Folders directly below `folder`, relative, in any order, every page."""

    @abstractmethod
    def _first_keys(self) -> list[str]:
        """A few keys, at least two if there are two: enough to see whether the place is empty."""

    @abstractmethod
    def _zarr_store(self) -> Store:
        """The client's own store for Zarr, read-only."""

    @abstractmethod
    def _fault(self, error: Exception) -> Fault:
        """What one of `faults` means."""

    @recorded("create")
    def create_once(self, key: str, data: bytes) -> StoredObject:
        """See `Backend`. The exception of a failed conditional put is never believed.

        A lost reply looks like a conflict, and a conflict is reported for objects that are not there: only a GET tells.
        """

        def attempt() -> StoredObject:
            try:
                self._put(key, data, is_new=True)
            except self.faults as error:
                # Whoever may not write learns it also where the object is there already: a probe of rights would find its own.
                found = None if self._fault(error).is_lasting else self._read(key)
                if found is None:
                    raise
                return StoredObject.of(found, data)
            return StoredObject.of(data, data)

        return self._patiently(f"creating {key}", attempt)

    @recorded("read")
    def get_or_none(self, key: str) -> bytes | None:  # noqa: D102
        return self._patiently(f"reading {key}", lambda: self._read(key))

    @recorded("read")
    def part_or_none(self, key: str, start: int, stop: int | None = None) -> bytes | None:  # noqa: D102
        return self._patiently(f"reading {key}", lambda: self._read_part(key, start, stop))

    @recorded("list")
    def list_keys(self, folder: str) -> list[str]:  # noqa: D102
        return sorted(self._patiently(f"listing {folder or 'the store'}", lambda: self._keys(folder)))

    @recorded("list")
    def list_objects(self, folder: str) -> list[ListedObject]:  # noqa: D102
        found = self._patiently(f"listing {folder or 'the store'}", lambda: self._objects(folder))
        return sorted(found, key=lambda item: item.key)

    def delete(self, key: str) -> None:  # noqa: D102
        self._patiently(f"deleting {key}, for which repair and gc need the right to delete,", lambda: self._delete(key))

    @recorded("list")
    def list_folders(self, folder: str) -> list[str]:  # noqa: D102
        return sorted(self._patiently(f"listing {folder or 'the store'}", lambda: self._folders(folder)))

    def first_foreign_key(self) -> str | None:  # noqa: D102
        keys = self._patiently("listing the store", self._first_keys)
        return next((key for key in keys if not key.startswith(f"{PROBE_PREFIX}/")), None)

    def zarr_store(self) -> PatientStore:  # noqa: D102
        return PatientStore(self._zarr_store(), self)

    def _replace(self, key: str, data: bytes) -> None:
        self._patiently(f"writing {key}", lambda: self._put(key, data, is_new=False))

    def _patiently(self, what: str, attempt: Callable[[], T]) -> T:
        """`attempt`, again and again while its fault may pass."""
        trial = _Trial(self, what)
        while True:
            try:
                return attempt()
            except self.faults as error:
                wait_s = trial.wait_s(self._fault(error))
            record(STORE_RETRIES, 1)
            time.sleep(wait_s)


class _Trial:
    """One action's attempts so far: how long to wait for the next one, or what to say at the end."""

    def __init__(self, backend: RemoteBackend, what: str) -> None:
        self._patience = backend.patience
        self._said = f"{backend.url}: {what}"
        self._waits_s = self._patience.waits_s()
        self._end_s = time.monotonic() + self._patience.total_s

    def wait_s(self, fault: Fault) -> float:
        """Before the next attempt. Raises InputError or RetryableError instead of the client's error.

        Without its cause, because a client's own message can hold the request, and with it the key's name.
        """
        wait_s = next(self._waits_s)
        if fault.is_lasting:
            raise InputError(f"{self._said} is not possible ({fault.words}); {fault.remedy}") from None
        if time.monotonic() + wait_s > self._end_s:
            raise RetryableError(f"{self._said} failed for {self._patience.total_s:g} s ({fault.words})") from None
        return wait_s


class PatientStore(WrapperStore[Store]):
    """The client's own Zarr store, whose reads have the backend's patience and its words."""

    def __init__(self, store: Store, backend: RemoteBackend) -> None:
        super().__init__(store)
        self._backend = backend

    def _with_store(self, store: Store) -> PatientStore:
        return type(self)(store, self._backend)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The object, or a part of it; None if there is none."""
        trial = _Trial(self._backend, f"reading {key}")
        while True:
            try:
                return await super().get(key, prototype, byte_range)
            except self._backend.faults as error:
                wait_s = trial.wait_s(self._backend._fault(error))  # noqa: SLF001
            record(STORE_RETRIES, 1)
            await asyncio.sleep(wait_s)


def one_line(text: str) -> str:
    """The beginning of `text`, without line breaks."""
    line = " ".join(text.partition("\n\nDebug source")[0].split())
    return line if len(line) <= MAX_WORDS else f"{line[:MAX_WORDS]}..."
