"""A store on S3, Google Cloud Storage or Azure, through obstore.

Credentials, region and endpoint come from the provider's usual environment variables or instance roles. Writes are
conditional (If-None-Match: *) and never multipart, because some servers ignore the condition on multipart completion.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store, from_url
from zarr.storage import ObjectStore

from persona_ray.errors import InputError, RetryableError
from persona_ray.store.backend import PROBE_PREFIX, Backend, StoredObject

SCHEMES = frozenset({"s3", "gs", "az"})
MAX_ATTEMPTS = 5
"""Conditional puts that leave no object behind. Each has the client's own retries inside."""
PATIENT_S = 300
HASTY_S = 15
"""For the checks before a run begins: a wrong endpoint must not take minutes to be called wrong."""
LASTING_FAULTS = (
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.UnknownConfigurationKeyError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
)


class CloudBackend(Backend):
    """Objects are keys below the prefix of `url`."""

    def __init__(self, url: str, *, is_hasty: bool = False) -> None:
        self.url = url
        try:
            self._store = _connect(url, HASTY_S if is_hasty else PATIENT_S)
        except (exceptions.BaseError, ValueError) as error:
            raise InputError(f"{url}: not usable as an object-store URL ({_first_line(error)})") from error

    def create_once(self, key: str, data: bytes) -> StoredObject:
        """See `Backend`. The exception of a failed conditional put is never believed.

        A lost reply looks like a conflict, and a conflict is reported for objects that are not there: only a GET tells.
        """
        last_error: Exception | None = None
        for _ in range(MAX_ATTEMPTS):
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except (exceptions.BaseError, FileNotFoundError) as error:
                last_error = error
                found = self.get_or_none(key)
                if found is not None:
                    return StoredObject.of(found, data)
            else:
                return StoredObject.of(data, data)
        with self._errors_in_words(f"creating {key}"):
            raise last_error or exceptions.GenericError("no attempt was made")

    def get_or_none(self, key: str) -> bytes | None:  # noqa: D102
        with self._errors_in_words(f"reading {key}"):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def list_keys(self, folder: str) -> list[str]:  # noqa: D102
        with self._errors_in_words(f"listing {folder or 'the store'}"):
            return sorted(item["path"] for chunk in obstore.list(self._store, folder or None) for item in chunk)

    def list_folders(self, folder: str) -> list[str]:  # noqa: D102
        with self._errors_in_words(f"listing {folder or 'the store'}"):
            return sorted(obstore.list_with_delimiter(self._store, folder or None)["common_prefixes"])

    def first_foreign_key(self) -> str | None:  # noqa: D102
        with self._errors_in_words("listing the store"):
            keys = (item["path"] for chunk in obstore.list(self._store, chunk_size=10) for item in chunk)
            return next((key for key in keys if not key.startswith(f"{PROBE_PREFIX}/")), None)

    def zarr_store(self) -> ObjectStore[Any]:  # noqa: D102
        return ObjectStore(self._store, read_only=True)

    def _replace(self, key: str, data: bytes) -> None:
        with self._errors_in_words(f"writing {key}"):
            obstore.put(self._store, key, data, use_multipart=False)

    @contextmanager
    def _errors_in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except (*LASTING_FAULTS, FileNotFoundError) as error:
            raise InputError(f"{self.url}: {what} is not possible ({_first_line(error)}); check bucket, region and credentials") from error
        except exceptions.BaseError as error:
            raise RetryableError(f"{self.url}: {what} failed ({_first_line(error)})") from error


def _connect(url: str, patience_s: int) -> S3Store | GCSStore | AzureStore:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT", "")
    store = from_url(
        url,
        client_options={"allow_http": endpoint.startswith("http://")},
        retry_config={
            "max_retries": 30,
            "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=20), "base": 2},
            "retry_timeout": timedelta(seconds=patience_s),
        },
    )
    if not isinstance(store, S3Store | GCSStore | AzureStore):
        raise InputError(f"{url}: give an s3:, gs: or az: URL, or a folder")
    return store


def _first_line(error: BaseException) -> str:
    """The messages of obstore end in a page of debugging output."""
    return str(error).strip().partition("\n")[0][:300]
