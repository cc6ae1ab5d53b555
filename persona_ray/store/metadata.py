"""All `zarr.json`, and the columns known at planning: what follows from the plans, written by whoever notices that it is behind.

Several runs may be at it at once, each with the plans that it has seen. So everybody writes, looks again, and repeats until
nothing changes: the last to write has seen the last plan. Arrays first, the root with its copies of their metadata in one put.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from persona_ray.store.backend import METADATA_NAME, Backend
from persona_ray.store.encoding import array_document, array_objects, consolidated, encode_unit, group_document
from persona_ray.store.layout import (
    chunk_key,
    layer_coordinates,
    planned_arrays,
    planned_chunks,
    root_attributes,
    score_array,
    unit_arrays,
)
from persona_ray.store.plans import Plans, claimed_keys, keys_of, read_plans


def settle(backend: Backend) -> Plans:
    """Bring metadata and planned columns up to date with the plans; answers those. May be done at any time, by anybody, again.

    Raises InputError if there is no store.
    """
    while True:
        plans = read_plans(backend)
        if not _update(backend, plans) and claimed_keys(backend) == keys_of(plans):
            return plans


def _update(backend: Backend, plans: Plans) -> bool:
    """One pass; answers whether anything had to be written."""
    found = metadata_documents(backend)
    behind = {key: data for key, data in planned_documents(plans, judges_of(found)).items() if not same_json(found.get(key), data)}
    root = group_document(root_attributes(plans))
    documents = {**found, **behind, METADATA_NAME: root}
    root = consolidated({METADATA_NAME: root, **dict(sorted((key, data) for key, data in documents.items() if key != METADATA_NAME))})
    is_behind = not same_json(found.get(METADATA_NAME), root)
    if behind or is_behind:
        backend.create_all(dict(_planned_objects(plans, already=_num_plans_of(found.get(METADATA_NAME)))))
        backend.create_all(behind)
    if is_behind:
        backend.replace(METADATA_NAME, root)
    return bool(behind) or is_behind


def store_objects(plans: Plans, judges: Iterable[str] = ()) -> dict[str, bytes]:
    """Every object of a store without units but the plan files themselves: a pure function of the plans."""
    documents = planned_documents(plans, judges)
    root = consolidated({METADATA_NAME: group_document(root_attributes(plans)), **dict(sorted(documents.items()))})
    return dict(_planned_objects(plans, already=0)) | documents | {METADATA_NAME: root}


def planned_documents(plans: Plans, judges: Iterable[str]) -> dict[str, bytes]:
    """`zarr.json` of every array whose shape follows from the plans."""
    specs = [
        *planned_arrays(plans).values(),
        *(spec for spec, _ in layer_coordinates(plans)),
        *unit_arrays(plans).values(),
        *(score_array(plans, judge) for judge in judges),
    ]
    return {f"{spec.name}/{METADATA_NAME}": array_document(spec) for spec in specs}


def _planned_objects(plans: Plans, already: int) -> Iterator[tuple[str, bytes]]:
    """Chunks of the planned columns, but those of the first `already` plans, which have them; and the layer coordinates."""
    specs = planned_arrays(plans)
    for file in plans.files[already:]:
        for chunk, columns in planned_chunks(plans, file.plan):
            for name, values in columns.items():
                yield chunk_key(specs[name], chunk), encode_unit(specs[name], values)
    for spec, values in layer_coordinates(plans):
        yield from ((key, data) for key, data in array_objects(spec, values).items() if not key.endswith(METADATA_NAME))


def metadata_documents(backend: Backend) -> dict[str, bytes]:
    """All `zarr.json` of the store by key. Array folders are not searched: they hold an object for each unit."""
    data = backend.get_or_none(METADATA_NAME)
    documents = {} if data is None else {METADATA_NAME: data}
    folders = backend.list_folders("")
    while folders:
        folder = folders.pop()
        document = backend.get_or_none(f"{folder}/{METADATA_NAME}")
        if document is None:
            continue
        documents[f"{folder}/{METADATA_NAME}"] = document
        if json.loads(document)["node_type"] == "group":
            folders.extend(backend.list_folders(folder))
    return dict(sorted(documents.items()))


def judges_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Judges whose array of scores is among `keys`."""
    parts = (key.split("/") for key in keys)
    return tuple(sorted({part[1] for part in parts if part[0] == "scores" and part[2:] == ["score", METADATA_NAME]}))


def same_json(found: bytes | None, wanted: bytes) -> bool:
    """Whether both say the same: another release of zarr may write the same otherwise."""
    if found is None or found == wanted:
        return found == wanted
    try:
        return bool(json.loads(found) == json.loads(wanted))
    except ValueError:
        return False


def _num_plans_of(root: bytes | None) -> int:
    """Plans that the root knows, whose chunks are all there, because it is written after them."""
    try:
        return 0 if root is None else int(json.loads(root)["attributes"]["plans"])
    except (ValueError, KeyError, TypeError):
        return 0
