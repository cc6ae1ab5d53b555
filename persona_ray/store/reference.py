"""What people write for one result: `STORE`, its result in force, or `STORE@NAME`, that one."""

from __future__ import annotations

from persona_ray.errors import InputError
from persona_ray.spec import Reduced
from persona_ray.store.reader import StoreReader, open_store


def split_reference(reference: str) -> tuple[str, str | None]:
    """URL and name of the result, None for the one in force. A folder whose own name has an @ is written with a slash at its end.

    Raises InputError for an empty half.
    """
    url, at, name = reference.rpartition("@")
    if not at or "/" in name:
        return reference, None
    if not url or not name:
        raise InputError(f"{reference}: expected STORE, or STORE@NAME with the name of one of its results")
    return url, name


def open_result(reference: str) -> tuple[StoreReader, Reduced]:
    """The store and the result. Raises InputError if one of them is not there."""
    url, name = split_reference(reference)
    store = open_store(url)
    found = store.latest_reduced() if name is None else name
    if found is None:
        raise InputError(f"{store.url}: no axis was computed yet; `persona-ray reduce` makes one")
    return store, store.reduced(found)
