"""From the text in a job file to a place: which backend serves a URL."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from persona_ray.errors import InputError
from persona_ray.store.backend import Backend
from persona_ray.store.cloud import SCHEMES, CloudBackend
from persona_ray.store.folder import FolderBackend

FSSPEC = "fsspec+"
"""Before an s3: URL: the same place, through fsspec's client instead of obstore's."""
FSSPEC_SCHEMES = frozenset({"fsspec+s3"})

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")


def absolute_url(url: str) -> str:
    """`url` in a form that means the same in any process: folders as absolute paths, object-store URLs without a last slash."""
    match = _SCHEME.match(url)
    if match is None:
        return str(_absolute(url))
    scheme = match.group().lower()
    if scheme == "file":
        return str(_absolute(_path_of(url)))
    if scheme in SCHEMES | FSSPEC_SCHEMES:
        return _bucket_url(url, scheme)
    if scheme.startswith(FSSPEC):
        raise InputError(
            f"{url}: the fsspec client serves s3: alone, because only there it can create an object that nobody overwrites; "
            "write fsspec+s3://bucket/folder, or leave store.client out"
        )
    raise InputError(
        f"{url}: {scheme}: is not served; give a folder, or a file:, s3:, gs:, az: or memory: URL (./{url} if it is a folder's name)"
    )


def open_backend(url: str, *, is_hasty: bool = False) -> Backend:
    """The backend at `url`. `is_hasty`: give up on an unreachable service within seconds. Raises InputError."""
    place = absolute_url(url)
    if place.startswith(FSSPEC):
        # Loaded only where it was asked for: the client takes longer to import than everything else of a laptop's command.
        from persona_ray.store.filesystem import FilesystemBackend  # noqa: PLC0415

        return FilesystemBackend(place, is_hasty=is_hasty)
    return CloudBackend(place, is_hasty=is_hasty) if _SCHEME.match(place) else FolderBackend(Path(place))


def _bucket_url(url: str, scheme: str) -> str:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InputError(
            f"{scheme}: a store's URL is written into logs and stores, so it must not hold credentials; "
            "put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and leave them out of the URL"
        )
    if not parts.netloc:
        raise InputError(f"{url}: names no bucket; write {scheme}://bucket/folder")
    if parts.query or parts.fragment:
        raise InputError(f"{url}: a store's URL ends with its folder; ? and # are not served")
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _path_of(url: str) -> str:
    """file:/a, file:///a, file://localhost/a and file:a (relative)."""
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise InputError(f"{url}: file URLs name no host; write file:///{parts.netloc}{parts.path} for a path from the root")
    return unquote(parts.path)


def _absolute(path: str) -> Path:
    if not path:
        raise InputError("the store's URL is empty; give a folder, or an s3:, gs: or az: URL")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{path}: {error}") from error
