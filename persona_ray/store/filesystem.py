"""A store on S3 through fsspec (s3fs), for `store.client: fsspec`: it knows profiles, single sign-on and assumed roles.

Only file systems whose create is conditional on the server are served, which of fsspec's we can hold to is s3fs alone: the
local one shows half-written files under their names, and the others look first and write then.
"""

from __future__ import annotations

import asyncio
import http.client
import weakref
from functools import cached_property
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions
from s3fs import S3FileSystem
from zarr.storage import FsspecStore

from persona_ray.store.backend import ListedObject
from persona_ray.store.remote import GIVE_CREDENTIALS, HASTY, NO_CREDENTIALS, PATIENT, Fault, RemoteBackend, S3Access, one_line

LASTING_FAULTS = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.ParamValidationError,
    exceptions.ProfileNotFound,
    exceptions.TokenRetrievalError,
    exceptions.UnauthorizedSSOTokenError,
    exceptions.ConfigParseError,
    exceptions.InvalidRegionError,
)
MAX_PUT_BYTES = 5 * 2**30
"""One put up to this size: a multipart upload's completion is not conditional everywhere."""


def _close(loop: asyncio.AbstractEventLoop | None, client: Any) -> None:
    """In the loop that opened it: whoever collects the garbage may be in another."""
    if loop is not None and loop.is_running():
        asyncio.run_coroutine_threadsafe(client.__aexit__(None, None, None), loop)


class _Files(S3FileSystem):  # type: ignore[misc]
    """As the base, whose connections are closed in the wrong event loop, and those of Zarr's loop never."""

    close_session = staticmethod(_close)

    async def set_session(self, refresh: bool = False, kwargs: Any = None) -> Any:  # noqa: ARG002
        """The base sees to connections of its own loop."""
        before = self._s3
        client = await super().set_session(refresh=refresh)
        if client is not before and self.asynchronous:
            weakref.finalize(self, self.close_session, asyncio.get_running_loop(), self._s3creator)
        return client


class FilesystemBackend(RemoteBackend):
    """Objects are keys below the prefix of `url`, which is `fsspec+s3://bucket/prefix`."""

    faults: ClassVar[tuple[type[Exception], ...]] = (OSError, exceptions.BotoCoreError, aiohttp.ClientError, http.client.HTTPException)

    def __init__(self, url: str, *, is_hasty: bool = False) -> None:
        super().__init__(url, HASTY if is_hasty else PATIENT)
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._files = _Files(**_options(self.patience.request_s))
        self._files.retries = 1

    def _zarr_store(self) -> FsspecStore:
        return FsspecStore(self._zarr_files, read_only=True, path=f"{self._bucket}/{self._prefix}".rstrip("/"))

    @cached_property
    def _zarr_files(self) -> _Files:
        return _Files(asynchronous=True, **_options(self.patience.request_s))

    def _put(self, key: str, data: bytes, *, is_new: bool) -> None:
        self._files.pipe_file(self._path(key), data, chunksize=MAX_PUT_BYTES, mode="create" if is_new else "overwrite")

    def _read(self, key: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(self._path(key)))
        except FileNotFoundError as error:
            if self._fault(error).is_lasting:
                raise
            return None

    def _read_part(self, key: str, start: int, stop: int | None) -> bytes | None:
        try:
            return bytes(self._files.cat_file(self._path(key), start=start, end=stop))
        except FileNotFoundError as error:
            if self._fault(error).is_lasting:
                raise
            return None
        except OSError as error:
            if _status(_reply(error)) != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            return b""

    def _keys(self, folder: str) -> list[str]:
        return [item["Key"][len(self._below("")) :] for page in self._pages(folder) for item in page.get("Contents", ())]

    def _objects(self, folder: str) -> list[ListedObject]:
        items = (item for page in self._pages(folder) for item in page.get("Contents", ()))
        return [ListedObject(item["Key"][len(self._below("")) :], item["Size"], item["LastModified"].timestamp()) for item in items]

    def _delete(self, key: str) -> None:
        self._files.call_s3("delete_object", Bucket=self._bucket, Key=f"{self._below('')}{key}")

    def _folders(self, folder: str) -> list[str]:
        pages = self._pages(folder, Delimiter="/")
        return [item["Prefix"][len(self._below("")) : -1] for page in pages for item in page.get("CommonPrefixes", ())]

    def _first_keys(self) -> list[str]:
        page = self._page("", MaxKeys=10)
        return [item["Key"][len(self._below("")) :] for item in page.get("Contents", ())]

    def _pages(self, folder: str, **options: Any) -> list[dict[str, Any]]:
        """Every page of a listing, from the service: fsspec's own listings are cached."""
        pages = [self._page(folder, **options)]
        while pages[-1].get("IsTruncated"):
            pages.append(self._page(folder, ContinuationToken=pages[-1]["NextContinuationToken"], **options))
        return pages

    def _page(self, folder: str, **options: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._files.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._below(folder), **options)
        return reply

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._below('')}{key}"

    def _below(self, folder: str) -> str:
        """What the service's keys below `folder` begin with."""
        return "".join(f"{part}/" for part in (self._prefix, folder) if part)

    def _fault(self, error: Exception) -> Fault:
        reply = _reply(error)
        if isinstance(error, exceptions.NoCredentialsError):
            return Fault(NO_CREDENTIALS, is_lasting=True, remedy=GIVE_CREDENTIALS)
        if not reply:
            return Fault(one_line(str(error) or type(error).__name__), isinstance(error, LASTING_FAULTS))
        status = _status(reply)
        code, message = (str(reply.get("Error", {}).get(name) or "") for name in ("Code", "Message"))
        if status == HTTPStatus.NOT_FOUND and code != "NoSuchBucket":
            return Fault("there is no such object", is_lasting=False)
        return Fault.of_reply(status, code, message)


def _reply(error: Exception) -> dict[str, Any]:
    """The service's, which s3fs hides behind its own errors; empty if there was none."""
    return getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}


def _status(reply: dict[str, Any]) -> int:
    return int(reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _options(request_s: float) -> dict[str, Any]:
    """No key is given, so that botocore's default chain finds credentials, and renews those that expire."""
    access = S3Access.from_environment()
    return {
        "anon": access.is_anonymous,
        "requester_pays": access.pays_for_requests,
        "endpoint_url": access.endpoint,
        "client_kwargs": {"region_name": access.region} if access.region else {},
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": request_s,
            "max_pool_connections": 32,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            **({"s3": {"addressing_style": "path"}} if access.endpoint else {}),
        },
        # Else a HEAD before every GET, and the reply to a HEAD does not say what is wrong.
        "max_concurrency": 1,
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }
