"""All stores below a folder or a bucket's prefix, each in one line. From the root's metadata and the names of markers alone.

Folders are opened level by level, and a store is never entered: its objects are not listed. Sizes are left out, because
they are in the markers, and each of those is a request: `store info` has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from persona_ray.errors import InputError, PersonaRayError
from persona_ray.spec import ProgressCallback
from persona_ray.store.address import absolute_url, open_backend
from persona_ray.store.backend import METADATA_NAME, NUM_READERS, Backend, ListedObject
from persona_ray.store.layout import root_attributes
from persona_ray.store.marker import commits_folder, place_of_marker_key
from persona_ray.store.plan_file import PLANS_FOLDER, SCHEMA_VERSION, plan_key
from persona_ray.store.plans import claimed_keys, read_plans

MAX_DEPTH = 8
"""Levels of folders that are opened below the one that was asked for."""
SIGNS = frozenset({PLANS_FOLDER, commits_folder(0)})
"""A folder with one of these is a store, or what is left of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSummary:
    """What a line says of a store."""

    name: str | None
    """Of the job that began it."""
    model_id: str
    model_revision: str | None
    rows: int
    """Asked for by all plans."""
    units: int
    """Of all plans."""
    committed: tuple[int, ...]
    """Units that exist, for each set of layers."""
    layers: tuple[int, ...]
    """Captured decoder blocks of all sets, rising."""
    hidden_size: int
    created: str
    """ISO 8601, UTC."""
    last_commit: str | None
    """When the newest marker was written, by the service's clock: ISO 8601, UTC; None = there is none."""


@dataclass(frozen=True, slots=True)
class ListedStore:
    """One line: exactly one of `summary` and `problem` is there."""

    url: str
    summary: StoreSummary | None
    problem: str | None = None
    """Why nothing can be said of this store, or of what lies below this folder."""


def list_stores(url: str, *, max_depth: int = MAX_DEPTH, progress: ProgressCallback = lambda _: None) -> list[ListedStore]:
    """Every store at `url` or below, by rising URL; one that cannot be read is a line with its reason.

    Folders with a name that begins with a dot are not opened. Requests: a listing for each folder on the way; for each store one
    GET, two listings of its plans, and a listing of each of its folders of markers (one request for every 1,000); where a run is
    just adding a plan, the plans are read, too. Raises InputError if `url` itself cannot be listed.
    """
    place = absolute_url(url)
    if "://" not in place and not Path(place).is_dir():
        raise InputError(f"{place}: there is no such folder")
    backend = open_backend(place, is_hasty=True)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found: list[ListedStore] = []
        level: list[tuple[str, tuple[str, ...] | str]] = [("", _folders(backend, ""))]
        for depth in range(max_depth + 1):
            stores = [folder for folder, below in level if isinstance(below, tuple) and _is_store(below)]
            for line in pool.map(partial(_line, backend.url), stores):
                found.append(line)
                progress(1)
            found += [ListedStore(_url(backend.url, folder), None, below) for folder, below in level if isinstance(below, str)]
            if depth == max_depth:
                break
            folders = [
                name for _, below in level if isinstance(below, tuple) and not _is_store(below) for name in below if not _is_hidden(name)
            ]
            level = list(zip(folders, pool.map(partial(_folders_or_problem, backend), folders), strict=True))
    return sorted(found, key=lambda line: line.url)


def _folders(backend: Backend, folder: str) -> tuple[str, ...]:
    return tuple(backend.list_folders(folder))


def _folders_or_problem(backend: Backend, folder: str) -> tuple[str, ...] | str:
    try:
        return _folders(backend, folder)
    except PersonaRayError as error:
        return _reason(error, backend.url)


def _is_store(below: Sequence[str]) -> bool:
    return not SIGNS.isdisjoint(folder.rpartition("/")[2] for folder in below)


def _is_hidden(folder: str) -> bool:
    return folder.rpartition("/")[2].startswith(".")


def _url(place: str, folder: str) -> str:
    return f"{place.rstrip('/')}/{folder}" if folder else place


def _line(place: str, folder: str) -> ListedStore:
    url = _url(place, folder)
    try:
        return ListedStore(url, _summary(open_backend(url, is_hasty=True)))
    except PersonaRayError as error:
        return ListedStore(url, None, _reason(error, url))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return ListedStore(url, None, f"{METADATA_NAME} cannot be read ({error!r}); `store verify` says more")


def _reason(error: PersonaRayError, url: str) -> str:
    """The line begins with the URL already."""
    return str(error).removeprefix(f"{url}: ")


def _summary(backend: Backend) -> StoreSummary:
    attributes = _attributes(backend)
    identity = attributes["identity"]
    sets = attributes["layer_sets"]
    markers = [_markers(backend, layer_set) for layer_set in range(len(sets))]
    last_s = max((item.modified_s for listed in markers for item in listed), default=None)
    return StoreSummary(
        name=attributes["job"].get("name"),
        model_id=identity["model_id"],
        model_revision=identity["model_revision"],
        rows=int(attributes["rows"]),
        units=int(attributes["units"]),
        committed=tuple(len(listed) for listed in markers),
        layers=tuple(sorted(layer for layers in sets for layer in layers)),
        hidden_size=int(identity["hidden_size"]),
        created=attributes["created"],
        last_commit=None if last_s is None else datetime.fromtimestamp(last_s, UTC).isoformat(timespec="seconds"),
    )


def _attributes(backend: Backend) -> Mapping[str, Any]:
    """Those of the root, if it knows all plans; else what it will be. Raises InputError for what is no whole store."""
    claimed = claimed_keys(backend)
    if plan_key(0) not in claimed:
        raise InputError(f"{backend.url}: {plan_key(0)} is missing, so nothing says what this store is; bring it back from a copy")
    data = backend.get_or_none(METADATA_NAME)
    if data is None:
        raise InputError(f"{backend.url}: {METADATA_NAME} is missing: its creation was interrupted; the same run completes it")
    attributes: Mapping[str, Any] = json.loads(data)["attributes"]
    if attributes["schema_version"] > SCHEMA_VERSION:
        raise InputError(f"{backend.url}: has schema {attributes['schema_version']}; update persona_ray")
    known = int(attributes.get("plans", 0)) + len(attributes.get("layer_sets", ())) - 1
    return attributes if known == len(claimed) else root_attributes(read_plans(backend))


def _markers(backend: Backend, layer_set: int) -> list[ListedObject]:
    return [item for item in backend.list_objects(commits_folder(layer_set)) if place_of_marker_key(item.key) is not None]
