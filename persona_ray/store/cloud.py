"""A store on S3, Google Cloud Storage or Azure, through obstore; and, for notebooks and tests, one in this process's memory.

Credentials, region and endpoint come from the provider's usual environment variables or instance roles. Writes are
conditional (If-None-Match: *) and never multipart, because some servers ignore the condition on multipart completion.
"""

from __future__ import annotations

import re
from datetime import timedelta
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store, from_url
from zarr.storage import ObjectStore

from persona_ray.errors import InputError
from persona_ray.store.backend import ListedObject
from persona_ray.store.remote import (
    GIVE_CREDENTIALS,
    HASTY,
    NO_CREDENTIALS,
    PATIENT,
    REMEDIES,
    Fault,
    Patience,
    RemoteBackend,
    S3Access,
    one_line,
)

MEMORY = "memory"
SCHEMES = frozenset({"s3", "gs", "az", MEMORY})
ROLE_SERVICE = "169.254.169.254"
"""Where a cloud machine is told its role's credentials: the last place that is asked for them."""
LASTING_FAULTS = (
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.UnknownConfigurationKeyError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
)
SHORT = Patience(total_s=2, request_s=120, longest_wait_s=1)
"""The client's own retries, inside each of ours: for a request that it knows to be harmless."""
_STATUS = re.compile(r"status code: (\d{3})")
_NO_PART = re.compile(r"status code: 416|non-partial response")
"""Nothing of the object lies there, or the service answered with all of it."""
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_CODE_IN_LIST = re.compile(r"\(code: (\w+)\)")
"""Deletions travel as a list, whose reply is a success as a whole and names what was refused."""
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")


class CloudBackend(RemoteBackend):
    """Objects are keys below the prefix of `url`."""

    faults: ClassVar[tuple[type[Exception], ...]] = (exceptions.BaseError, FileNotFoundError)

    def __init__(self, url: str, *, is_hasty: bool = False) -> None:
        super().__init__(url, HASTY if is_hasty else PATIENT)
        self._store = _connect(url, self.patience.request_s)

    def _zarr_store(self) -> ObjectStore[Any]:
        return ObjectStore(self._store, read_only=True)

    def _put(self, key: str, data: bytes, *, is_new: bool) -> None:
        obstore.put(self._store, key, data, mode="create" if is_new else "overwrite", use_multipart=False)

    def _read(self, key: str) -> bytes | None:
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError as error:
            if self._fault(error).is_lasting:
                raise
            return None

    def _read_part(self, key: str, start: int, stop: int | None) -> bytes | None:
        try:
            return self._range(key, start, stop)
        except FileNotFoundError as error:
            if self._fault(error).is_lasting:
                raise
            return None
        except exceptions.BaseError as error:
            if not _NO_PART.search(str(error)):
                raise
        whole = self._read(key)
        return None if whole is None else whole[start:stop]

    def _range(self, key: str, start: int, stop: int | None) -> bytes:
        wanted: Any = {"suffix": -start} if start < 0 else {"offset": start} if stop is None else (start, stop)
        try:
            return bytes(obstore.get(self._store, key, options={"range": wanted}).bytes())
        except exceptions.NotSupportedError:
            # Azure counts from the beginning alone.
            num_bytes = obstore.head(self._store, key)["size"]
            return self._range(key, max(0, num_bytes + start), num_bytes) if num_bytes else b""

    def _keys(self, folder: str) -> list[str]:
        return [item["path"] for chunk in obstore.list(self._store, folder or None) for item in chunk]

    def _objects(self, folder: str) -> list[ListedObject]:
        items = (item for chunk in obstore.list(self._store, folder or None) for item in chunk)
        return [ListedObject(item["path"], item["size"], item["last_modified"].timestamp()) for item in items]

    def _delete(self, key: str) -> None:
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError as error:
            if self._fault(error).is_lasting:
                raise

    def _folders(self, folder: str) -> list[str]:
        return list(obstore.list_with_delimiter(self._store, folder or None)["common_prefixes"])

    def _first_keys(self) -> list[str]:
        return [item["path"] for item in next(iter(obstore.list(self._store, chunk_size=10)), ())]

    def _fault(self, error: Exception) -> Fault:
        """The client keeps status and code in its message only, and the message can quote the request: these three, no more."""
        text = str(error)
        status, code, message = (pattern.search(text) for pattern in (_STATUS, _CODE, _MESSAGE))
        if isinstance(error, FileNotFoundError) and (code is None or code.group(1) != "NoSuchBucket"):
            return Fault("there is no such object", is_lasting=False)
        if ROLE_SERVICE in text:
            # Silence may be a passing fault of a machine that has a role; an answer is not.
            return Fault(NO_CREDENTIALS, is_lasting=status is not None, remedy=GIVE_CREDENTIALS)
        if status is not None:
            fault = Fault.of_reply(int(status.group(1)), code.group(1) if code else "", message.group(1) if message else "")
            return Fault(fault.words, fault.is_lasting or isinstance(error, LASTING_FAULTS), fault.remedy)
        refused = _CODE_IN_LIST.search(text)
        if refused is not None and refused.group(1) in REMEDIES:
            return Fault.of_reply(HTTPStatus.FORBIDDEN, refused.group(1), "")
        return Fault(one_line(text), isinstance(error, LASTING_FAULTS))


_in_memory: dict[str, MemoryStore] = {}
"""By URL: whoever opens the same one in this process finds the same objects, and nobody else finds any."""


def _connect(url: str, request_s: float) -> S3Store | GCSStore | AzureStore | MemoryStore:
    if urlsplit(url).scheme == MEMORY:
        return _in_memory.setdefault(url, MemoryStore())
    try:
        store = from_url(
            url,
            **(_s3_options() if urlsplit(url).scheme == "s3" else {}),
            client_options={
                "allow_http": (S3Access.from_environment().endpoint or "").startswith("http://"),
                "timeout": timedelta(seconds=request_s),
            },
            retry_config={
                "max_retries": 30,
                "backoff": {
                    "init_backoff": timedelta(seconds=SHORT.first_wait_s),
                    "max_backoff": timedelta(seconds=SHORT.longest_wait_s),
                    "base": 2,
                },
                "retry_timeout": timedelta(seconds=SHORT.total_s),
            },
        )
    except (exceptions.BaseError, ValueError) as error:
        raise InputError(f"{url}: not usable as an object-store URL ({one_line(str(error))})") from None
    if not isinstance(store, S3Store | GCSStore | AzureStore):
        raise InputError(f"{url}: give an s3:, gs: or az: URL, or a folder")
    return store


def _s3_options() -> dict[str, Any]:
    access = S3Access.from_environment()
    options: dict[str, Any] = {"endpoint": access.endpoint} if access.endpoint else {}
    return options | {"skip_signature": access.is_anonymous, "request_payer": access.pays_for_requests}
