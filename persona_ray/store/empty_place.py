"""A store begins where nothing else is."""

from __future__ import annotations

from persona_ray.errors import InputError
from persona_ray.store.backend import Backend


def require_empty(place: Backend) -> None:
    """Raise InputError, naming what it holds, if `place`, which is no store, is not empty either."""
    foreign = place.first_foreign_key()
    if foreign is not None:
        raise InputError(f"{place.url}: is no persona_ray store, and not empty either (it holds {foreign}); give a new or empty place")
