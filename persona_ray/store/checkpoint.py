"""Statistics of rows that need not be read again: `_moments/{name}.json`, and its arrays beside it as safetensors. Write-once.

There are several kinds: one that grows, of which the largest is enough, and others of which every piece counts. Nothing but a
saving: all of it follows from the rows, and may be deleted whenever nobody reduces. The arrays come first, so a note that is there
has them. What the arrays mean is the writer's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from persona_ray.errors import IntegrityError
from persona_ray.spec import digest_of
from persona_ray.store.address import open_backend
from persona_ray.store.backend import Backend

FOLDER = "_moments"
GROWING = "moments"
"""Kind of which each includes the ones before."""

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the arrays are of."""

    kind: str
    layers: tuple[int, ...]
    units: tuple[int, ...]
    """Rising."""
    state: str
    """`StoreReader.state_of` them when they were read."""
    num_rows: int
    sha256: str
    """Of the arrays' object."""

    @property
    def name(self) -> str:
        """Different for different kinds, layers, units or numbers."""
        return digest_of({"kind": self.kind, "layers": self.layers, "state": self.state, "arrays": self.sha256})[:16]

    def to_bytes(self) -> bytes:
        """JSON; units as half-open runs."""
        return json.dumps({**asdict(self), "units": _runs(self.units)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Checkpoint:
        """The reverse. Raises IntegrityError for anything unreadable."""
        try:
            facts = json.loads(data)
            units = tuple(unit for start, stop in facts["units"] for unit in range(start, stop))
            numbers: dict[str, Any] = {"num_rows": int(facts["num_rows"]), "sha256": str(facts["sha256"])}
            return cls(kind=str(facts["kind"]), layers=tuple(facts["layers"]), units=units, state=str(facts["state"]), **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{where}: damaged note ({error!r}); delete {FOLDER}/, it only saves reading") from error


def keep_checkpoint(
    url: str, arrays: Arrays, *, kind: str = GROWING, layers: Sequence[int], units: Iterable[int], state: str, num_rows: int
) -> Checkpoint:
    """Keep `arrays` of these rows."""
    data = save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    note = Checkpoint(kind=kind, layers=tuple(layers), units=tuple(sorted(units)), state=state, num_rows=num_rows, sha256=sha256)
    backend = open_backend(url)
    backend.create_once(_arrays_key(note.name), data)
    backend.create_once(_note_key(note.name), note.to_bytes())
    return note


def checkpoints(url: str, layers: Sequence[int], kind: str = GROWING) -> list[Checkpoint]:
    """Those of this kind and exactly these layers, the one of most rows first. Raises IntegrityError for a damaged note."""
    backend = open_backend(url)
    found = [note for note in _notes(backend).values() if (note.kind, note.layers) == (kind, tuple(layers))]
    return sorted(found, key=lambda note: (-note.num_rows, note.name))


def checkpoint_arrays(url: str, checkpoint: Checkpoint) -> dict[str, npt.NDArray[np.generic]]:
    """Its arrays. Raises IntegrityError if they are not what was kept."""
    backend, key = open_backend(url), _arrays_key(checkpoint.name)
    data = backend.get(key)
    if hashlib.sha256(data).hexdigest() != checkpoint.sha256:
        raise IntegrityError(f"{backend.url}: {key} is damaged; delete {FOLDER}/, it only saves reading")
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise IntegrityError(f"{backend.url}: {key} cannot be read ({error}); delete {FOLDER}/, it only saves reading") from error


def superseded(backend: Backend) -> list[str]:
    """Keys of what a later checkpoint has made needless: of the growing kind of the same layers, of the others of the same units, too."""
    notes = _notes(backend)
    best: dict[tuple[object, ...], str] = {}
    for name, note in sorted(notes.items(), key=lambda pair: (-pair[1].num_rows, pair[0])):
        best.setdefault((note.kind, note.layers, () if note.kind == GROWING else note.units), name)
    kept = {key for name in best.values() for key in (_note_key(name), _arrays_key(name))}
    return [key for key in backend.list_keys(FOLDER) if key not in kept]


def _notes(backend: Backend) -> dict[str, Checkpoint]:
    keys = [key for key in backend.list_keys(FOLDER) if key.endswith(".json")]
    found = zip(keys, backend.get_many(keys), strict=True)
    return {
        key.removeprefix(f"{FOLDER}/").removesuffix(".json"): Checkpoint.from_bytes(data, f"{backend.url}: {key}") for key, data in found
    }


def _runs(units: Sequence[int]) -> list[list[int]]:
    """Rising numbers as half-open runs."""
    if not units:
        return []
    breaks = [place for place, (before, after) in enumerate(pairwise(units), 1) if after != before + 1]
    return [[units[start], units[stop - 1] + 1] for start, stop in pairwise([0, *breaks, len(units)])]


def _note_key(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _arrays_key(name: str) -> str:
    return f"{FOLDER}/{name}.safetensors"
