"""A store from one place to another: whole, byte by byte, or a part of it as a store of its own.

Either way the target is a store at any time, only committed units get there, and the same call again copies what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from persona_ray.errors import InputError
from persona_ray.spec import ProgressCallback
from persona_ray.store.address import FSSPEC, absolute_url
from persona_ray.store.copied import Copied, Source
from persona_ray.store.copy_part import copy_part
from persona_ray.store.copy_whole import copy_whole

DEFAULT_WORKERS = 2
"""Units under way. Each holds its objects; of a part, its numbers decoded as well: up to 1 GB at full scale."""


def copy_store(
    source: str,
    target: str,
    *,
    layers: Sequence[int] | None = None,
    archetypes: Sequence[str] | None = None,
    at: str | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: ProgressCallback = lambda _: None,
) -> Copied:
    """Copy the committed units of the store at `source`, as of now or of the state `at`, to `target`; see `copy_whole`, `copy_part`.

    With `layers` or `archetypes` the target is a store of these alone. What is damaged in the source is named and not copied, the
    rest is. `progress` counts units. Raises InputError, before anything is written, if there is no such store, state, layer or
    archetype, or the target holds something else; IntegrityError if the source's plans are in doubt.
    """
    _check_places(absolute_url(source), absolute_url(target))
    found = Source.of(source, at)
    if layers is None and archetypes is None:
        return copy_whole(found, target, workers=workers, progress=progress)
    return copy_part(found, target, layers=layers, archetypes=archetypes, workers=workers, progress=progress)


def _check_places(source: str, target: str) -> None:
    """A store in another would be listed as a part of it."""
    one, other = (f"{url.removeprefix(FSSPEC).rstrip('/')}/" for url in (source, target))
    if one.startswith(other) or other.startswith(one):
        raise InputError(f"{target}: is the source, lies in it, or holds it ({source}); give another place")
